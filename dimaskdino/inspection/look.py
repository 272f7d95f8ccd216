"""One image as a model saw it: every stage, the paper's intermediates, and the places of its input in the image."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dimaskdino.checkpoints import TrainedModel
from dimaskdino.data.coco import Sample
from dimaskdino.data.transforms import resize_image
from dimaskdino.evaluation.layerwise_ap import chosen_stages
from dimaskdino.modeling import ImageBatch, Instances, Predictions, postprocess
from dimaskdino.modeling.structures import Trace


@dataclass(frozen=True)
class Look:
    """One image as a model saw it, for figures and explorers.

    Attributes:
        sample: the image (3, h, w) with its true objects, if known.
        predictions: every stage, with the trace of the intermediates.
        batch: the model's input, resized and padded.
        classes: class names.
        detections: largest number of detections per stage.
    """

    sample: Sample
    predictions: Predictions
    batch: ImageBatch
    classes: tuple[str, ...]
    detections: int

    @property
    def trace(self) -> Trace:
        assert self.predictions.trace is not None
        return self.predictions.trace

    def instances(self, stage: str) -> Instances:
        """Detections of a stage at the image's own size, best first."""
        size = (self.sample.image.shape[-2], self.sample.image.shape[-1])
        chosen = chosen_stages(self.predictions, [stage])[stage]
        return postprocess(chosen, self.batch.sizes, self.batch.padded_size, [size], self.detections)[0]

    def pixels(self, points: Float[Tensor, "... 2"]) -> Float[Tensor, "... 2"]:
        """Convert (x, y) relative to the padded input, as in the predictions, to pixels of the image."""
        (height, width), (rows, columns) = self.batch.sizes[0], self.batch.padded_size
        h, w = self.sample.image.shape[-2:]
        return points * points.new_tensor([columns / width * w, rows / height * h])


def look_at(model: TrainedModel, sample: Sample) -> Look:
    """Run a model on one image, resized as in testing, with the trace."""
    batch = ImageBatch.from_images([resize_image(sample.image, model.config.data.resize)], model.device)
    predictions = model.forward(batch, trace=True)
    return Look(sample, predictions, batch, tuple(model.classes), model.config.evaluation.detections)
