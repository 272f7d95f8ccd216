"""COCO box and mask AP of one set of detections."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hotcoco import COCO, COCOeval
from jaxtyping import Float

from dimaskdino.data.annotations import read_annotations

Kind = Literal["box", "mask"]
IOU_TYPE: dict[Kind, str] = {"box": "bbox", "mask": "segm"}  # COCO's names


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's summary in percent; None where the data have no object of that kind.

    Attributes:
        AP: mean over IoU thresholds 0.50 to 0.95 and classes.
        AP50, AP75: at one IoU threshold.
        APs, APm, APl: of objects below 32², up to 96², and above, in pixels of the original image.
        per_class: AP of each class by its name.
    """

    AP: float | None
    AP50: float | None
    AP75: float | None
    APs: float | None
    APm: float | None
    APl: float | None
    per_class: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def average_precision(truth: COCO, detections: list[dict[str, Any]], kind: Kind) -> AveragePrecision:
    """AP of detections against annotations, by hotcoco: the numbers of pycocotools, much faster."""
    precision, evaluation = _accumulated(truth, detections, kind)
    thresholds = np.asarray(evaluation.params.iou_thrs)
    names = {category["id"]: str(category.get("name", category["id"])) for category in truth.dataset["categories"]}
    classes = [names[i] for i in evaluation.params.cat_ids]
    return AveragePrecision(
        AP=_percent(precision[..., 0]),
        AP50=_percent(precision[np.isclose(thresholds, 0.50), ..., 0]),
        AP75=_percent(precision[np.isclose(thresholds, 0.75), ..., 0]),
        APs=_percent(precision[..., 1]),
        APm=_percent(precision[..., 2]),
        APl=_percent(precision[..., 3]),
        per_class={name: _percent(precision[:, :, k, 0]) for k, name in enumerate(classes)},
    )


def precision_curves(
    truth: COCO, detections: list[dict[str, Any]], kind: Kind, threshold: float
) -> Float[np.ndarray, "K 101"]:
    """Interpolated precision per class at the recalls 0, 0.01, … 1, in [0, 1]; −1 for classes without objects.

    Raises:
        ValueError: the IoU threshold is not one of COCO's, 0.50, 0.55, … 0.95.
    """
    precision, evaluation = _accumulated(truth, detections, kind)
    row = np.isclose(np.asarray(evaluation.params.iou_thrs), threshold)
    if not row.any():
        raise ValueError(f"COCO's IoU thresholds are 0.50, 0.55, … 0.95, not {threshold}")
    return precision[row, ..., 0][0].T


def _accumulated(truth: COCO, detections: list[dict[str, Any]], kind: Kind) -> tuple[np.ndarray, COCOeval]:
    """Precision (IoU thresholds, recalls, classes, areas: all s m l), −1 where there is no object."""
    evaluation = COCOeval(truth, truth.load_res(detections), IOU_TYPE[kind])
    evaluation.evaluate()
    evaluation.accumulate()
    assert evaluation.eval is not None
    return evaluation.eval["precision"][..., -1], evaluation  # the last of 1, 10 and 100 detections


def _percent(precision: np.ndarray) -> float | None:
    valid = precision[precision > -1]
    return float(100 * np.mean(valid)) if valid.size else None


def read_truth(annotations: Path) -> COCO:
    """Read the annotations of a split for scoring.

    Raises:
        UserError: the file or one of its records cannot be used.
    """
    return COCO(read_annotations(annotations).as_coco())
