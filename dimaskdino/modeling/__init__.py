"""Image in, predictions of every stage out: one file per box of the paper's figure 2.

Section numbers in this package are those of docs/model.md, which says exactly what the model computes.
"""

from dimaskdino.modeling.detector import Detector
from dimaskdino.modeling.postprocess import postprocess
from dimaskdino.modeling.structures import CroppedMasks, ImageBatch, Instances, Predictions, Stage, Targets, Trace

__all__ = [
    "CroppedMasks",
    "Detector",
    "ImageBatch",
    "Instances",
    "Predictions",
    "Stage",
    "Targets",
    "Trace",
    "postprocess",
]
