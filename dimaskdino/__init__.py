"""DI-MaskDINO: joint object detection and instance segmentation, for research and teaching.

    import dimaskdino

    model = dimaskdino.load("dimaskdino-shapes")    # or a run folder, a .safetensors, a published .pth, a hub id
    result = model.predict("photo.jpg")
    result.boxes, result.masks, result.scores, result.class_names
    result.save("out.png")
    seen = model.inspect("photo.jpg")               # every stage and the paper's intermediates by name

The names listed in `__all__` are the public interface. They are imported when they are first used, so that
`import dimaskdino` and the command line's help are fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dimaskdino.config import Config, load_config
    from dimaskdino.evaluation.layerwise_ap import LayerwiseAP, evaluate_layers
    from dimaskdino.inspection.look import Look
    from dimaskdino.model import Model, Result, load
    from dimaskdino.modeling import Detector
    from dimaskdino.training.trainer import train
    from dimaskdino.utils.errors import UserError

__version__ = "0.3.0"

_MODULES = {
    "Config": "config",
    "Detector": "modeling",
    "LayerwiseAP": "evaluation.layerwise_ap",
    "Look": "inspection.look",
    "Model": "model",
    "Result": "model",
    "UserError": "utils.errors",
    "evaluate_layers": "evaluation.layerwise_ap",
    "load": "model",
    "load_config": "config",
    "train": "training.trainer",
}

__all__ = [
    "Config",
    "Detector",
    "LayerwiseAP",
    "Look",
    "Model",
    "Result",
    "UserError",
    "__version__",
    "evaluate_layers",
    "load",
    "load_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dimaskdino' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dimaskdino.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
