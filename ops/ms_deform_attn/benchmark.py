"""Measure the operator: `python -m ms_deform_attn.benchmark`.

Builds what can be built, compares every implementation with a float64 reference, then times them side by side: one
call of each in turn, many rounds, medians. The module of transformers takes part where it is installed. So do on a GPU
the original kernel of Deformable DETR, as the source distribution of mmcv carries it, with --mmcv FOLDER, deformops
where it is installed, and other versions of the kernels' source with --kernels NAME=FILE:

    git show HEAD~1:ops/ms_deform_attn/csrc/cuda.cu > build/before.cu
    python -m ms_deform_attn.benchmark --kernels before=build/before.cu
"""

import argparse
import json
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ms_deform_attn import backend, build, ms_deform_attn, ms_deform_attn_reference
from ms_deform_attn.build import cache_folder, compiler, prepare
from ms_deform_attn.functional import available, register

LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))  # of an image of 800 × 1333 pixels
HEADS, HEAD_DIM, POINTS = 8, 32, 4
SLEEP_CYCLES = 2_000_000  # of a GPU, about a millisecond
OFFSET = 2.0  # standard deviation of a sample's distance from its query's own cell, in cells

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
QueryKind = Literal["encoder", "decoder"]  # the feature cells themselves, or 300


@dataclass(frozen=True)
class Workload:
    """A call's sizes and where it samples."""

    queries: QueryKind
    locations: Literal["near", "uniform"]  # around the query's own place, or anywhere
    batch: int
    dtype: Literal["float32", "bfloat16"]

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Value (B, N, heads, D), locations (B, Q, heads, levels, points, 2), weights (B, Q, heads, levels, points)."""
        g = torch.Generator().manual_seed(0)
        cells = torch.cat([_cell_centres(h, w) for h, w in LEVELS])
        centres = cells if self.queries == "encoder" else torch.rand(300, 2, generator=g)
        samples = (self.batch, len(centres), HEADS, len(LEVELS), POINTS)
        if self.locations == "near":
            sizes = torch.tensor([[w, h] for h, w in LEVELS])[:, None]
            locations = centres[:, None, None, None] + OFFSET * torch.randn(*samples, 2, generator=g) / sizes
        else:
            locations = torch.rand(*samples, 2, generator=g)
        locations = _away_from_borders(locations)
        weights = torch.rand(samples, generator=g).flatten(-2).softmax(-1).view(samples)
        value = torch.randn(self.batch, len(cells), HEADS, HEAD_DIM, generator=g)
        dtype = getattr(torch, self.dtype)
        # as the model calls it: locations and weights stay float32 when the values are bfloat16
        return value.to(device, dtype), locations.to(device), weights.to(device)


@dataclass(frozen=True)
class Row:
    """What was measured for one workload and direction."""

    workload: Workload
    direction: Literal["forward", "forward+backward"]
    milliseconds: dict[str, float]  # median, by implementation
    floor_ms: float  # see `_floor`
    error: dict[str, float]  # largest deviation from float64, relative to the largest number, by implementation


def _cell_centres(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


def _away_from_borders(locations: Tensor) -> Tensor:
    """Keep samples at least 0.01 cells away from the lines between cell centres.

    There the gradient of a location jumps, and float32 rounds some samples to the other side than float64.
    """
    sizes = torch.tensor([[w, h] for h, w in LEVELS])[:, None]
    position = locations * sizes - 0.5
    return (position.floor() + (position - position.floor()).clamp(0.01, 0.99) + 0.5) / sizes


def _own(name: str) -> Function:
    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        with backend(name):
            return ms_deform_attn(value, LEVELS, locations, weights)

    return run


def _original_extension(mmcv: Path) -> Any:
    """The kernel of Deformable DETR, compiled from mmcv's sources."""
    from torch.utils import cpp_extension

    binding = Path(__file__).parent / "csrc" / "benchmark_original.cpp"
    sources = mmcv / "mmcv" / "ops" / "csrc"
    # cusparse.h and others, from pip's packages; after the toolkit's own, whose version may be another
    headers = sorted((Path(torch.__file__).parent.parent / "nvidia").glob("*/include"))
    return cpp_extension.load(
        name="ms_deform_attn_original",
        sources=[str(binding), str(sources / "pytorch" / "cuda" / "ms_deform_attn_cuda.cu")],
        extra_include_paths=[str(sources / folder) for folder in ("common", "common/cuda", "pytorch")],
        extra_cflags=[f"-idirafter{folder}" for folder in headers],
        extra_cuda_cflags=[x for folder in headers for x in ("-Xcompiler", f"-idirafter,{folder}")],
        extra_ldflags=prepare("cuda"),
    )


def _original(mmcv: Path) -> Function:
    """The kernel of Deformable DETR; it has no bfloat16, so that is cast to float32."""
    extension = _original_extension(mmcv)
    shapes, starts = _shape_tensors()

    class Original(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            ctx.save_for_backward(value, locations, weights)
            return extension.forward(value.float(), shapes, starts, locations, weights.float(), 64).to(value.dtype)

        @staticmethod
        def backward(ctx, grad_output: Tensor):
            value, locations, weights = ctx.saved_tensors
            tensors = value.float(), locations, weights.float()
            grads = [torch.zeros_like(x) for x in tensors]
            extension.backward(tensors[0], shapes, starts, *tensors[1:], grad_output.float().contiguous(), *grads, 64)
            return tuple(g.to(x.dtype) for g, x in zip(grads, (value, locations, weights), strict=True))

    return Original.apply


def _deformops() -> Function:
    from deformops.registry import msda

    shapes, starts = _shape_tensors()
    return lambda value, locations, weights: msda(value, shapes, starts, locations, weights.flatten(-2).to(value.dtype))


def _transformers(device: str) -> Function:
    """The module of transformers' Deformable DETR, which Mask2Former has too; bfloat16 is cast to float32.

    Its locations would be rounded to bfloat16 too, and lie in other cells.
    """
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    module, (shapes, starts) = MultiScaleDeformableAttention(), _shape_tensors(device)
    return lambda value, locations, weights: module(
        value.float(), shapes, list(LEVELS), starts, locations, weights, 64
    ).to(value.dtype)


def _other_kernels(device: str, name: str, source: Path) -> Function:
    """Another version of the kernels' source, as operators of its own name."""
    renamed = _renamed(name, source)
    register(f"{name}_forward", f"{name}_backward")
    torch.ops.load_library(str(build(device, source=renamed)))
    operator = getattr(torch.ops.ms_deform_attn, f"{name}_forward")
    flat = [side for shape in LEVELS for side in shape]
    return lambda value, locations, weights: operator(value, flat, locations, weights)


def _renamed(name: str, source: Path) -> Path:
    """A copy of a version's source that registers its kernels under its own name."""
    text = source.read_text()
    for direction in ("forward", "backward"):
        text = text.replace(f'm.impl("{direction}"', f'm.impl("{name}_{direction}"')
    renamed = cache_folder() / "versions" / f"{name}{source.suffix}"
    renamed.parent.mkdir(parents=True, exist_ok=True)
    renamed.write_text(text)
    return renamed


def _build_at_once(device: str, mmcv: Path | None, versions: Mapping[str, Path]) -> None:
    """Compile everything that takes part, each in a process of its own: one takes about a minute on a GPU machine."""
    sources = [None, *(_renamed(name, source) for name, source in versions.items())]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(build, device, source=source) for source in sources]
        if device == "cuda" and mmcv is not None:
            waiting.append(pool.submit(_build_original, mmcv))
        for one in waiting:
            one.result()


def _build_original(mmcv: Path) -> None:
    _original_extension(mmcv)  # which cannot be sent back to another process


def _shape_tensors(device: str = "cuda") -> tuple[Tensor, Tensor]:
    """(levels, 2) shapes and (levels,) first tokens, as the peers want them."""
    shapes = torch.tensor(LEVELS, device=device)
    return shapes, torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])


def _implementations(
    device: str, mmcv: Path | None = None, versions: Mapping[str, Path] = MappingProxyType({})
) -> Iterator[tuple[str, Function]]:
    yield "reference", _own("reference")
    for name in ("cpu",) if device == "cpu" else ("cuda", "triton"):
        if available(name):
            yield name, _own(name)
    for name, source in versions.items():
        yield name, _other_kernels(device, name, source)
    try:
        yield "transformers", _transformers(device)
    except ImportError as error:
        print(f"transformers does not take part: {error}")
    if device == "cuda" and mmcv is not None:
        yield "original", _original(mmcv)
    if device == "cuda":
        try:
            yield "deformops", _deformops()
        except ImportError as error:
            print(f"deformops does not take part: {error}")


def _errors(workload: Workload, device: str, implementations: dict[str, Function]) -> dict[str, dict[str, float]]:
    """Per direction and implementation, the largest deviation from a float64 reference of the same numbers."""
    inputs = workload.inputs(device)
    exact = [x.double().requires_grad_() for x in inputs]
    output = ms_deform_attn_reference(exact[0], list(LEVELS), *exact[1:])
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(device, inputs[0].dtype)
    truth = [output.detach(), *torch.autograd.grad(output, exact, grad_output.double())]
    del output
    found: dict[str, dict[str, float]] = {"forward": {}, "forward+backward": {}}
    for name, function in implementations.items():
        tensors = [x.detach().requires_grad_() for x in inputs]
        output = function(*tensors)
        results = [output.detach(), *torch.autograd.grad(output, tensors, grad_output)]
        errors = [float((r - t).abs().max() / t.abs().max()) for r, t in zip(results, truth, strict=True)]
        found["forward"][name], found["forward+backward"][name] = errors[0], max(errors[1:])
    return found


def _time(calls: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn so that a slow moment of the machine meets all of them.

    On a GPU every timed call follows another of the same implementation, so that each finds its own tensors in the
    caches, whoever came before it; and the GPU is kept busy until the host has queued the whole call, so that it never
    waits for the host.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):  # two to warm up
        for name, call in calls.items():
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                call()
                torch.cuda.synchronize()
                torch.cuda._sleep(SLEEP_CYCLES)
                start.record()
                call()
                end.record()
                end.synchronize()
                taken = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                call()
                taken = 1e3 * (time.perf_counter() - begin)
            if i >= 2:
                times[name].append(taken)
    return {name: statistics.median(t) for name, t in times.items()}


def _bandwidth() -> float:
    """Bytes a second that this machine copies, read and written counted."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    return 1e3 * 2 * source.nbytes / _time({"copy": lambda: target.copy_(source)}, "cpu", 10)["copy"]


def _floor(inputs: tuple[Tensor, ...], direction: str, device: str, bandwidth: float) -> float:
    """A lower bound of the time in milliseconds.

    CPU: every byte of the inputs read once and of the results written once, at the speed of a copy. GPU: the bytes of
    all sampled cells through the L1 caches, 128 a clock and multiprocessor (the backward reads them once more; its
    atomics, which bound it, are not counted).
    """
    value, locations, weights = inputs
    output = locations.shape[0] * locations.shape[1] * HEADS * HEAD_DIM * value.element_size()
    both = direction == "forward+backward"
    if device == "cpu":
        moved = sum(x.nbytes for x in inputs) + output
        return 1e3 * (moved * (3 if both else 1)) / bandwidth
    gathered = weights.numel() * 4 * HEAD_DIM * value.element_size() * (2 if both else 1)
    gpu = torch.cuda.get_device_properties(value.device)
    return 1e3 * gathered / (128 * gpu.multi_processor_count * gpu.clock_rate * 1e3)


def measure(workload: Workload, device: str, implementations: dict[str, Function], rounds: int, bandwidth: float):
    """Yield the rows of a workload: forward, and forward with backward."""
    errors = _errors(workload, device, implementations)
    inputs = workload.inputs(device)
    tensors = [x.requires_grad_() for x in inputs]
    grad_output = torch.ones_like(ms_deform_attn(*tensors[:1], LEVELS, *tensors[1:]))

    def forward(function: Function) -> None:
        with torch.no_grad():
            function(*tensors)

    def both(function: Function) -> None:
        torch.autograd.grad(function(*tensors), tensors, grad_output)

    for direction, run in (("forward", forward), ("forward+backward", both)):
        calls = {name: lambda f=function, run=run: run(f) for name, function in implementations.items()}
        milliseconds = _time(calls, device, rounds)
        floor = _floor(inputs, direction, device, bandwidth)
        yield Row(workload, direction, milliseconds, floor, errors[direction])


def _print(row: Row, base: str) -> None:
    w = row.workload
    label = f"{w.queries:8}{w.locations:8} batch {w.batch}  {w.dtype:9} {row.direction:17}"
    cells = [
        f"{name} {ms:9.3f} ms ({row.milliseconds[base] / ms:5.1f}x, error {row.error[name]:.0e})"
        for name, ms in row.milliseconds.items()
    ]
    print(label, " | ".join(cells), f"| floor {row.floor_ms:.3f} ms", flush=True)


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m ms_deform_attn.benchmark", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=None, help="calls of each implementation (10; on a GPU 50)")
    parser.add_argument("--mmcv", type=Path, help="unpacked source distribution of mmcv, for the original kernel")
    parser.add_argument(
        "--kernels", action="append", default=[], metavar="NAME=FILE", help="another version of the kernels' source"
    )
    parser.add_argument("--queries", choices=get_args(QueryKind), help="only these workloads")
    parser.add_argument("--output", type=Path, help="folder for the results: a JSON file named after the device")
    arguments = parser.parse_args()
    device = arguments.device
    versions = {name: Path(file) for name, _, file in (x.partition("=") for x in arguments.kernels)}
    if compiler(device):
        if versions or arguments.mmcv:
            _build_at_once(device, arguments.mmcv, versions)
        print(f"kernels: {build(device)}")
    rounds = arguments.rounds or (50 if device == "cuda" else 10)
    implementations = dict(_implementations(device, arguments.mmcv, versions))
    base = "original" if "original" in implementations else "reference"
    bandwidth = _bandwidth()
    print(f"{_device_name(device)}, torch {torch.__version__}; medians of {rounds} rounds; times faster than {base}")
    record = {
        "device": _device_name(device),
        "torch": torch.__version__,
        "rounds": rounds,
        "copy_bytes_per_second": bandwidth,
        "versions": {name: str(file) for name, file in versions.items()},
        "rows": [],
    }
    for queries, locations in (("encoder", "near"), ("encoder", "uniform"), ("decoder", "near")):
        if arguments.queries not in (None, queries):
            continue
        for batch in (1, 2):
            for dtype in ("float32", "bfloat16"):
                workload = Workload(queries, locations, batch, dtype)
                for row in measure(workload, device, implementations, rounds, bandwidth):
                    _print(row, base)
                    record["rows"].append(asdict(row))
                    if arguments.output:  # what has been measured survives an interruption
                        arguments.output.mkdir(parents=True, exist_ok=True)
                        name = re.sub(r"[^a-z0-9]+", "_", _device_name(device).lower())
                        (arguments.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
