"""Detections on single images, from any stage."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from dimaskdino.data.transforms import resize_image
from dimaskdino.errors import UserError
from dimaskdino.evaluation.layers import chosen_stages
from dimaskdino.modeling import ImageBatch, Instances, Predictions, postprocess
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
