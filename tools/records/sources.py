"""What the numbers of README and docs are made from: the records in measurements/, and the models of the course."""

import json
from pathlib import Path
from typing import Any

from dimaskdino.evaluation.layerwise_ap import LayerwiseAP

ROOT = Path(__file__).parents[2]
MEASUREMENTS = ROOT / "docs" / "measurements"
MODELS = {"MaskDINO": "maskdino", "DI-MaskDINO": "dimaskdino"}


def measured(name: str) -> dict[str, Any]:
    """A record in measurements/."""
    return json.loads((MEASUREMENTS / name).read_text())


def course_models() -> dict[str, LayerwiseAP]:
    """AP of the two models that come with the course."""
    folder = ROOT / "notebooks" / "models"
    return {name: LayerwiseAP.load(folder / run / "evaluation" / "layers.json") for name, run in MODELS.items()}
