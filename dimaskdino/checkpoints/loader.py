"""The loader of trained models, whatever their format."""

from collections.abc import Iterable
from pathlib import Path

import torch

from dimaskdino import config
from dimaskdino.checkpoints.catalogue import find_model
from dimaskdino.checkpoints.model_files import TrainedModel, load_model_file
from dimaskdino.checkpoints.published import load_published

PUBLISHED_SUFFIXES = (".pth", ".pkl")


def load_checkpoint(
    source: str | Path,
    device: torch.device | str = "cpu",
    overrides: Iterable[str] = (),
    settings: config.Config | None = None,
) -> TrainedModel:
    """Load a trained model of this kit or a published checkpoint, in evaluation mode.

    Args:
        source: run folder, `model.safetensors`, resume point (`.pt`), a published `.pth` or `.pkl`, or the name of a
            model (`dimaskdino models`), which is downloaded if it does not ship with the kit.
        device: the device to load to.
        overrides: `key=value` settings that differ from those stored with the model, such as `data.root=my/data`.
        settings: the configuration that a published checkpoint was trained with; by default inferred from the weights.

    Raises:
        UserError: the file is missing, truncated, or does not fit its configuration, or the model cannot be downloaded.
    """
    path = find_model(source)
    if path.suffix in PUBLISHED_SUFFIXES:
        trained, _ = load_published(path, overrides, settings)
    else:
        trained = load_model_file(path, overrides)
    trained.detector.to(device)
    return trained
