"""Detections as `fiftyone` has them, for its app and its evaluation (the extra `fiftyone`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dimaskdino.modeling import Instances
from dimaskdino.utils.errors import UserError


def to_fiftyone(instances: Instances, classes: Sequence[str], size: tuple[int, int]) -> Any:
    """Convert detections to `fiftyone.Detections`.

    Boxes become [x, y, width, height] relative to the image, and each mask is cut to the pixels of its box.

    Args:
        instances: detections in one image, xyxy in pixels.
        classes: class names, by class index.
        size: (h, w) of the image.

    Raises:
        UserError: fiftyone is not installed.
    """
    try:
        import fiftyone
    except ImportError:
        raise UserError("to_fiftyone needs fiftyone: pip install 'dimaskdino[fiftyone]'") from None
    height, width = size
    masks = None if instances.query_masks is None else instances.masks.cpu().numpy()
    detections = []
    rows = zip(instances.boxes.tolist(), instances.labels.tolist(), instances.scores.tolist(), strict=True)
    for number, ((x0, y0, x1, y1), label, score) in enumerate(rows):
        detections.append(
            fiftyone.Detection(
                label=classes[label],
                bounding_box=[x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height],
                confidence=score,
                mask=None if masks is None else _inside(masks[number], (x0, y0, x1, y1)),
            )
        )
    return fiftyone.Detections(detections=detections)


def _inside(mask: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """The part of a mask (h, w) in the pixels that a box touches, at least one of them."""
    x0, y0 = (int(np.floor(value)) for value in box[:2])
    x1, y1 = (int(np.ceil(value)) for value in box[2:])
    x0, y0 = min(x0, mask.shape[1] - 1), min(y0, mask.shape[0] - 1)
    return mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
