"""Detections on single images, from any stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dimaskdino.data.coco import Sample
from dimaskdino.data.transforms import resize_image
from dimaskdino.errors import UserError
from dimaskdino.evaluation.layers import chosen_stages
from dimaskdino.modeling import ImageBatch, Instances, Predictions, postprocess
from dimaskdino.modeling.records import Trace
from dimaskdino.training.checkpoint import TrainedModel


def forward_image(
    model: TrainedModel, image: UInt8[Tensor, "3 h w"], trace: bool = False
) -> tuple[Predictions, ImageBatch]:
    """Every stage's predictions for one image, resized as in testing."""
    device = next(model.detector.parameters()).device
    batch = ImageBatch.from_images([resize_image(image, model.config.data.resize)], device)
    with torch.inference_mode():
        return model.detector(batch, trace=trace), batch


def predict_stages(
    model: TrainedModel, image: UInt8[Tensor, "3 h w"], stages: Sequence[str] | None = None
) -> dict[str, Instances]:
    """Detections in one image by stage, at the image's own size, best first.

    Args:
        model: a trained model.
        image: RGB, 0 to 255.
        stages: names of the stages wanted, all if None.

    Raises:
        UserError: the model has no such stage.
    """
    predictions, batch = forward_image(model, image)
    size = (image.shape[-2], image.shape[-1])
    detections = model.config.evaluation.detections
    return {
        name: postprocess(stage, batch.sizes, batch.padded_size, [size], detections)[0]
        for name, stage in chosen_stages(predictions, stages).items()
    }


@dataclass(frozen=True)
class Look:
    """One image as a model saw it: what the figures and explorers draw.

    Attributes:
        sample: the image (3, h, w) with its true objects.
        predictions: every stage, with the trace of the intermediates.
        batch: the model's input, resized and padded.
        classes: class names.
        detections: the most detections of a stage.
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
        """(x, y) relative to the padded input, as the model counts, to pixels of the image."""
        (height, width), (rows, columns) = self.batch.sizes[0], self.batch.padded_size
        h, w = self.sample.image.shape[-2:]
        return points * points.new_tensor([columns / width * w, rows / height * h])


def look_at(model: TrainedModel, sample: Sample) -> Look:
    """Run a model on one image and keep everything."""
    predictions, batch = forward_image(model, sample.image, trace=True)
    return Look(sample, predictions, batch, tuple(model.classes), model.config.evaluation.detections)


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def find_images(paths: list[Path]) -> list[Path]:
    """The image files among paths, folders replaced by the images in them.

    Raises:
        UserError: a path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
        found += inside
    if not found:
        raise UserError(f"no image ({', '.join(IMAGE_SUFFIXES)}) in {', '.join(map(str, paths))}")
    return found
