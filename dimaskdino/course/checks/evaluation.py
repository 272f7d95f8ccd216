"""Chapter 2 and the appendix: average precision, and the pairs of query and class that become detections."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from dimaskdino.course.checks.compare import called, check, compared, expect, random
from dimaskdino.data.coco import CocoDataset
from dimaskdino.evaluation.coco_ap import Truth, average_precision, precision_curves
from dimaskdino.evaluation.detections import Detections
from dimaskdino.modeling.stages import FIRST_LAYER


@check("go down the detections and remember which objects are claimed; only a right detection claims one")
def check_right_ones(function: Callable[[Tensor, float], Sequence[bool]]) -> str:
    """Which detections are true positives, from IoUs (D, M) in the order of their scores."""
    iou = torch.tensor([[0.9, 0.2], [0.8, 0.6], [0.7, 0.55], [0.1, 0.0]])
    cases = [(iou, 0.5), (iou, 0.75), (iou[:, :1], 0.5), (random(5, 3, seed=4), 0.5)]

    def expected(overlaps: Tensor, threshold: float) -> Tensor:
        left, right = overlaps.clone(), []
        for row in left:
            best = row.argmax()
            right.append(bool(row[best] >= threshold))
            if right[-1]:
                left[:, best] = -1
        return torch.tensor(right)

    return compared(function, cases, expected)


@check("after n detections with t right ones: t / n and t / objects; np.cumsum counts the right ones")
def check_precision_recall(function: Callable[[Sequence[bool], int], tuple]) -> str:
    """Precision and recall (D,) after each detection."""
    cases = [([True, False, True, True], 5), ([False, True], 1), ([True], 3)]

    def expected(right: Sequence[bool], objects: int) -> tuple[Tensor, Tensor]:
        hits = torch.tensor(right).double().cumsum(0)
        return hits / torch.arange(1, len(right) + 1), hits / objects

    return compared(function, cases, expected)


@check("for each recall r the best of precision[recall >= r], 0 if there is none")
def check_interpolated(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> str:
    """Precision at 101 recalls from precision and recall after each detection."""
    hits, places = np.cumsum([1, 0, 1, 1, 0, 0, 1]), np.arange(1, 8)
    cases = [(hits / places, hits / objects) for objects in (4, 5, 9)]

    def expected(precision: np.ndarray, recall: np.ndarray) -> Tensor:
        envelope = np.maximum.accumulate(precision[::-1])[::-1]  # never rising to the right
        places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
        return torch.from_numpy(np.append(envelope, 0.0)[places])

    return compared(function, cases, expected)


@check("sort the detections of all images together by their scores; then ten thresholds, 0.5 to 0.95")
def check_average_precision(
    function: Callable[..., float], found: Mapping[str, Detections], truth: Truth, data: CocoDataset, label: str
) -> str:
    """To build: box AP of one class at the first stage, after the first layer, and at the last stage.

    The student's function takes a list of (IoUs (D, M), scores (D,)), one per image, best first, and returns AP in
    percent. `found` has the detections of every stage, `truth` the annotations of `data`.
    """
    stages, agreed = list(found), []
    for stage in dict.fromkeys((stages[0], FIRST_LAYER, stages[-1])):
        rows = found[stage].boxes
        answer = called(function, (list(_overlaps(rows, data, label)),))
        expected = average_precision(truth, rows, "box").per_class[label] or 0.0
        loose = precision_curves(truth, rows, "box", 0.5)[data.classes.index(label)].mean()
        mistakes = {"AP is in percent": expected / 100, "this is AP at the threshold 0.5 alone": 100 * float(loose)}
        expect(answer, expected, mistakes, where=f"{stage}: ")
        agreed.append(f"{expected:.1f} at {stage}")
    return f"AP {', '.join(agreed)}"


def _overlaps(rows: Sequence[dict], data: CocoDataset, label: str) -> Iterator[tuple[Tensor, np.ndarray]]:
    """For each image the IoUs (D, M) of the detections of a class with its objects, and their scores, best first."""
    number = data.classes.index(label)
    ranked = sorted(rows, key=lambda row: -row["score"])
    for sample in (data[i] for i in range(len(data))):
        own = []
        for row in ranked:
            if row["image_id"] == sample.image_id and row["category_id"] == data.category_ids[number]:
                own.append([*row["bbox"], row["score"]])
        table = torch.tensor(own, dtype=torch.float64).view(-1, 5)
        boxes = box_convert(table[:, :4], "xywh", "xyxy")
        yield box_iou(boxes, sample.boxes[sample.labels == number].double()), table[:, 4].numpy()


@check("flatten to Q · K numbers, take the n highest; the pair i belongs to query i // K")
def check_best_queries(function: Callable[[Tensor, int], Tensor]) -> str:
    """Queries (n,) of the best pairs of query and class, from class logits (Q, K)."""
    cases = [(random(5, 3, seed=i), n) for i, n in enumerate((1, 4, 15))]
    return compared(function, cases, lambda logits, n: logits.flatten().argsort(descending=True)[:n] // logits.shape[1])
