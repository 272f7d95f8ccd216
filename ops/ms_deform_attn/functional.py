"""The operator, its choice of backend and its registration with torch.library."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from ms_deform_attn.build import library_path
from ms_deform_attn.reference import ms_deform_attn_reference

Backend = Literal["auto", "reference", "cpu"]

torch.library.define(
    "ms_deform_attn::forward", "(Tensor value, int[] shapes, Tensor location, Tensor attention) -> Tensor"
)
torch.library.define(
    "ms_deform_attn::backward",
    "(Tensor grad_output, Tensor value, int[] shapes, Tensor location, Tensor attention) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("ms_deform_attn::forward")
def _(value: Tensor, shapes: list[int], location: Tensor, attention: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], location.shape[1], value.shape[2] * value.shape[3])


@torch.library.register_fake("ms_deform_attn::backward")
def _(grad_output: Tensor, value: Tensor, shapes: list[int], location: Tensor, attention: Tensor):
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in (value, location, attention))


def _save_inputs(ctx, inputs, output) -> None:
    value, ctx.shapes, location, attention = inputs
    ctx.save_for_backward(value, location, attention)


def _differentiate(ctx, grad_output: Tensor):
    value, location, attention = ctx.saved_tensors
    grads = torch.ops.ms_deform_attn.backward(grad_output, value, ctx.shapes, location, attention)
    return grads[0], None, grads[1], grads[2]


torch.library.register_autograd("ms_deform_attn::forward", _differentiate, setup_context=_save_inputs)

_backend: Backend = "auto"
_cpu_kernels_loaded: bool | None = None  # None: not looked for yet


def _cpu_kernels() -> bool:
    """Whether the compiled CPU kernels can be used.

    Looked for once, not at every call, since the key of a build hashes files.
    """
    global _cpu_kernels_loaded
    if _cpu_kernels_loaded is None:
        path = library_path()
        _cpu_kernels_loaded = path.exists()
        if _cpu_kernels_loaded:
            torch.ops.load_library(str(path))
    return _cpu_kernels_loaded


def set_backend(name: Backend) -> None:
    """Choose the implementation for all later calls.

    Args:
        name: `auto` (the fastest that is available for the tensors' device), `reference` (plain PyTorch) or `cpu`
            (the compiled kernels).

    Raises:
        RuntimeError: `cpu` is asked for but the kernels are not built.
    """
    global _backend, _cpu_kernels_loaded
    if name not in ("auto", "reference", "cpu"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'cpu', not {name!r}")
    _cpu_kernels_loaded = _cpu_kernels_loaded or None  # they may have been built since
    if name == "cpu" and not _cpu_kernels():
        raise RuntimeError("the CPU kernels are not built: run 'python -m ms_deform_attn build'")
    _backend = name


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """`set_backend` for the duration of a `with` block."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def status() -> str:
    """One line: the implementation in use on the CPU, and how to get a faster one."""
    if _backend != "reference" and _cpu_kernels():
        return "ms_deform_attn: compiled CPU kernels"
    if _backend == "reference":
        return "ms_deform_attn: PyTorch reference, as chosen by set_backend('reference')"
    return "ms_deform_attn: PyTorch reference; for the faster kernels run 'python -m ms_deform_attn build'"


def _check(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4:
        raise ValueError(f"value must be (B, N, heads, D), got {tuple(value.shape)}")
    B, N, heads, _ = value.shape
    levels = len(shapes)
    if sum(h * w for h, w in shapes) != N:
        raise ValueError(f"spatial_shapes {shapes} have {sum(h * w for h, w in shapes)} cells, value has N = {N}")
    if locations.ndim != 6 or locations.shape[0] != B or locations.shape[2:4] != (heads, levels):
        raise ValueError(
            f"sampling_locations must be (B={B}, Q, heads={heads}, levels={levels}, points, 2), "
            f"got {tuple(locations.shape)}"
        )
    if locations.shape[5] != 2:
        raise ValueError(f"sampling_locations must end in 2 (x, y), got {tuple(locations.shape)}")
    if weights.shape != locations.shape[:5]:
        raise ValueError(f"attention_weights must be {tuple(locations.shape[:5])}, got {tuple(weights.shape)}")
    for name, tensor in (("value", value), ("sampling_locations", locations), ("attention_weights", weights)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}")


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention: for each query and head, the weighted sum of sampled values.

    Values are sampled bilinearly, with zeros outside a level and cell centres at (i + 0.5) / size
    (`align_corners=False`). A location that is not a number contributes nothing.

    Args:
        value: (B, N, heads, D), the projected feature tokens, level after level.
        spatial_shapes: (h, w) of each level, in that order; their cells add up to N.
        sampling_locations: (B, Q, heads, levels, points, 2), (x, y) in [0, 1] of each level's width and height.
        attention_weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, heads·D), in the dtype of `value`.

    Raises:
        ValueError: a shape or device that does not fit; the message names the argument.
        TypeError: an argument that is not floating point.
    """
    shapes = [(int(h), int(w)) for h, w in spatial_shapes]
    _check(value, shapes, sampling_locations, attention_weights)
    if value.device.type == "cpu" and _backend != "reference" and _cpu_kernels():
        flat = [size for shape in shapes for size in shape]
        return torch.ops.ms_deform_attn.forward(value, flat, sampling_locations, attention_weights)
    if _backend == "cpu":
        raise RuntimeError(f"backend 'cpu' was chosen but value is on {value.device}")
    return ms_deform_attn_reference(value, shapes, sampling_locations, attention_weights)
