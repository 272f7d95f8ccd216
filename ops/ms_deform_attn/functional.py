"""The operator, its choice of backend and its registration with torch.library."""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from ms_deform_attn.build import library_path, problem
from ms_deform_attn.reference import ms_deform_attn_reference

Backend = Literal["auto", "reference", "cpu", "cuda", "triton"]

_ARGUMENTS = "Tensor value, SymInt[] shapes, Tensor location, Tensor attention"


def register(forward: str, backward: str) -> None:
    """Define a pair of operators with fake kernels and autograd; their kernels are registered elsewhere.

    `forward` and `backward` are the compiled kernels, with one implementation for CPU tensors and one for CUDA tensors.
    The Triton kernels are a pair of their own, so that both can be loaded and compared in one process.
    """
    torch.library.define(f"ms_deform_attn::{forward}", f"({_ARGUMENTS}) -> Tensor")
    torch.library.define(
        f"ms_deform_attn::{backward}",
        f"(Tensor grad_output, {_ARGUMENTS}, bool need_value, bool need_samples) -> (Tensor, Tensor, Tensor)",
    )

    @torch.library.register_fake(f"ms_deform_attn::{forward}")
    def _(value: Tensor, shapes: list[int], location: Tensor, attention: Tensor) -> Tensor:
        return value.new_empty(value.shape[0], location.shape[1], value.shape[2] * value.shape[3])

    @torch.library.register_fake(f"ms_deform_attn::{backward}")
    def _(grad_output, value, shapes, location, attention, need_value, need_samples):
        needs = ((value, need_value), (location, need_samples), (attention, need_samples))
        return tuple(x.new_empty(x.shape if needed else 0) for x, needed in needs)

    def save_inputs(ctx, inputs, output) -> None:
        value, ctx.shapes, location, attention = inputs
        ctx.save_for_backward(value, location, attention)

    def differentiate(ctx, grad_output: Tensor):
        value, location, attention = ctx.saved_tensors
        need_value, _, need_location, need_attention = ctx.needs_input_grad
        need_samples = need_location or need_attention
        to_value, to_location, to_attention = getattr(torch.ops.ms_deform_attn, backward)(
            grad_output, value, ctx.shapes, location, attention, need_value, need_samples
        )
        return (
            to_value if need_value else None,
            None,
            to_location if need_location else None,
            to_attention if need_attention else None,
        )

    torch.library.register_autograd(f"ms_deform_attn::{forward}", differentiate, setup_context=save_inputs)


register("forward", "backward")
register("triton_forward", "triton_backward")

_backend: Backend = "auto"


@functools.cache
def _loaded(device: Literal["cpu", "cuda"]) -> bool:
    """Whether the compiled kernels can be used, which are loaded if they have been built; says why if they cannot."""
    path = library_path(device)
    if path is None or not os.path.exists(path):
        return False
    try:
        reason = problem(path)
        if reason is None:
            torch.ops.load_library(str(path))
            return True
    except OSError as error:
        reason = f"{path} cannot be loaded ({error.__cause__ or error}); delete it"
    advice = "run 'python -m ms_deform_attn build'; until then slower kernels run"
    print(f"ms_deform_attn: {reason}; {advice}", file=sys.stderr)
    return False


@functools.cache
def _triton_loaded() -> bool:
    """Whether Triton is there, whose kernels are registered if so."""
    if importlib.util.find_spec("triton") is None:
        return False
    from ms_deform_attn import triton_kernels  # noqa: F401  registers the kernels

    return True


def _missing(name: Backend) -> str | None:
    """What stands in the way of a backend, or None."""
    if name in ("cpu", "cuda") and not _loaded(name):
        return f"the {name.upper()} kernels are not built: run 'python -m ms_deform_attn build'"
    if name == "triton" and not _triton_loaded():
        return "Triton is not installed: run 'pip install triton'"
    return None


def available(name: Backend) -> bool:
    """Whether a backend is built or installed; it need not fit this machine's devices."""
    return _missing(name) is None


def set_backend(name: Backend) -> None:
    """Choose the implementation for all later calls.

    Args:
        name: `auto` (the fastest that is available for the tensors' device), `reference` (plain PyTorch), `cpu` or
            `cuda` (the compiled kernels) or `triton`.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend is not built or not installed; the message says what to run.
    """
    global _backend
    if name not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, not {name!r}")
    if name == "auto" or _missing(name):
        _loaded.cache_clear()  # the kernels may have been built since
    if problem := _missing(name):
        raise RuntimeError(problem)
    _backend = name


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """`set_backend` for the duration of a `with` block."""
    global _backend
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        _backend = before  # it was available; looking again for kernels would cost more than a small call


@torch.compiler.assume_constant_result
def _chosen(device: str) -> Backend:
    """The backend of a call on `device` ("cpu", "cuda", …), `auto` resolved."""
    if _backend != "auto":
        return _backend
    if device == "cpu" and _loaded("cpu"):
        return "cpu"
    if device == "cuda":
        return "cuda" if _loaded("cuda") else "triton" if _triton_loaded() else "reference"
    return "reference"


def status(device: str | None = None) -> str:
    """One line: the implementation in use, and how to get a faster one.

    Args:
        device: "cpu" or "cuda"; without it, the GPU where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = _chosen(device)
    names = {"reference": "PyTorch reference", "triton": "Triton kernels"}
    line = f"ms_deform_attn: {names.get(chosen, f'compiled {chosen.upper()} kernels')}"
    if _backend != "auto":
        return f"{line}, as chosen by set_backend({_backend!r})"
    if chosen not in ("cpu", "cuda"):
        compiler = " (needs nvcc)" if device == "cuda" else ""
        return f"{line}; for the faster kernels run 'python -m ms_deform_attn build'{compiler}"
    return line


def _kernels(value: Tensor) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor, Tensor]]] | None:
    """The registered forward and backward of the backend for a tensor; None stands for the reference."""
    device = value.device.type
    chosen = _chosen(device)
    if chosen == "reference":
        return None
    if chosen == "triton":
        if device != "cuda" and not os.environ.get("TRITON_INTERPRET"):
            raise RuntimeError(f"backend 'triton' needs a GPU (or TRITON_INTERPRET=1), but value is on {value.device}")
        return torch.ops.ms_deform_attn.triton_forward, torch.ops.ms_deform_attn.triton_backward
    if device != chosen:
        raise RuntimeError(f"backend {chosen!r} was chosen but value is on {value.device}")
    return torch.ops.ms_deform_attn.forward, torch.ops.ms_deform_attn.backward


def _check(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4:
        raise ValueError(f"value must be (B, N, heads, D), got {tuple(value.shape)}")
    B, N, heads, _ = value.shape
    levels = len(shapes)
    for number, (h, w) in enumerate(shapes, start=1):
        if h < 1 or w < 1:
            raise ValueError(f"level {number} of spatial_shapes is {(h, w)}; each side must be at least 1")
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
    (`align_corners=False`). A location that is infinite or not a number contributes nothing. Differentiable once with
    respect to the three tensors. (Deformable DETR, arXiv 2010.04159, Eq. 3)

    Args:
        value: (B, N, heads, D), the projected feature tokens, level after level.
        spatial_shapes: (h, w) of each level, in that order; their cells add up to N. A tensor (levels, 2) is copied to
            the host, which makes a GPU wait: give the numbers where they are known.
        sampling_locations: (B, Q, heads, levels, points, 2), (x, y) in [0, 1] of each level's width and height.
        attention_weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, heads·D), in the dtype of `value`. Half precision is accumulated in float32, and locations are best kept
        in float32: bfloat16 cannot tell neighbouring cells of a large level apart.

    Raises:
        ValueError: a shape or device that does not fit; the message names the argument.
        TypeError: an argument that is not floating point.
        RuntimeError: the chosen backend cannot run on the tensors' device.
    """
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    shapes = [(h, w) for h, w in spatial_shapes]
    _check(value, shapes, sampling_locations, attention_weights)
    kernels = _kernels(value)
    if kernels is None:
        return ms_deform_attn_reference(value, shapes, sampling_locations, attention_weights)
    flat = [size for shape in shapes for size in shape]
    return kernels[0](value, flat, sampling_locations, attention_weights)


def gradients(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights for a gradient of the output (B, Q, heads·D), without a forward pass.

    For code with a backward pass of its own; `ms_deform_attn` is differentiable without it.
    """
    shapes = list(spatial_shapes)
    tensors = value, sampling_locations, attention_weights
    _check(value, shapes, sampling_locations, attention_weights)
    kernels = _kernels(value)
    if kernels is None:
        with torch.enable_grad():
            value, locations, weights = (x.detach().requires_grad_() for x in tensors)
            output = ms_deform_attn_reference(value, shapes, locations, weights)
            return torch.autograd.grad(output, (value, locations, weights), grad_output)
    flat = [size for shape in shapes for size in shape]
    return kernels[1](grad_output, value, flat, sampling_locations, attention_weights, True, True)
