"""Figures of records and arrays; nothing here trains or runs a model."""

from dimaskdino.viz.architecture import draw_architecture, draw_flow
from dimaskdino.viz.curves import plot_first_and_last_layer, plot_layerwise_ap, plot_losses, plot_precision_recall
from dimaskdino.viz.detections import draw_beside_truth, draw_instances, draw_samples, draw_stages
from dimaskdino.viz.diagnostics import (
    plot_calibration,
    plot_gradient_conflict,
    plot_guidance_rank,
    plot_imbalance_by_group,
    plot_matched_queries,
    plot_selection_recall,
)
from dimaskdino.viz.error_analysis import plot_confusion, plot_error_analysis
from dimaskdino.viz.objects import draw_object_stages, draw_objects, plot_mean_ious
from dimaskdino.viz.studies import plot_ablation, plot_differences, plot_study_layers, study_figures
from dimaskdino.viz.tokens import (
    draw_guidance,
    draw_interaction,
    draw_mask_features,
    draw_sampling,
    draw_selection,
    draw_token_maps,
)
from dimaskdino.viz.training import draw_denoising, draw_matching, plot_loss_terms, plot_trainings

__all__ = [
    "draw_architecture",
    "draw_beside_truth",
    "draw_denoising",
    "draw_flow",
    "draw_guidance",
    "draw_instances",
    "draw_interaction",
    "draw_mask_features",
    "draw_matching",
    "draw_object_stages",
    "draw_objects",
    "draw_samples",
    "draw_sampling",
    "draw_selection",
    "draw_stages",
    "draw_token_maps",
    "plot_ablation",
    "plot_calibration",
    "plot_confusion",
    "plot_differences",
    "plot_error_analysis",
    "plot_first_and_last_layer",
    "plot_gradient_conflict",
    "plot_guidance_rank",
    "plot_imbalance_by_group",
    "plot_layerwise_ap",
    "plot_loss_terms",
    "plot_losses",
    "plot_matched_queries",
    "plot_mean_ious",
    "plot_precision_recall",
    "plot_selection_recall",
    "plot_study_layers",
    "plot_trainings",
    "study_figures",
]
