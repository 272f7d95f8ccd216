"""Chapter 1: the imbalance, intersection over union, and objects through the stages."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from dimaskdino.course.checks.pictures import draw_bars
from dimaskdino.course.checks.verdicts import (
    CheckResult,
    box_pairs,
    called,
    compared,
    difference,
    random,
    right,
    wrong,
)
from dimaskdino.inspection.look import Look
from dimaskdino.inspection.objects import mask_iou, track_objects
from dimaskdino.modeling.stages import short_name

LEAST_SCORE = 0.3  # of the detections that are followed


def check_imbalance(function: Callable[[float, float], float]) -> CheckResult:
    """How far detection lags behind segmentation, in points of AP."""
    cases = [(31.0, 35.5), (40.0, 38.0), (0.0, 0.0)]
    return compared(function, cases, lambda box, mask: mask - box, "positive where the mask AP is higher")


def check_box_iou(function: Callable[[Tensor, Tensor], Tensor]) -> CheckResult:
    """Intersection over union of two boxes, xyxy, as a number."""
    return compared(
        function,
        box_pairs(),
        lambda a, b: float(box_iou(a[None], b[None])),
        "the intersection runs from the larger of the two left ends to the smaller of the two right ends, and is empty "
        "when that is negative",
    )


def check_mask_iou(function: Callable[[Tensor, Tensor], Tensor]) -> CheckResult:
    """Intersection over union of two masks (h, w) bool, as a number."""
    cases = [(random(6, 7, seed=i) > 0.5, random(6, 7, seed=i + 10) > 0.3) for i in range(3)]
    expected = lambda a, b: float(mask_iou(a[None], b[None]))  # noqa: E731
    return compared(function, cases, expected, "pixels in both, divided by pixels in at least one")


def check_best_detections(function: Callable[..., tuple[Tensor, Tensor]], looks: Sequence[Look]) -> CheckResult:
    """To build: how well every object of real images is detected at each stage with masks.

    Args:
        function: the student's, from (boxes (n, 4), masks (n, h, w), labels (n,), true_boxes (M, 4), true_masks
            (M, h, w), true_labels (M,)) to the IoUs (M,) of boxes and of masks.
        looks: images and what the model made of them.
    """
    hint = "for each object: of the detections with its label the one with the largest box IoU + mask IoU"
    stages = [name for name, stage in looks[0].predictions.stages.items() if stage.has_masks]
    for image, look in enumerate(looks, start=1):
        true = (look.sample.boxes, look.sample.masks.bool(), look.sample.labels)
        track = track_objects(look, stages, LEAST_SCORE)
        for stage, *expected in zip(stages, track.box_iou, track.mask_iou, strict=True):
            found = look.instances(stage)
            sure = found.scores >= LEAST_SCORE
            boxes, masks, labels = found.boxes[sure], found.masks[sure], found.labels[sure]
            answer = called(function, (boxes, masks, labels, *true), hint)
            if answer is None:
                return CheckResult(False)
            problem = difference(answer, tuple(expected))
            if problem is None:
                continue
            if len(labels):
                problem = _mistake(answer, boxes, masks, labels, *true) or problem
            picture = None
            if isinstance(answer, tuple | list) and all(getattr(x, "shape", None) == true[2].shape for x in answer):
                names = [f"object {i + 1}" for i in range(len(true[2]))]
                picture = draw_bars(names, answer[0].tolist(), expected[0].tolist(), f"box IoU, {short_name(stage)}")
            return wrong(function, f"image {image}, {stage}: {problem}", hint, picture)
    return right(function, f"follows the objects of {len(looks)} images through {len(stages)} stages")


def _mistake(
    answer: Any, boxes: Tensor, masks: Tensor, labels: Tensor, true_boxes: Tensor, true_masks: Tensor, true: Tensor
) -> str | None:
    """Which frequent mistake gives this answer."""
    box, mask, own = box_iou(boxes, true_boxes), mask_iou(masks, true_masks), labels[:, None] == true
    of_class = tuple(x.where(own, 0.0) for x in (box, mask))
    mistakes = {
        "detections of other classes were chosen, too": _picked(box, mask, box + mask),
        "both are 0 if no detection has the class": _picked(box, mask, torch.where(own, box + mask, -1.0)),
        "chosen by the box IoU alone": _picked(*of_class, torch.where(own, box, -1.0)),
        "box and mask are those of two detections": tuple(x.amax(0) for x in of_class),
    }
    return next((text for text, then in mistakes.items() if difference(answer, then) is None), None)


def _picked(box: Tensor, mask: Tensor, merit: Tensor) -> tuple[Tensor, Tensor]:
    """IoUs (M,) of the detections of most merit, from (n, M) of each."""
    rows = merit.argmax(0, keepdim=True)
    return box.gather(0, rows)[0], mask.gather(0, rows)[0]
