"""Multi-scale deformable attention in plain PyTorch: the readable version and the oracle of the others."""

import torch
from torch import Tensor
from torch.nn import functional


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinearly sampled values, over all feature levels and points.

    Differentiable through autograd. Half precision is computed in float32, as by the kernels. See
    `ms_deform_attn.ms_deform_attn` for the arguments.
    """
    B, _, heads, D = value.shape
    dtype = value.dtype
    value = value if dtype in (torch.float32, torch.float64) else value.float()
    Q, points = sampling_locations.shape[1], sampling_locations.shape[4]
    per_level = value.split([h * w for h, w in spatial_shapes], dim=1)
    # grid_sample wants (x, y) in [-1, 1], with -1 and 1 at the outer edges of the border cells
    grids = 2 * sampling_locations - 1
    output = value.new_zeros(B * heads, D, Q)
    for level, (height, width) in enumerate(spatial_shapes):
        # (B, h·w, heads, D) -> (B·heads, D, h, w)
        image = per_level[level].permute(0, 2, 3, 1).reshape(B * heads, D, height, width)
        # (B, Q, heads, points, 2) -> (B·heads, Q, points, 2)
        grid = grids[:, :, :, level].transpose(1, 2).reshape(B * heads, Q, points, 2)
        sampled = functional.grid_sample(
            image,
            grid.to(value.dtype),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        # (B, Q, heads, points) -> (B·heads, 1, Q, points)
        weight = attention_weights[:, :, :, level].transpose(1, 2)
        weight = weight.reshape(B * heads, 1, Q, points).to(value.dtype)
        output = output + (sampled * weight).sum(-1)
    # (B·heads, D, Q) -> (B, Q, heads·D)
    return output.view(B, heads * D, Q).transpose(1, 2).contiguous().to(dtype)


def flops(locations_shape: torch.Size, head_dim: int) -> int:
    """Floating-point operations of one forward call: 4 multiply-adds a channel and sample."""
    B, Q, heads, levels, points, _ = locations_shape
    return 2 * 4 * B * Q * heads * levels * points * head_dim
