"""Checks of the exercises: each runs a student's function and explains what is wrong with the result."""

from dimaskdino.course.checks.ablations import check_settings, check_unpaired, check_verdicts
from dimaskdino.course.checks.bato import (
    check_cross_attention,
    check_guided_tokens,
    check_mask_probability,
    check_own_share,
)
from dimaskdino.course.checks.coco_weights import check_best_queries
from dimaskdino.course.checks.de_imbalance import check_mask_to_box, check_recall, check_second_selection, check_select
from dimaskdino.course.checks.deformable_attention import check_attended, check_bilinear, check_samples
from dimaskdino.course.checks.detr import check_attend, check_cheapest_assignment, check_corners
from dimaskdino.course.checks.evaluation import (
    check_average_precision,
    check_interpolated,
    check_precision_recall,
    check_right_ones,
)
from dimaskdino.course.checks.imbalance import check_best_detections, check_box_iou, check_imbalance, check_mask_iou
from dimaskdino.course.checks.training import (
    check_cheapest,
    check_dice_loss,
    check_giou,
    check_matching_cost,
    check_training_step,
)
from dimaskdino.course.checks.verdicts import CheckResult, other_cases
from dimaskdino.course.checks.your_photographs import check_annotation, check_gate, check_gated_module

__all__ = [
    "CheckResult",
    "check_annotation",
    "check_attend",
    "check_attended",
    "check_average_precision",
    "check_best_detections",
    "check_best_queries",
    "check_bilinear",
    "check_box_iou",
    "check_cheapest",
    "check_cheapest_assignment",
    "check_corners",
    "check_cross_attention",
    "check_dice_loss",
    "check_gate",
    "check_gated_module",
    "check_giou",
    "check_guided_tokens",
    "check_imbalance",
    "check_interpolated",
    "check_mask_iou",
    "check_mask_probability",
    "check_mask_to_box",
    "check_matching_cost",
    "check_own_share",
    "check_precision_recall",
    "check_recall",
    "check_right_ones",
    "check_samples",
    "check_second_selection",
    "check_select",
    "check_settings",
    "check_training_step",
    "check_unpaired",
    "check_verdicts",
    "other_cases",
]
