"""Image in, predictions of every stage out: one file for each box of the paper's figure 2."""

from dimaskdino.modeling.detector import Detector
from dimaskdino.modeling.postprocess import Instances, postprocess
from dimaskdino.modeling.records import ImageBatch, Predictions, Stage, Targets, Trace

__all__ = ["Detector", "ImageBatch", "Instances", "Predictions", "Stage", "Targets", "Trace", "postprocess"]
