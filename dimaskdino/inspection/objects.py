"""Single objects through the stages: how well their boxes and masks are predicted, and by which query."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from dimaskdino.data.coco import Sample
from dimaskdino.inspection.look import Look
from dimaskdino.modeling import Instances
from dimaskdino.modeling.structures import SelectedTokens


@dataclass(frozen=True)
class ObjectTrack:
    """The best detection of each object at each stage.

    Attributes:
        stages: names of the S stages.
        box_iou: (S, M) IoU of the detection's box with the object's; 0 where nothing of its class was detected.
        mask_iou: (S, M) likewise; NaN at the stages without masks.
        detection: (S, M) row among the stage's detections; −1 where nothing was detected.
    """

    stages: tuple[str, ...]
    box_iou: Float[Tensor, "S M"]
    mask_iou: Float[Tensor, "S M"]
    detection: Int[Tensor, "S M"]


def mask_iou(a: Bool[Tensor, "n h w"], b: Bool[Tensor, "m h w"]) -> Float[Tensor, "n m"]:
    """Intersection over union of every pair of masks; 0 for two empty ones."""
    a, b = a.flatten(1).float(), b.flatten(1).float()
    shared = a @ b.T
    return shared / (a.sum(1)[:, None] + b.sum(1) - shared).clamp(min=1)


def track_objects(look: Look, stages: Sequence[str] | None = None, threshold: float = 0.0) -> ObjectTrack:
    """Find the best detection of each object at each stage.

    It is the detection of the object's class with the largest sum of box IoU and mask IoU (box IoU alone at stages
    without masks) among those with a score of at least `threshold`. Two objects may share one.
    """
    names = tuple(look.predictions.stages if stages is None else stages)
    found = [_best(look.instances(name), look.sample, threshold) for name in names]
    box, mask, row = (torch.stack(column) for column in zip(*found, strict=True))
    return ObjectTrack(names, box, mask, row)


def _best(found: Instances, truth: Sample, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Box IoU, mask IoU and row (M,) of the best detection of each object."""
    M = len(truth.labels)
    allowed = (found.labels[:, None] == truth.labels) & (found.scores >= threshold)[:, None]
    box = box_iou(found.boxes, truth.boxes)
    mask = torch.full_like(box, torch.nan)
    if found.query_masks is not None:
        mask = mask_iou(found.query_masks.whole(), truth.masks.bool())[found.mask_index]
    merit = torch.where(allowed, box + mask.nan_to_num(), -1.0)
    if not len(merit) or not M:
        return torch.zeros(M), torch.zeros(M), torch.full((M,), -1)
    value, row = merit.max(0)
    missed = value < 0
    picked = [x.gather(0, row[None])[0].masked_fill(missed, 0) for x in (box, mask)]
    return picked[0], picked[1], row.masked_fill(missed, -1)


def token_owners(look: Look, tokens: SelectedTokens | None = None) -> Tensor:
    """(k,) the object on whose mask the centre of each token lies, the smallest if there are several; −1 for none.

    Args:
        look: an image with its objects.
        tokens: the tokens of a selection; all feature tokens by default.
    """
    masks = look.sample.masks
    centres = look.trace.T_i.centres()
    places = look.pixels(centres if tokens is None else centres[tokens.indices[0]]).long()
    x, y = places[:, 0].clamp(0, masks.shape[-1] - 1), places[:, 1].clamp(0, masks.shape[-2] - 1)
    inside = masks[:, y, x].bool()
    area = masks.flatten(1).sum(1)
    owner = torch.full((len(x),), -1)
    for number in area.argsort(descending=True).tolist():
        owner[inside[number]] = number
    return owner


def box_owners(look: Look, boxes: Float[Tensor, "n 4"]) -> Tensor:
    """(n,) the object whose box has the largest IoU with each box; −1 if no IoU reaches 0.5.

    Args:
        look: an image with its objects.
        boxes: cxcywh in [0, 1] of the padded input, as in the stages.
    """
    if not len(look.sample.labels):
        return torch.full((len(boxes),), -1)
    corners = look.pixels(box_convert(boxes, "cxcywh", "xyxy").view(-1, 2, 2)).flatten(1)
    overlap, owner = box_iou(corners, look.sample.boxes).max(1)
    return owner.masked_fill(overlap < 0.5, -1)
