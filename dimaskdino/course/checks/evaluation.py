"""Chapter 2: average precision."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from dimaskdino.course.checks.pictures import draw_bars
from dimaskdino.course.checks.verdicts import CheckResult, called, compared, difference, more, random, right, wrong
from dimaskdino.data.coco import CocoDataset
from dimaskdino.evaluation.coco_ap import Truth, average_precision, precision_curves
from dimaskdino.evaluation.detections import Detections
from dimaskdino.evaluation.layerwise_ap import FIRST_LAYER
from dimaskdino.modeling.stages import short_name


def check_right_ones(function: Callable[[Tensor, float], Sequence[bool]]) -> CheckResult:
    """Which detections are true positives, from IoUs (D, M) in the order of their scores."""
    iou = torch.tensor([[0.9, 0.2], [0.8, 0.6], [0.7, 0.55], [0.1, 0.0]])
    cases = [(iou, 0.5), (iou, 0.75), (iou[:, :1], 0.5), (random(5, 3, seed=4), 0.5)]

    def expected(overlaps: Tensor, threshold: float) -> Tensor:
        left, right = overlaps.clone(), []
        for i in range(len(left)):
            best = left[i].argmax()
            right.append(bool(left[i, best] >= threshold))
            if right[-1]:
                left[:, best] = -1
        return torch.tensor(right)

    hint = "go down the detections and remember which objects are claimed; only a right detection claims one"
    return compared(function, cases, expected, hint)


def check_precision_recall(function: Callable[[Sequence[bool], int], tuple]) -> CheckResult:
    """Precision and recall (D,) after each detection."""
    cases = [([True, False, True, True], 5), ([False, True], 1), ([True], 3)]
    cases += [((x > 0.5).tolist(), 6) for x in more(3, 6)]

    def expected(right: Sequence[bool], objects: int) -> tuple[Tensor, Tensor]:
        hits = torch.tensor(right).double().cumsum(0)
        return hits / torch.arange(1, len(right) + 1), hits / objects

    hint = "after n detections with t right ones: t / n and t / objects; np.cumsum counts the right ones"
    return compared(function, cases, expected, hint)


def check_interpolated(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> CheckResult:
    """Precision at 101 recalls from precision and recall after each detection."""
    hits = np.cumsum([1, 0, 1, 1, 0, 0, 1])
    cases = [(hits / np.arange(1, 8), hits / objects) for objects in (4, 5, 9)]
    drawn = [np.cumsum(x.numpy() > 0.4) for x in more(3, 7)]
    cases += [(found / np.arange(1, 8), found / 8) for found in drawn]

    def expected(precision: np.ndarray, recall: np.ndarray) -> Tensor:
        envelope = np.maximum.accumulate(precision[::-1])[::-1]  # never rising to the right
        places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
        return torch.from_numpy(np.append(envelope, 0.0)[places])

    hint = "for each recall r the best of precision[recall >= r], 0 if there is none"
    return compared(function, cases, expected, hint)


def check_average_precision(
    function: Callable[..., float], found: Mapping[str, Detections], truth: Truth, data: CocoDataset, label: str
) -> CheckResult:
    """To build: box AP of one class at the first and the last stage and after the first layer.

    Args:
        function: the student's, from a list of (IoUs (D, M), scores (D,)), one per image, best first, to AP in percent.
        found: detections of every stage.
        truth: the annotations, from `read_truth`.
        data: the same split.
        label: the class.
    """
    number = data.classes.index(label)
    stages, shown = list(found), []
    means: list[tuple[float, float]] = []
    samples = (data[i] for i in range(len(data)))
    true_boxes = {sample.image_id: sample.boxes[sample.labels == number].double() for sample in samples}
    for stage in dict.fromkeys((stages[0], FIRST_LAYER, stages[-1])):
        rows = found[stage].boxes
        by_image: dict[int, list[dict[str, Any]]] = {image: [] for image in true_boxes}
        for row in sorted(rows, key=lambda row: -row["score"]):
            if row["category_id"] == data.category_ids[number]:
                by_image[row["image_id"]].append(row)
        images = []
        for image, boxes in true_boxes.items():
            xywh = torch.tensor([row["bbox"] for row in by_image[image]], dtype=torch.float64).view(-1, 4)
            iou = box_iou(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1), boxes)
            images.append((iou, np.array([row["score"] for row in by_image[image]])))
        hint = "sort the detections of all images together by their scores; then ten thresholds, 0.5 to 0.95"
        answer = called(function, (images,), hint)
        if answer is None:
            return CheckResult(False)
        expected = average_precision(truth, rows, "box").per_class[label]
        shown.append(stage)
        problem = difference(answer, expected)
        if isinstance(answer, int | float):
            means.append((float(answer), expected))
        if problem is None:
            continue
        picture = draw_bars(list(map(short_name, shown)), *zip(*means, strict=True), "AP") if means else None
        mistakes = {
            "AP is in percent": expected / 100,
            "this is AP at the threshold 0.5 alone": 100
            * float(precision_curves(truth, rows, "box", 0.5)[number].mean()),
        }
        known = (text for text, then in mistakes.items() if difference(answer, then) is None)
        return wrong(function, f"{stage}: {next(known, problem)}", hint, picture)
    return right(function, f"gives {', '.join(f'{ap:.1f} at {s}' for (_, ap), s in zip(means, shown, strict=True))}")
