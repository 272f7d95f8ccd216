"""Detections as `supervision` has them, for its annotators, trackers and metrics (the extra `supervision`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dimaskdino.modeling import Instances
from dimaskdino.utils.errors import UserError


def to_supervision(instances: Instances, classes: Sequence[str]) -> Any:
    """Convert detections to `supervision.Detections`.

    Args:
        instances: detections in one image, xyxy in pixels.
        classes: class names, by class index.

    Raises:
        UserError: supervision is not installed.
    """
    try:
        import supervision
    except ImportError:
        raise UserError("to_supervision needs supervision: pip install 'dimaskdino[supervision]'") from None
    labels = instances.labels.cpu().numpy()
    return supervision.Detections(
        xyxy=instances.boxes.float().cpu().numpy(),
        mask=None if instances.query_masks is None else instances.masks.cpu().numpy(),
        confidence=instances.scores.float().cpu().numpy(),
        class_id=labels,
        data={"class_name": np.array([classes[label] for label in labels], dtype=str)},
    )
