"""COCO box and mask AP of one set of detections."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hotcoco import COCO, COCOeval
from jaxtyping import Float
from pycocotools import mask as coco_mask

from dimaskdino.modeling import Instances

Kind = Literal["box", "mask"]


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


@dataclass
class DetectionResults:
    """Detections of many images in COCO's result format, boxes and masks apart.

    Args:
        category_ids: the dataset's category id of each label.
    """

    category_ids: list[int]
    boxes: list[dict[str, Any]] = field(default_factory=list)
    masks: list[dict[str, Any]] = field(default_factory=list)
    has_masks: bool = False

    def add(self, image_id: int, instances: Instances) -> None:
        """Add one image's detections, at the image's original size."""
        scores = instances.scores.tolist()
        categories = [self.category_ids[label] for label in instances.labels.tolist()]
        xyxy = instances.boxes.double().cpu().numpy()
        xywh = np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1).tolist()
        for category, score, box in zip(categories, scores, xywh, strict=True):
            self.boxes.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
        if instances.query_masks is None:
            return
        self.has_masks = True
        # a query can be detected as several classes: encode its mask once
        stacked = instances.query_masks.permute(1, 2, 0).byte().cpu().numpy()
        encoded = coco_mask.encode(np.asfortranarray(stacked))
        for category, score, index in zip(categories, scores, instances.mask_index.tolist(), strict=True):
            self.masks.append(
                {"image_id": image_id, "category_id": category, "segmentation": encoded[index], "score": score}
            )


def average_precision(truth: COCO, detections: list[dict[str, Any]], kind: Kind) -> AveragePrecision:
    """AP of detections against annotations, by hotcoco, which gives pycocotools' numbers much faster."""
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
    """Interpolated precision of every class at the recalls 0, 0.01, … 1, in [0, 1]; −1 for classes without objects.

    Raises:
        ValueError: the IoU threshold is none of COCO's, 0.50, 0.55, … 0.95.
    """
    precision, evaluation = _accumulated(truth, detections, kind)
    row = np.isclose(np.asarray(evaluation.params.iou_thrs), threshold)
    if not row.any():
        raise ValueError(f"COCO's IoU thresholds are 0.50, 0.55, … 0.95, not {threshold}")
    return precision[row, ..., 0][0].T


def _accumulated(truth: COCO, detections: list[dict[str, Any]], kind: Kind) -> tuple[np.ndarray, COCOeval]:
    """Precision (IoU thresholds, recalls, classes, areas: all s m l), −1 where there is no object."""
    evaluation = COCOeval(truth, truth.load_res(detections), {"box": "bbox", "mask": "segm"}[kind])
    evaluation.evaluate()
    evaluation.accumulate()
    assert evaluation.eval is not None
    return evaluation.eval["precision"][..., -1], evaluation  # the last of 1, 10 and 100 detections


def _percent(precision: np.ndarray) -> float | None:
    valid = precision[precision > -1]
    return float(100 * np.mean(valid)) if valid.size else None


def read_truth(annotations: Path) -> COCO:
    """The annotations of a split, as hotcoco reads them."""
    return COCO(str(annotations))
