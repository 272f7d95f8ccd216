"""The interface of the compiled extension that Deformable-DETR-like projects import, on this package's kernels."""

import sys
from types import ModuleType

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ms_deform_attn.functional import gradients, ms_deform_attn

NAME = "MultiScaleDeformableAttention"

# Those projects keep the shapes of the levels in a tensor on the GPU and pass the same tensor to every layer. Copying
# it to the host makes the GPU wait, so it is done once per tensor; the version counter shows whether it has changed.
_host_shapes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _shapes(value_spatial_shapes: Tensor) -> list[tuple[int, int]]:
    if value_spatial_shapes.is_inference():  # it has no version counter, so it is copied at every call
        return [(h, w) for h, w in value_spatial_shapes.tolist()]
    known = _host_shapes.get(value_spatial_shapes)
    if known is None or known[0] != value_spatial_shapes._version:
        known = (value_spatial_shapes._version, [(h, w) for h, w in value_spatial_shapes.tolist()])
        _host_shapes[value_spatial_shapes] = known
    return known[1]


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """The forward function of the extension.

    Args:
        value: (B, N, heads, D).
        value_spatial_shapes: (levels, 2), (h, w) of each level.
        value_level_start_index: (levels,), not read: it follows from the shapes.
        sampling_locations: (B, Q, heads, levels, points, 2).
        attention_weights: (B, Q, heads, levels, points).
        im2col_step: images computed at a time by the original kernel, not read: any batch size works.

    Returns:
        (B, Q, heads·D).
    """
    return ms_deform_attn(value, _shapes(value_spatial_shapes), sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> list[Tensor]:
    """The backward function of the extension: gradients of value, locations and weights."""
    shapes = _shapes(value_spatial_shapes)
    return list(gradients(grad_output, value, shapes, sampling_locations, attention_weights))


def install_drop_in() -> None:
    """Make `import MultiScaleDeformableAttention` give these functions, in this process.

    Call it before importing Deformable DETR, Mask2Former, MaskDINO, Grounding DINO or other code that wants the
    compiled extension. Whatever extension is installed under that name is hidden, not changed.
    """
    module = ModuleType(NAME, __doc__)
    module.ms_deform_attn_forward = ms_deform_attn_forward
    module.ms_deform_attn_backward = ms_deform_attn_backward
    sys.modules[NAME] = module
