"""The kernels in Triton, which comes with PyTorch: for GPUs on machines without nvcc.

A program computes BLOCK_Q queries of one head. Values are masked, not clamped, at the border of a level. With
TRITON_INTERPRET=1 in the environment before this module is imported they run on the CPU, slowly, for tests. The
numbers of levels and points are constants of a kernel: a model has one or two pairs of them, and the interpreter of
Triton 3.6 cannot loop up to a number that it reads with NumPy 2.4.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_Q = 32


@triton.jit
def _position(location, i, mask, width, height, acc_type: tl.constexpr):
    """Of sample i: the cell left above (x0, y0), the position between the cells, and whether it reads anything."""
    x = tl.load(location + 2 * i, mask=mask, other=-2.0).to(acc_type) * width - 0.5
    y = tl.load(location + 2 * i + 1, mask=mask, other=-2.0).to(acc_type) * height - 0.5
    # NaN fails every comparison; values that fail are replaced before the conversion to integer
    inside = (x > -1.0) & (y > -1.0) & (x < width) & (y < height)
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top, inside


@triton.jit
def _forward(
    value, levels, location, attention, output,
    N, Q, heads, level_count: tl.constexpr, points: tl.constexpr, D, blocks,
    acc_type: tl.constexpr, block_q: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head, b = (program // blocks) % heads, program // blocks // heads
    q = program % blocks * block_q + tl.arange(0, block_q)
    d = tl.arange(0, block_d)
    row = heads * D
    cells = value + b * N * row + head * D
    first = ((b * Q + q) * heads + head) * level_count * points
    acc = tl.zeros([block_q, block_d], acc_type)
    for level in range(level_count):
        height, width = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for point in range(points):
            i = first + level * points + point
            x0, y0, dx, dy, inside = _position(location, i, q < Q, width, height, acc_type)
            weight = tl.load(attention + i, mask=inside, other=0.0).to(acc_type)
            for corner in tl.static_range(4):
                x, y = x0 + corner % 2, y0 + corner // 2
                part_x = dx if corner % 2 else 1.0 - dx
                part_y = dy if corner // 2 else 1.0 - dy
                reads = inside & (x >= 0) & (y >= 0) & (x < width) & (y < height)
                offset = (start + y * width + x).to(tl.int64) * row
                cell = tl.load(
                    cells + offset[:, None] + d[None, :], mask=reads[:, None] & (d < D)[None, :], other=0.0
                ).to(acc_type)
                acc += (part_x * part_y * weight)[:, None] * cell
    to = output + ((b * Q + q) * heads + head)[:, None] * D + d[None, :]
    tl.store(to, acc.to(output.dtype.element_ty), mask=(q < Q)[:, None] & (d < D)[None, :])


@triton.jit
def _backward(
    grad_output, value, levels, location, attention, grad_value, grad_location, grad_attention,
    N, Q, heads, level_count: tl.constexpr, points: tl.constexpr, D, blocks,
    acc_type: tl.constexpr, block_q: tl.constexpr, block_d: tl.constexpr,
    need_value: tl.constexpr, need_samples: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head, b = (program // blocks) % heads, program // blocks // heads
    q = program % blocks * block_q + tl.arange(0, block_q)
    d = tl.arange(0, block_d)
    row = heads * D
    first_cell = b * N * row + head * D
    bqh = (b * Q + q) * heads + head
    grad = tl.load(grad_output + bqh[:, None] * D + d[None, :], mask=(q < Q)[:, None] & (d < D)[None, :], other=0.0).to(
        acc_type
    )
    for level in range(level_count):
        height, width = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for point in range(points):
            i = bqh * level_count * points + level * points + point
            x0, y0, dx, dy, inside = _position(location, i, q < Q, width, height, acc_type)
            weight = tl.load(attention + i, mask=inside, other=0.0).to(acc_type)
            to_weight = tl.zeros([block_q], acc_type)
            to_x = tl.zeros([block_q], acc_type)
            to_y = tl.zeros([block_q], acc_type)
            for corner in tl.static_range(4):
                x, y = x0 + corner % 2, y0 + corner // 2
                part_x = dx if corner % 2 else 1.0 - dx
                part_y = dy if corner // 2 else 1.0 - dy
                reads = inside & (x >= 0) & (y >= 0) & (x < width) & (y < height)
                offset = first_cell + (start + y * width + x).to(tl.int64)[:, None] * row + d[None, :]
                mask = reads[:, None] & (d < D)[None, :]
                if need_samples:
                    cell = tl.load(value + offset, mask=mask, other=0.0).to(acc_type)
                    dot = tl.sum(grad * cell, axis=1)
                    to_weight += part_x * part_y * dot
                    to_x += (part_y if corner % 2 else -part_y) * dot
                    to_y += (part_x if corner // 2 else -part_x) * dot
                if need_value:
                    tl.atomic_add(
                        grad_value + offset, (part_x * part_y * weight)[:, None] * grad, mask=mask, sem="relaxed"
                    )
            if need_samples:
                tl.store(grad_attention + i, to_weight, mask=q < Q)
                tl.store(grad_location + 2 * i, to_x * weight * width, mask=q < Q)
                tl.store(grad_location + 2 * i + 1, to_y * weight * height, mask=q < Q)


@functools.lru_cache(maxsize=64)
def _levels(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """(levels, 3) int32: height, width and first token of each level. Kept, for copying it makes the GPU wait."""
    starts = [0]
    for height, width in zip(shapes[::2], shapes[1::2], strict=True):
        starts.append(starts[-1] + height * width)
    rows = list(zip(shapes[::2], shapes[1::2], starts[:-1], strict=True))
    return torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 3)


def _launch(value: Tensor, location: Tensor) -> tuple[tuple[int], tuple[int, ...], dict]:
    """Grid, sizes and constants that both kernels take."""
    B, N, heads, D = value.shape
    Q, levels, points = location.shape[1], location.shape[3], location.shape[4]
    blocks = triton.cdiv(Q, BLOCK_Q)
    acc_type = tl.float64 if value.dtype == torch.float64 else tl.float32
    constants = {"acc_type": acc_type, "block_q": BLOCK_Q, "block_d": triton.next_power_of_2(D)}
    return (B * heads * blocks,), (N, Q, heads, levels, points, D, blocks), constants


def _forward_kernel(value: Tensor, shapes: list[int], location: Tensor, attention: Tensor) -> Tensor:
    grid, sizes, constants = _launch(value, location)
    output = value.new_empty(value.shape[0], location.shape[1], value.shape[2] * value.shape[3])
    if output.numel():
        levels = _levels(tuple(shapes), value.device)
        tensors = value.contiguous(), levels, location.contiguous(), attention.contiguous(), output
        with torch.cuda.device_of(value):
            _forward[grid](*tensors, *sizes, **constants)
    return output


def _backward_kernel(
    grad_output: Tensor,
    value: Tensor,
    shapes: list[int],
    location: Tensor,
    attention: Tensor,
    need_value: bool,
    need_samples: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if need_value and value.is_cuda and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(
            "the Triton backward of ms_deform_attn adds in no fixed order; for a deterministic one run "
            "'python -m ms_deform_attn build' (needs nvcc) and use the CUDA kernels"
        )
    grid, sizes, constants = _launch(value, location)
    acc_type = torch.float64 if value.dtype == torch.float64 else torch.float32
    grads = (
        torch.zeros(value.shape if need_value else 0, dtype=acc_type, device=value.device),
        torch.zeros(location.shape if need_samples else 0, dtype=acc_type, device=value.device),
        torch.zeros(attention.shape if need_samples else 0, dtype=acc_type, device=value.device),
    )
    if grad_output.numel():
        levels = _levels(tuple(shapes), value.device)
        inputs = grad_output.contiguous(), value.contiguous(), levels, location.contiguous(), attention.contiguous()
        with torch.cuda.device_of(value):
            _backward[grid](*inputs, *grads, *sizes, **constants, need_value=need_value, need_samples=need_samples)
    return tuple(g.to(x.dtype) for g, x in zip(grads, (value, location, attention), strict=True))


torch.library.impl("ms_deform_attn::triton_forward", ("CUDA", "CPU"), _forward_kernel)
torch.library.impl("ms_deform_attn::triton_backward", ("CUDA", "CPU"), _backward_kernel)
