"""COCO box and mask AP of one set of detections, and the matching behind it.

hotcoco evaluates: it returns the numbers of pycocotools and is much faster. pycocotools takes its place where hotcoco
cannot be imported, or where its AP of a case solved by hand is wrong.
"""

import contextlib
import functools
import io
import math
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dimaskdino.data.annotations import read_annotations, without_collection

Kind = Literal["box", "mask"]
Results = list[dict[str, Any]] | Float[np.ndarray, "n 7"]  # boxes or masks as COCO's results, or boxes as a table
COCO_DETECTIONS = 100  # per image and class
_IOU_TYPE: dict[Kind, str] = {"box": "bbox", "mask": "segm"}  # COCO's names

# Two objects. The best detection is exact, the second one wrong, and the third has IoU 0.725 with its object: precision
# is 1 up to recall 0.5 at all ten thresholds, and 2/3 from there on at the five up to 0.70.
_KNOWN_TRUTH: dict[str, list[dict[str, Any]]] = {
    "images": [{"id": 1, "height": 20, "width": 20}],
    "categories": [{"id": 1, "name": "square"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [5, 5, 4, 4], "area": 16, "iscrowd": 0},
    ],
}
_KNOWN_BOXES = np.array([[1, 0, 0, 4, 4, 0.9, 1], [1, 15, 15, 4, 4, 0.8, 1], [1, 5, 5, 4, 2.9, 0.7, 1]])
_KNOWN_AP = 100 * (10 * 51 + 5 * 50 * 2 / 3) / (10 * 101)


class Library(NamedTuple):
    """An implementation of COCO's evaluation with the interface of pycocotools."""

    name: str
    COCO: Any
    COCOeval: Any

    @classmethod
    def load(cls, name: Literal["hotcoco", "pycocotools"]) -> "Library":
        if name == "hotcoco":
            import hotcoco

            return cls(name, hotcoco.COCO, hotcoco.COCOeval)
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return cls(name, COCO, COCOeval)


@functools.cache
def best_library() -> Library:
    """Hotcoco if it can be used; else pycocotools, with a note of the reason on standard error."""
    try:
        library = Library.load("hotcoco")
        ap = average_precision(Truth(_KNOWN_TRUTH, library), _KNOWN_BOXES, "box").AP or 0.0
        if math.isclose(ap, _KNOWN_AP):
            return library
        reason = f"its AP of a known case is {ap:.3f}, not {_KNOWN_AP:.3f}"
    except Exception as error:  # an extension module built for another machine raises many kinds
        reason = str(error)
    print(f"note: pycocotools evaluates, more slowly, since hotcoco cannot be used: {reason}", file=sys.stderr)
    return Library.load("pycocotools")


class Truth:
    """The annotations of a split, against which detections are scored.

    Args:
        dataset: `images`, `annotations` and `categories` as in COCO's files.
        library: the implementation of COCO's evaluation; `best_library` by default.
    """

    def __init__(self, dataset: dict[str, list[dict[str, Any]]], library: Library | None = None) -> None:
        self.dataset = dataset
        self.library = library or best_library()
        # copies, since pycocotools adds keys, and takes an id of 0 for "unmatched"
        numbered = [annotation | {"id": n} for n, annotation in enumerate(dataset["annotations"], start=1)]
        self._coco = self._indexed(numbered)
        counts = Counter((found["image_id"], found["category_id"]) for found in numbered)
        self.most_objects = max(counts.values(), default=0)  # of one class in one image

    def _indexed(self, annotations: list[dict[str, Any]]) -> Any:
        coco = self.library.COCO()
        coco.dataset = self.dataset | {"annotations": annotations}
        with _without_output():
            coco.createIndex()
        return coco

    @without_collection()
    def evaluate(self, detections: Results, kind: Kind, by_size: bool = True, most: int = COCO_DETECTIONS) -> Any:
        """COCO's evaluation of these detections, of objects of all sizes and by size, or of all sizes alone.

        Its `eval` has `precision` (IoU thresholds, recalls, classes, sizes: all s m l, at most 1, 10 and `most`
        detections per image and class) and `recall`, the same without recalls. Both are −1 where there is no object.
        """
        if isinstance(detections, list):
            detections = [dict(row) for row in detections]  # pycocotools adds keys
        with _without_output():
            found = self._coco.loadRes(detections) if len(detections) else self._indexed([])
            evaluation = self.library.COCOeval(self._coco, found, _IOU_TYPE[kind])
            if not by_size:
                evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0.0, 1e10]], ["all"]
            evaluation.params.maxDets = [1, 10, most]
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation


def _without_output() -> contextlib.redirect_stdout:
    """Pycocotools reports its progress."""
    return contextlib.redirect_stdout(io.StringIO())


@without_collection()
def read_truth(annotations: Path, images: Collection[int] | None = None) -> Truth:
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
    return Truth(content)


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


def average_precision(truth: Truth, detections: Results, kind: Kind, most: int = COCO_DETECTIONS) -> AveragePrecision:
    """AP of detections against annotations, COCO's with at most 100 detections per image and class."""
    evaluation = truth.evaluate(detections, kind, most=most)
    precision = evaluation.eval["precision"][..., -1]
    thresholds = np.asarray(evaluation.params.iouThrs)
    return AveragePrecision(
        AP=_percent(precision[..., 0]),
        AP50=_percent(precision[np.isclose(thresholds, 0.50), ..., 0]),
        AP75=_percent(precision[np.isclose(thresholds, 0.75), ..., 0]),
        APs=_percent(precision[..., 1]),
        APm=_percent(precision[..., 2]),
        APl=_percent(precision[..., 3]),
        per_class=_by_class(truth, evaluation, precision[..., 0]),
    )


def average_recall(truth: Truth, detections: Results, kind: Kind) -> AverageRecall:
    """Average recall of detections against annotations, COCO's AR with 100 detections.

    It bounds the AP of these detections in any order: up to the recall reached at a threshold precision is at most 1,
    beyond it 0. The bound holds to 1 point, since COCO reads precision at 101 recalls.
    """
    evaluation = truth.evaluate(detections, kind)
    recall = evaluation.eval["recall"][..., -1]
    return AverageRecall(
        mean=_percent(recall[..., 0]),
        small=_percent(recall[..., 1]),
        medium=_percent(recall[..., 2]),
        large=_percent(recall[..., 3]),
        per_class=_by_class(truth, evaluation, recall[..., 0]),
    )


def precision_curves(truth: Truth, detections: Results, kind: Kind, threshold: float) -> Float[np.ndarray, "K 101"]:
    """Interpolated precision per class at the recalls 0, 0.01, … 1, in [0, 1]; −1 for classes without objects.

    Raises:
        ValueError: the IoU threshold is not one of COCO's, 0.50, 0.55, … 0.95.
    """
    rows = np.isclose(np.linspace(0.5, 0.95, 10), threshold)
    if not rows.any():
        raise ValueError(f"COCO's IoU thresholds are 0.50, 0.55, … 0.95, not {threshold}")
    return truth.evaluate(detections, kind).eval["precision"][rows.argmax(), ..., 0, -1].T


def _percent(values: np.ndarray) -> float | None:
    valid = values[values > -1]
    return float(100 * np.mean(valid)) if valid.size else None


def _by_class(truth: Truth, evaluation: Any, values: Float[np.ndarray, "*any K"]) -> dict[str, float | None]:
    """Mean of the values of each class, in percent, by the name of the class."""
    names = {category["id"]: str(category.get("name", category["id"])) for category in truth.dataset["categories"]}
    return {names[category]: _percent(values[..., k]) for k, category in enumerate(evaluation.params.catIds)}


@dataclass(frozen=True)
class Matches:
    """The detections of one class in all images, image by image, matched with its objects at the T IoU thresholds.

    Attributes:
        image: (n,) position of each detection's image in the order of the image ids.
        score: (n,) in [0, 1].
        right: (T, n) whether it matches an object.
        ignored: (T, n) whether COCO ignores it, since it matches a crowd.
        objects: (images,) number of objects per image.
    """

    image: Int[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]
    right: Bool[np.ndarray, "T n"]
    ignored: Bool[np.ndarray, "T n"]
    objects: Int[np.ndarray, " images"]


@without_collection()
def match_classes(truth: Truth, detections: Results, kind: Kind) -> list[Matches]:
    """The matches of every class, in the order of the category ids."""
    evaluation = truth.evaluate(detections, kind, by_size=False)
    by_class: dict[int, list[dict[str, Any]]] = {category: [] for category in evaluation.params.catIds}
    for entry in evaluation.evalImgs:
        if entry is not None:
            by_class[entry["category_id"]].append(entry)
    place = {image: i for i, image in enumerate(sorted(evaluation.params.imgIds))}
    return [_joined(entries, place, len(evaluation.params.iouThrs)) for entries in by_class.values()]


def _joined(entries: list[dict[str, Any]], place: dict[int, int], T: int) -> Matches:
    """Concatenate COCO's entries of one class, one per image."""
    image, score = [np.zeros(0, np.int64)], [np.zeros(0)]
    right, ignored = [np.zeros((T, 0), bool)], [np.zeros((T, 0), bool)]
    objects = np.zeros(len(place), np.int64)
    for entry in sorted(entries, key=lambda entry: place[entry["image_id"]]):
        position = place[entry["image_id"]]
        objects[position] = len(entry["gtIgnore"]) - np.sum(entry["gtIgnore"], dtype=np.int64)
        image.append(np.full(len(entry["dtScores"]), position))
        score.append(np.asarray(entry["dtScores"], np.float64))
        ignored.append(np.asarray(entry["dtIgnore"], bool).reshape(T, -1))
        right.append((np.asarray(entry["dtMatches"]).reshape(T, -1) > 0) & ~ignored[-1])
    return Matches(
        np.concatenate(image),
        np.concatenate(score),
        np.concatenate(right, axis=1),
        np.concatenate(ignored, axis=1),
        objects,
    )
