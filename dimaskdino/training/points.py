"""Bilinear sampling of feature maps and masks at points, and PointRend's choice of points."""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from dimaskdino import config


def sample_maps(maps: Float[Tensor, "N C h w"], points: Float[Tensor, "N P 2"]) -> Float[Tensor, "N C P"]:
    """Bilinear values of maps at points (x, y) in [0, 1], zeros outside (align_corners=False)."""
    return _sample_grid(maps, 2 * points - 1)


def _sample_grid(maps: Float[Tensor, "N C h w"], grid: Float[Tensor, "N P 2"]) -> Float[Tensor, "N C P"]:
    """`sample_maps` at points in [−1, 1]."""
    return functional.grid_sample(maps, grid.unsqueeze(1), padding_mode="zeros", align_corners=False).squeeze(2)


def sample_masks(
    masks: UInt8[Tensor, "N H W"], rows: Int[Tensor, " R"], points: Float[Tensor, "R P 2"]
) -> Float[Tensor, "R P"]:
    """Like `sample_maps` for uint8 masks: the mask `rows[r]` at `points[r]`, without copying whole masks."""
    _, H, W = masks.shape
    # with a border of zeros every point has four corners
    padded = functional.pad(masks, (1, 2, 1, 2))
    # (R, P) in pixels of the padded masks, and the pixels left of and above the points
    x = (points[..., 0] * W + 0.5).clamp(0, W + 1)
    y = (points[..., 1] * H + 0.5).clamp(0, H + 1)
    left, above = x.long(), y.long()
    width = padded.shape[2]
    first = rows[:, None] * (padded.shape[1] * width) + above * width + left
    flat = padded.flatten()
    # (R, P): between the two upper corners, between the two lower ones, then between both
    upper = flat[first].float().lerp(flat[first + 1].float(), x - left)
    lower = flat[first + width].float().lerp(flat[first + width + 1].float(), x - left)
    return upper.lerp(lower, y - above)


@torch.no_grad()
def uncertain_points(logits: Float[Tensor, "N h w"], cfg: config.Loss) -> Float[Tensor, "N P 2"]:
    """Points where a mask is most uncertain (small |logit|), mixed with random ones (PointRend, arXiv 1912.08193).

    All masks of a call choose from one set of random points, as all masks of an image are matched at the same points.
    """
    N, P = logits.shape[0], cfg.points
    uncertain = int(cfg.uncertain_fraction * P)
    # (3·P, 2), drawn in [−1, 1], where they are sampled
    candidates = torch.empty(int(cfg.oversample * P), 2, device=logits.device).uniform_(-1, 1)
    # (N, 3·P)
    certainty = _sample_grid(logits.unsqueeze(1), candidates.expand(N, -1, -1)).squeeze(1).abs_()
    # (N, 0.75·P) uncertain points and (N, 0.25·P, 2) random ones
    rows = certainty.topk(uncertain, dim=1, largest=False, sorted=False).indices
    others = torch.rand(P - uncertain, 2, device=logits.device).expand(N, -1, -1)
    return torch.cat([(candidates[rows] + 1) / 2, others], dim=1)
