"""Generalised IoU for the losses and the matching cost."""

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import box_convert

EPSILON = 1e-6


def generalized_iou(a: Float[Tensor, "*#batch 4"], b: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch"]:
    """GIoU (arXiv 1902.09630) of cxcywh boxes that broadcast against each other, 1e-6 added to both divisors."""
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    return overlap / (union + EPSILON) - (hull - union) / (hull + EPSILON)
