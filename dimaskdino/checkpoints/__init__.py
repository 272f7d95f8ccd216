"""Load and save models: this kit's files, published checkpoints and published settings."""

from dimaskdino.checkpoints.loader import load_checkpoint
from dimaskdino.checkpoints.model_files import TrainedModel, save_model

__all__ = ["TrainedModel", "load_checkpoint", "save_model"]
