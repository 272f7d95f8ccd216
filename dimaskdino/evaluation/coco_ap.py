"""COCO box and mask AP of one set of detections."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hotcoco import COCO, COCOeval
from jaxtyping import Float

from dimaskdino.data.annotations import read_annotations
from dimaskdino.utils.collection import without_collection

Kind = Literal["box", "mask"]
Results = list[dict[str, Any]] | Float[np.ndarray, "n 7"]  # boxes or masks as COCO's results, or boxes as a table
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


@dataclass(frozen=True)
class AverageRecall:
    """Recall in percent, averaged over the IoU thresholds 0.50 to 0.95 and the classes; None without objects.

    Attributes:
        mean: of all objects.
        small, medium, large: by size, as `APs`, `APm` and `APl` of `AveragePrecision`.
        per_class: of each class by its name.
    """

    mean: float | None
    small: float | None
    medium: float | None
    large: float | None
    per_class: dict[str, float | None]


def average_precision(truth: COCO, detections: Results, kind: Kind) -> AveragePrecision:
    """AP of detections against annotations, by hotcoco: the numbers of pycocotools, much faster."""
    evaluation = _accumulated(truth, detections, kind)
    precision = evaluation.eval["precision"][..., -1]
    thresholds = np.asarray(evaluation.params.iou_thrs)
    return AveragePrecision(
        AP=_percent(precision[..., 0]),
        AP50=_percent(precision[np.isclose(thresholds, 0.50), ..., 0]),
        AP75=_percent(precision[np.isclose(thresholds, 0.75), ..., 0]),
        APs=_percent(precision[..., 1]),
        APm=_percent(precision[..., 2]),
        APl=_percent(precision[..., 3]),
        per_class={name: _percent(precision[:, :, k, 0]) for k, name in enumerate(_class_names(truth, evaluation))},
    )


def average_recall(truth: COCO, detections: list[dict[str, Any]], kind: Kind) -> AverageRecall:
    """Average recall of detections against annotations, COCO's AR with 100 detections.

    It bounds the AP of these detections however they are ranked: up to the recall reached at a threshold precision is
    at most 1, beyond it 0. The bound holds to 1 point, since COCO reads precision at 101 recalls.
    """
    evaluation = _accumulated(truth, detections, kind)
    recall = evaluation.eval["recall"][..., -1]
    return AverageRecall(
        *(_percent(recall[..., size]) for size in range(4)),
        per_class={name: _percent(recall[:, k, 0]) for k, name in enumerate(_class_names(truth, evaluation))},
    )


def precision_curves(
    truth: COCO, detections: list[dict[str, Any]], kind: Kind, threshold: float
) -> Float[np.ndarray, "K 101"]:
    """Interpolated precision per class at the recalls 0, 0.01, … 1, in [0, 1]; −1 for classes without objects.

    Raises:
        ValueError: the IoU threshold is not one of COCO's, 0.50, 0.55, … 0.95.
    """
    evaluation = _accumulated(truth, detections, kind)
    row = np.isclose(np.asarray(evaluation.params.iou_thrs), threshold)
    if not row.any():
        raise ValueError(f"COCO's IoU thresholds are 0.50, 0.55, … 0.95, not {threshold}")
    return evaluation.eval["precision"][row, ..., 0, -1][0].T


@without_collection()
def _accumulated(truth: COCO, detections: Results, kind: Kind) -> COCOeval:
    """COCO's evaluation.

    Its `eval` has `precision` (IoU thresholds, recalls, classes, areas: all s m l, at most 1, 10 and 100 detections)
    and `recall`, the same without recalls. Both are −1 where there is no object.
    """
    evaluation = COCOeval(truth, truth.load_res(detections), IOU_TYPE[kind])
    evaluation.evaluate()
    evaluation.accumulate()
    assert evaluation.eval is not None
    return evaluation


def _class_names(truth: COCO, evaluation: COCOeval) -> list[str]:
    names = {category["id"]: str(category.get("name", category["id"])) for category in truth.dataset["categories"]}
    return [names[i] for i in evaluation.params.cat_ids]


def _percent(values: np.ndarray) -> float | None:
    valid = values[values > -1]
    return float(100 * np.mean(valid)) if valid.size else None


def read_truth(annotations: Path, images: Collection[int] | None = None) -> COCO:
    """Read the annotations of a split for scoring.

    Args:
        annotations: the file.
        images: ids of the images to score on; all if None.

    Raises:
        UserError: the file or one of its records cannot be used.
    """
    content = read_annotations(annotations).as_coco()
    if images is not None:
        chosen = set(images)
        content["images"] = [image for image in content["images"] if image["id"] in chosen]
        content["annotations"] = [found for found in content["annotations"] if found["image_id"] in chosen]
    return COCO(content)
