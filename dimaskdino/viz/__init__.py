"""Figures of records and arrays; nothing here trains or runs a model."""

from dimaskdino.viz.curves import draw_precision_recall, first_and_last_layer, layerwise_ap, loss_curves
from dimaskdino.viz.detections import draw_instances, draw_stages
from dimaskdino.viz.instruments import (
    draw_calibration,
    draw_gradient_conflict,
    draw_guidance_rank,
    draw_imbalance_by_group,
    draw_matched_queries,
    draw_selection_recall,
)
from dimaskdino.viz.objects import draw_mean_ious, draw_objects
from dimaskdino.viz.studies import draw_ablation, draw_differences, draw_study_layers
from dimaskdino.viz.tokens import (
    draw_guidance,
    draw_interaction,
    draw_mask_features,
    draw_sampling,
    draw_selection,
    draw_token_maps,
)
from dimaskdino.viz.training import draw_denoising, draw_loss_terms, draw_matching

__all__ = [
    "draw_ablation",
    "draw_calibration",
    "draw_denoising",
    "draw_differences",
    "draw_gradient_conflict",
    "draw_guidance",
    "draw_guidance_rank",
    "draw_imbalance_by_group",
    "draw_instances",
    "draw_interaction",
    "draw_loss_terms",
    "draw_mask_features",
    "draw_matched_queries",
    "draw_matching",
    "draw_mean_ious",
    "draw_objects",
    "draw_precision_recall",
    "draw_sampling",
    "draw_selection",
    "draw_selection_recall",
    "draw_stages",
    "draw_study_layers",
    "draw_token_maps",
    "first_and_last_layer",
    "layerwise_ap",
    "loss_curves",
]
