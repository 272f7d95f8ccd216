"""Chapter 1: the imbalance, intersection over union, and objects through the stages."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from dimaskdino.course.checks.compare import box_pairs, called, check, compared, expect, random
from dimaskdino.inspection.look import Look
from dimaskdino.inspection.objects import mask_iou, track_objects

LEAST_SCORE = 0.3  # of the detections that are followed


@check("positive where the mask AP is higher")
def check_imbalance(function: Callable[[float, float], float]) -> str:
    """Mask AP − box AP, in points."""
    return compared(function, [(31.0, 35.5), (40.0, 38.0), (0.0, 0.0)], lambda box, mask: mask - box)


@check(
    "the intersection runs from the larger of the two left ends to the smaller of the two right ends; it is empty if "
    "that is negative"
)
def check_box_iou(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Intersection over union of two boxes, xyxy, as a number."""
    return compared(function, box_pairs(), lambda a, b: float(box_iou(a[None], b[None])))


@check("pixels in both, divided by pixels in at least one")
def check_mask_iou(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Intersection over union of two masks (h, w) bool, as a number."""
    cases = [(random(6, 7, seed=i) > 0.5, random(6, 7, seed=i + 10) > 0.3) for i in range(3)]
    return compared(function, cases, lambda a, b: float(mask_iou(a[None], b[None])))


@check("for each object: of the detections with its label the one with the largest box IoU + mask IoU")
def check_best_detections(function: Callable[..., tuple[Tensor, Tensor]], looks: Sequence[Look]) -> str:
    """To build: how well every object of real images is detected at each stage with masks.

    The student's function takes boxes (n, 4), masks (n, h, w) and labels (n,) of detections, then those of the M
    objects, and returns the IoUs (M,) of boxes and of masks.
    """
    stages = [name for name, stage in looks[0].predictions.stages.items() if stage.has_masks]
    for image, look in enumerate(looks, start=1):
        track = track_objects(look, stages, LEAST_SCORE)
        for stage, box, mask in zip(stages, track.box_iou, track.mask_iou, strict=True):
            found = look.instances(stage)
            sure = found.scores >= LEAST_SCORE
            detected = (found.boxes[sure], found.masks[sure], found.labels[sure])
            true = (look.sample.boxes, look.sample.masks.bool(), look.sample.labels)
            answer = called(function, (*detected, *true))
            mistakes = _mistakes(*detected, *true) if sure.any() else {}
            expect(answer, (box, mask), mistakes, where=f"image {image}, {stage}: ")
    return f"the objects of {len(looks)} images at {len(stages)} stages"


def _mistakes(
    boxes: Tensor, masks: Tensor, labels: Tensor, true_boxes: Tensor, true_masks: Tensor, true_labels: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Frequent mistakes and the answers that they lead to."""
    box, mask, own = box_iou(boxes, true_boxes), mask_iou(masks, true_masks), labels[:, None] == true_labels
    own_box, own_mask = box.where(own, 0.0), mask.where(own, 0.0)
    return {
        "box and mask are those of two detections": (own_box.amax(0), own_mask.amax(0)),
        "chosen by the box IoU alone": _picked(own_box, own_mask, torch.where(own, box, -1.0)),
        "both are 0 if no detection has the class": _picked(box, mask, torch.where(own, box + mask, -1.0)),
        "detections of other classes were chosen, too": _picked(box, mask, box + mask),
    }


def _picked(box: Tensor, mask: Tensor, merit: Tensor) -> tuple[Tensor, Tensor]:
    """IoUs (M,) of the detections of most merit, from (n, M) of each."""
    rows = merit.argmax(0, keepdim=True)
    return box.gather(0, rows)[0], mask.gather(0, rows)[0]
