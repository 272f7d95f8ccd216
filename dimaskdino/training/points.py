"""Bilinear sampling of feature maps and masks at points, and PointRend's choice of points."""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from dimaskdino import config


def sample_maps(maps: Float[Tensor, "N C h w"], points: Float[Tensor, "N P 2"]) -> Float[Tensor, "N C P"]:
    """Bilinear values of maps at points (x, y) in [0, 1], zeros outside (align_corners=False)."""
    grid = 2 * points.unsqueeze(1) - 1
    return functional.grid_sample(maps, grid, padding_mode="zeros", align_corners=False).squeeze(2)


def sample_masks(
    masks: UInt8[Tensor, "N H W"], rows: Int[Tensor, " R"], points: Float[Tensor, "R P 2"]
) -> Float[Tensor, "R P"]:
    """Like `sample_maps` for uint8 masks: the mask `rows[r]` at `points[r]`, without copying whole masks."""
    _, H, W = masks.shape
    x, y = points[..., 0] * W - 0.5, points[..., 1] * H - 0.5
    x0, y0 = x.floor(), y.floor()
    flat, start = masks.flatten(), (rows * (H * W))[:, None]
    values = torch.zeros_like(x)
    for cx, wx in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
        for cy, wy in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
            inside = (cx >= 0) & (cx < W) & (cy >= 0) & (cy < H)
            index = cy.clamp(0, H - 1).long() * W + cx.clamp(0, W - 1).long()
            values += wx * wy * inside * flat[start + index]
    return values


@torch.no_grad()
def uncertain_points(logits: Float[Tensor, "N h w"], settings: config.Loss) -> Float[Tensor, "N P 2"]:
    """Points where a mask is most uncertain (small |logit|), mixed with random ones (PointRend, arXiv 1912.08193)."""
    N, P = logits.shape[0], settings.points
    candidates = torch.rand(N, int(settings.oversample * P), 2, device=logits.device)
    certainty = sample_maps(logits.unsqueeze(1), candidates).squeeze(1).abs()
    uncertain = int(settings.uncertain_fraction * P)
    rows = certainty.topk(uncertain, dim=1, largest=False, sorted=False).indices
    chosen = candidates.gather(1, rows.unsqueeze(-1).expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(N, P - uncertain, 2, device=logits.device)], dim=1)
