"""Time, memory and arithmetic of a configuration: `python -m tools.benchmarks.model CONFIG`.

Every measurement runs in its own process, since the peak memory of a process never decreases.
"""

import contextlib
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import ms_deform_attn
import numpy as np
import torch
import tyro
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dimaskdino.config import Config, load_config
from dimaskdino.data.coco import Sample
from dimaskdino.data.dataloader import collate
from dimaskdino.modeling import Detector, ImageBatch, postprocess
from dimaskdino.modeling.precision import autocast
from dimaskdino.training.criterion import criterion
from dimaskdino.training.optimizer import build_optimizer
from dimaskdino.training.trainer import arrange
from tools.benchmarks.record import report

Task = Literal["inference", "training"]
PRODUCTS = {  # names in a profile on the CPU
    "aten::mkldnn_convolution",
    "aten::_slow_conv2d_forward",
    "aten::_slow_conv2d_backward",
    "aten::convolution_backward",
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
}


@dataclass(frozen=True)
class Timing:
    """Time and memory of one configuration on one task.

    Attributes:
        seconds: median over the repetitions; `fastest` and `slowest` beside it.
        images: number of images per repetition.
        images_per_second: images / median.
        precision, compiled, parts_per_step: as `train.precision`, `train.compile` and `train.accumulate` were.
        graphs: whether the whole detector was compiled, and replayed as a CUDA graph.
        synchronisations: number of times the CPU waited for the device in one repetition (CUDA).
        kernels: number of kernels and copies on the device in one repetition (CUDA).
        busy_seconds: the part of a repetition that they take together (CUDA); where it is much shorter than `seconds`,
            the device waits for the CPU to launch them.
        peak_memory_gib: of the process (CPU) or of the device's allocations (CUDA).
        gflop: floating-point operations of one repetition; deformable attention is included where its compiled kernels
            run.
        product_seconds: the part of a repetition that convolutions, matrix products and attention take, on the CPU.
        operator: the deformable-attention implementation.
        parts: seconds per part: medians of further repetitions that synchronise at the borders between parts. Empty for
            a compiled model, which would be compiled once more with the clocks in it.
    """

    task: Task
    height: int
    width: int
    seconds: float
    fastest: float
    slowest: float
    images: int
    images_per_second: float
    precision: str
    compiled: bool
    graphs: bool
    parts_per_step: int
    synchronisations: int | None
    kernels: int | None
    busy_seconds: float | None
    peak_memory_gib: float
    gflop: float | None
    product_seconds: float | None
    parameters: int
    device: str
    threads: int
    torch: str
    operator: str
    parts: dict[str, float]


def synthetic_sample(height: int, width: int, objects: int, classes: int, seed: int = 0) -> Sample:
    """A noise image with ellipses as objects."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[0:height, 0:width]
    masks = np.zeros((objects, height, width), np.uint8)
    for mask in masks:
        cx, cy = rng.uniform(0.2, 0.8, 2) * (width, height)
        rx, ry = rng.uniform(0.05, 0.25, 2) * (width, height)
        mask[((xx - cx) / rx) ** 2 + ((yy - cy) / ry) ** 2 <= 1] = 1
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, classes, objects))
    return Sample(image, labels, torch.from_numpy(masks), 0, "synthetic", (height, width))


def measure(
    config: Config,
    task: Task,
    height: int,
    width: int,
    objects: int,
    repeat: int,
    images: int = 1,
    graphs: bool = False,
) -> Timing:
    """Time a task on synthetic images with random weights, after warming up.

    `train.precision`, `train.compile`, `train.checkpoint_activations` and, in training, `train.accumulate` apply as in
    a real run, except for the loss scale of fp16.
    """
    detector, device, run = prepare(config, task, height, width, objects, images)
    if graphs:
        detector.compile(mode="reduce-overhead")
    for _ in range(3 if graphs else 1):  # a CUDA graph is recorded in the second repetition
        run()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    clocks, compiled = [], config.train.compile or graphs
    for _ in range(0 if compiled else repeat):
        with PartClock(detector, device) as clock:
            run(clock)
        clocks.append(clock.seconds)
    kernels = device_kernels(run) if device.type == "cuda" else None
    parts = {name: statistics.median(seconds[name] for seconds in clocks) for name in (clocks[0] if clocks else ())}
    return Timing(
        task=task,
        height=height,
        width=width,
        seconds=statistics.median(times),
        fastest=min(times),
        slowest=max(times),
        images=images,
        images_per_second=images / statistics.median(times),
        precision=config.train.precision,
        compiled=config.train.compile,
        graphs=graphs,
        parts_per_step=config.train.accumulate if task == "training" else 1,
        synchronisations=_count_synchronisations(run) if device.type == "cuda" else None,
        kernels=None if kernels is None else len(kernels),
        busy_seconds=None if kernels is None else sum(kernels),
        peak_memory_gib=_peak_memory(device),
        gflop=None if compiled else count_gflop(run),
        product_seconds=None if compiled or device.type != "cpu" else product_seconds(run),
        parameters=sum(p.numel() for p in detector.parameters()),
        device=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        operator=ms_deform_attn.status(),
        parts=parts,
    )


def prepare(
    config: Config, task: Task, height: int, width: int, objects: int, images: int = 1
) -> tuple[Detector, torch.device, "Run"]:
    """A detector with random weights, its device, and a function that does a task once on synthetic images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    detector = Detector(config.model.without_backbone_weights()).to(device)
    arrange(detector, config)
    samples = [synthetic_sample(height, width, objects, config.model.classes, seed) for seed in range(images)]
    return detector, device, (_training if task == "training" else _inference)(config, detector, device, samples)


def _count_synchronisations(run: Callable[[], Any]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # not the remark that this mode is a prototype
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


class PartClock:
    """Seconds spent in each part of a detector, without the time of other parts that it calls.

    Synchronises the device at every border between parts, so the sum exceeds an undisturbed run.
    """

    def __init__(self, detector: Detector, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._running, self._since = device, ["other"], time.perf_counter()
        self._hooks = []
        for name, child in detector.named_children():
            for module in child if isinstance(child, nn.ModuleList) else [child]:
                self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.enter(name)))
                self._hooks.append(module.register_forward_hook(lambda *_: self.leave()))

    def _switch(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        now, part = time.perf_counter(), self._running[-1]
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    def enter(self, part: str) -> None:
        """Start counting time for a part."""
        self._switch()
        self._running.append(part)

    def leave(self) -> None:
        """Return to the previous part."""
        self._switch()
        self._running.pop()

    def __enter__(self) -> "PartClock":
        self._since = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._switch()
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of this block for a part."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()


class _NoClock:
    def part(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


Run = Callable[..., Any]


def _inference(config: Config, detector: Detector, device: torch.device, samples: Sequence[Sample]) -> Run:
    images = [sample.image for sample in samples]
    sizes = [sample.original_size for sample in samples]
    detector.eval()

    def run(clock: PartClock | _NoClock = _NoClock()) -> Any:  # noqa: B008
        with torch.inference_mode():
            batch = ImageBatch.from_images(images, device)
            with autocast(device, config.train.precision):
                last = detector(batch).last
            with clock.part("postprocess"):
                return postprocess(last, batch.sizes, batch.padded_size, sizes, config.evaluation.detections)

    return run


def _training(config: Config, detector: Detector, device: torch.device, samples: Sequence[Sample]) -> Run:
    size = -(-len(samples) // config.train.accumulate)
    pieces = [collate(samples[i : i + size]) for i in range(0, len(samples), size)]
    objects = sum(len(sample.labels) for sample in samples)
    optimizer = build_optimizer(detector, config.optimizer)
    detector.train()

    def run(clock: PartClock | _NoClock = _NoClock()) -> None:  # noqa: B008
        for piece in pieces:
            targets = piece.targets.to(device)
            with autocast(device, config.train.precision):
                predictions = detector(ImageBatch.from_images(piece.images, device), targets)
            with clock.part("matching and losses"):
                total = criterion(predictions, targets, config.loss, objects).total
            with clock.part("backward"):
                total.backward()
        with clock.part("clipping and optimizer"):
            torch.nn.utils.clip_grad_norm_(detector.parameters(), config.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def count_gflop(run: Callable[[], Any]) -> float:
    """Floating-point operations of a call in units of 10⁹; a multiply-add counts as two."""

    def forward(value: Any, shapes: Any, location: Any, attention: Any, **_: Any) -> int:
        return ms_deform_attn.flops(torch.Size(location), value[3])

    def backward(gradient: Any, value: Any, shapes: Any, location: Any, *_: Any, **__: Any) -> int:
        return 2 * ms_deform_attn.flops(torch.Size(location), value[3])  # as of a product: for each of its factors

    operators = torch.ops.ms_deform_attn
    custom = {operators.forward: forward, operators.backward: backward}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        run()
    return counter.get_total_flops() / 1e9


def product_seconds(run: Callable[[], Any]) -> float:
    """Seconds that a call spends in the kernels of convolutions, matrix products and attention, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    return sum(kernel.self_cpu_time_total for kernel in profiled.key_averages() if kernel.key in PRODUCTS) / 1e6


def device_kernels(run: Callable[[], Any]) -> list[float]:
    """Seconds of every kernel and copy that a call runs on an NVIDIA GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.time_range.elapsed_us() / 1e6 for event in events]


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(
    config: tyro.conf.Positional[Path],
    overrides: tyro.conf.Positional[tuple[str, ...]] = (),
    task: Literal["inference", "training", "all"] = "all",
    size: tuple[int, int] | None = None,
    images: int = 1,
    objects: int = 7,
    repeat: int = 5,
    graphs: bool = False,
    backend: Annotated[Literal["auto", "reference"], tyro.conf.arg(help="deformable-attention operator")] = "auto",
    output: Path | None = None,
) -> None:
    """Measure inference (800x1088 by default) and a training step (512x512 by default) of a configuration.

    Args:
        config: YAML file.
        overrides: Settings that differ, key=value.
        task: What to measure.
        size: Height and width of the images.
        images: Number of images per repetition; a training step splits them into train.accumulate parts.
        objects: Number of objects per image.
        repeat: Number of repetitions after the warm-up; the median is reported.
        graphs: Compile the whole detector, and replay it as a CUDA graph: for inference at one size.
        backend: Deformable-attention operator.
        output: File to append the results to, one line of json each.
    """
    if task == "all":
        for one in ("inference", "training"):
            arguments = [*sys.argv[1:], "--task", one]
            subprocess.run([sys.executable, "-m", "tools.benchmarks.model", *arguments], check=True)
        return
    ms_deform_attn.set_backend(backend)
    height, width = size or ((800, 1088) if task == "inference" else (512, 512))
    result = measure(load_config(config, overrides), task, height, width, objects, repeat, images, graphs)
    gflop = f", {result.gflop:.0f} GFLOP" if result.gflop else ""
    how = f"{result.precision}{', compiled' * result.compiled}{', CUDA graph' * result.graphs}"
    print(
        f"{config.stem}, {task}, {images} of {height}x{width}, {how}: {result.seconds:.2f} s (from "
        f"{result.fastest:.2f} to {result.slowest:.2f}, {repeat} times), {result.images_per_second:.2f} images/s, "
        f"peak {result.peak_memory_gib:.1f} GiB{gflop}, {result.parameters / 1e6:.1f} M parameters; "
        f"{result.device}, {result.threads} threads, torch {result.torch}, {result.operator}"
    )
    whole = sum(result.parts.values())
    for name, seconds in sorted(result.parts.items(), key=lambda part: -part[1]):
        print(f"  {name:<24}{seconds:7.3f} s {100 * seconds / whole:5.1f} %")
    report({"config": config.stem, **asdict(result)}, output, show=False)


if __name__ == "__main__":
    tyro.cli(main)
