"""A model and data small enough to train in a test."""

from pathlib import Path

import torch

from dimaskdino import config
from dimaskdino.checkpoints import save_model
from dimaskdino.config import Config, load_config
from dimaskdino.data.shapes import CLASSES, generate
from dimaskdino.modeling import Detector

FILE = Path(__file__).parent.parent / "configs" / "shapes" / "dimaskdino_r18.yaml"
MODEL = (
    "model.backbone.width=8",  # or resume points would take 135 MB
    "model.hidden_dim=32",
    "model.pixel_decoder.layers=1",
    "model.pixel_decoder.ffn_dim=32",
    "model.selection.k=[20, 12]",
    "model.decoder.layers=2",
    "model.decoder.ffn_dim=32",
    "model.bato.guiding_tokens=4",
    "model.denoising.queries=6",
)
RUN = (
    "loss.points=64",
    "data.jitter.size=64",
    "data.resize.shortest=64",
    "data.resize.longest=64",
    "data.workers=0",
    "schedule.steps=6",
    "schedule.drops=[5]",
    "schedule.warmup=2",
    "train.batch_size=2",
    "train.checkpoint_every=2",
    "train.log_every=1",
    "train.trackers=[]",  # TensorBoard takes a second or two to import
)


def shapes_folder(root: Path, val: int = 4) -> Path:
    """12 training and 4 validation images of 64x64 pixels."""
    generate(root, config.Shapes(train=12, val=val, size=64), processes=0)
    return root


def overrides(data: Path, *changes: str) -> list[str]:
    return [*MODEL, *RUN, f"data.root={data}", "data.shapes=null", *changes]


def settings(data: Path, *changes: str) -> Config:
    return load_config(FILE, overrides(data, *changes))


def trained_file(path: Path, data: Path, *changes: str) -> Path:
    """A small model with random weights, as a file that `load_model` reads."""
    torch.manual_seed(0)
    settings = load_config(FILE, [*MODEL, *RUN, f"data.root={data}", *changes])
    save_model(path, Detector(settings.model), settings, list(CLASSES[: settings.model.classes]), 0)
    return path
