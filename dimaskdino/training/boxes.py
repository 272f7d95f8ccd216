"""Generalised IoU for the losses and the matching cost."""

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import box_convert

EPSILON = 1e-6


def generalized_iou(a: Float[Tensor, "*#batch 4"], b: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch"]:
    """GIoU (arXiv 1902.09630) of cxcywh boxes that broadcast against each other, 1e-6 added to both divisors."""
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")
    overlap = _area((torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0))
    union = _area(a[..., 2:] - a[..., :2]) + _area(b[..., 2:] - b[..., :2]) - overlap
    hull = _area((torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0))
    return overlap / (union + EPSILON) - (hull - union) / (hull + EPSILON)


def _area(size: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch"]:
    """Width times height. The gradient of `prod` would make the host ask the GPU whether a factor is zero."""
    return size[..., 0] * size[..., 1]
