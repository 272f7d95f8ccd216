"""Figures of records and arrays; nothing here trains or runs a model."""

from dimaskdino.viz.curves import layerwise_ap, loss_curves
from dimaskdino.viz.detections import draw_instances, draw_stages

__all__ = ["draw_instances", "draw_stages", "layerwise_ap", "loss_curves"]
