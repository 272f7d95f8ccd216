"""Time, memory and arithmetic of a configuration, for inference or for a training step.

The peak memory of a process never decreases, so each measurement is a command of its own.
"""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import ms_deform_attn
import numpy as np
import torch
import tyro
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tyro.conf import Positional

from dimaskdino.config import Config, load_config
from dimaskdino.data.coco import Sample
from dimaskdino.data.dataloader import collate
from dimaskdino.modeling import Detector, ImageBatch, postprocess
from dimaskdino.modeling.precision import autocast
from dimaskdino.training.criterion import criterion
from dimaskdino.training.optimizer import build_optimizer
from dimaskdino.training.trainer import arrange
from tools.benchmarks.measuring import peak_memory_gib, save

Task = Literal["inference", "training"]
Run = Callable[..., Any]
OBJECTS = 7  # per image, as in COCO


def synthetic_sample(height: int, width: int, classes: int, seed: int = 0) -> Sample:
    """A noise image with ellipses as objects."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[0:height, 0:width]
    masks = np.zeros((OBJECTS, height, width), np.uint8)
    for mask in masks:
        cx, cy = rng.uniform(0.2, 0.8, 2) * (width, height)
        rx, ry = rng.uniform(0.05, 0.25, 2) * (width, height)
        mask[((xx - cx) / rx) ** 2 + ((yy - cy) / ry) ** 2 <= 1] = 1
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, classes, OBJECTS))
    return Sample(image, labels, torch.from_numpy(masks), 0, "synthetic", (height, width))


def prepare(config: Config, task: Task, height: int, width: int, images: int = 1) -> tuple[Detector, torch.device, Run]:
    """A detector with random weights, its device, and a function that does a task once on synthetic images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    detector = Detector(config.model.without_backbone_weights()).to(device)
    arrange(detector, config)
    samples = [synthetic_sample(height, width, config.model.classes, seed) for seed in range(images)]
    return detector, device, (_training if task == "training" else _inference)(config, detector, device, samples)


def measure(
    config: Config, task: Task, height: int, width: int, repeat: int, images: int = 1, graphs: bool = False
) -> dict[str, Any]:
    """Time a task on synthetic images with random weights, after a warm-up.

    `train.precision`, `train.compile`, `train.checkpoint_activations` and, in training, `train.accumulate` apply as in
    a real run, except for the loss scale of fp16.

    Args:
        config: the configuration.
        task: inference, or a training step.
        height: of the images, in pixels.
        width: of the images, in pixels.
        repeat: number of repetitions.
        images: number of images per repetition; a training step splits them into `train.accumulate` parts.
        graphs: compile the whole detector and replay it as a CUDA graph (inference at one size).

    Returns:
        `seconds`: the median, with `fastest` and `slowest` beside it; `images_per_second`: images / median.
        `parts`: median seconds of each part of the model, from further repetitions that synchronise between the parts;
        empty for a compiled model, which would be compiled once more with the clocks in it.
        `peak_memory_gib`: of the process (CPU), or of the device's allocations (CUDA).
        `gflop`: 10⁹ floating-point operations of one repetition; None for a compiled model.
        `kernels`, `busy_seconds`: number and time of the kernels and copies of one repetition; None on a CPU. Where
        `busy_seconds` is much shorter than `seconds`, the device waits for the CPU to launch them.
        The remaining entries describe the task and the machine.
    """
    detector, device, run = prepare(config, task, height, width, images)
    cuda = device.type == "cuda"
    if graphs:
        detector.compile(mode="reduce-overhead")
    for _ in range(3 if graphs else 1):  # a CUDA graph is recorded in the second repetition
        run()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    compiled = config.train.compile or graphs
    parts: dict[str, float] = {}
    if not compiled:
        clocks = []
        for _ in range(repeat):
            with PartClock(detector, device) as clock:
                run(clock.start)
            clocks.append(clock.seconds)
        parts = {name: statistics.median(one[name] for one in clocks) for name in clocks[0]}
    kernels = device_kernels(run) if cuda else []
    return {
        "task": task,
        "height": height,
        "width": width,
        "images": images,
        "seconds": statistics.median(times),
        "fastest": min(times),
        "slowest": max(times),
        "images_per_second": images / statistics.median(times),
        "parts": parts,
        "precision": config.train.precision,
        "compiled": config.train.compile,
        "graphs": graphs,
        "parts_per_step": config.train.accumulate if task == "training" else 1,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else peak_memory_gib(),
        "gflop": None if compiled else count_gflop(run),
        "kernels": len(kernels) if cuda else None,
        "busy_seconds": sum(kernels) if cuda else None,
        "parameters": sum(p.numel() for p in detector.parameters()),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "operator": ms_deform_attn.status(),
    }


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
                self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
                self._hooks.append(module.register_forward_hook(lambda *_: self._leave()))

    def start(self, part: str) -> None:
        """Count the time from here on for a part, except for the time in the detector's modules."""
        self._count()
        self._running[-1] = part

    def _count(self) -> None:
        """Add the time since the last border to the running part."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        now, part = time.perf_counter(), self._running[-1]
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    def _enter(self, part: str) -> None:
        self._count()
        self._running.append(part)

    def _leave(self) -> None:
        self._count()
        self._running.pop()

    def __enter__(self) -> "PartClock":
        self._since = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._count()
        for hook in self._hooks:
            hook.remove()


def _no_clock(part: str) -> None:
    pass


def _inference(config: Config, detector: Detector, device: torch.device, samples: Sequence[Sample]) -> Run:
    images = [sample.image for sample in samples]
    sizes = [sample.original_size for sample in samples]
    detector.eval()

    def run(start: Callable[[str], None] = _no_clock) -> Any:
        with torch.inference_mode():
            batch = ImageBatch.from_images(images, device)
            with autocast(device, config.train.precision):
                last = detector(batch).last
            start("postprocess")
            return postprocess(last, batch.sizes, batch.padded_size, sizes, config.evaluation.detections)

    return run


def _training(config: Config, detector: Detector, device: torch.device, samples: Sequence[Sample]) -> Run:
    size = -(-len(samples) // config.train.accumulate)
    pieces = [collate(samples[i : i + size]) for i in range(0, len(samples), size)]
    objects = sum(len(sample.labels) for sample in samples)
    optimizer = build_optimizer(detector, config.optimizer)
    detector.train()

    def run(start: Callable[[str], None] = _no_clock) -> None:
        for piece in pieces:
            start("other")
            targets = piece.targets.to(device)
            with autocast(device, config.train.precision):
                predictions = detector(ImageBatch.from_images(piece.images, device), targets)
            start("matching and losses")
            total = criterion(predictions, targets, config.loss, objects).total
            start("backward")
            total.backward()
        start("clipping and optimizer")
        torch.nn.utils.clip_grad_norm_(detector.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def count_gflop(run: Run) -> float:
    """Floating-point operations of a call in units of 10⁹; a multiply-add counts as two.

    Deformable attention is included where its compiled kernels run.
    """

    def forward(value: Any, shapes: Any, location: Any, attention: Any, **_: Any) -> int:
        return ms_deform_attn.flops(torch.Size(location), value[3])

    def backward(gradient: Any, value: Any, shapes: Any, location: Any, *_: Any, **__: Any) -> int:
        return 2 * ms_deform_attn.flops(torch.Size(location), value[3])  # as of a product: for each of its factors

    operators = torch.ops.ms_deform_attn
    custom = {operators.forward: forward, operators.backward: backward}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        run()
    return counter.get_total_flops() / 1e9


def device_kernels(run: Run) -> list[float]:
    """Seconds of every kernel and copy that a call runs on an NVIDIA GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.time_range.elapsed_us() / 1e6 for event in events]


def main(
    config: Positional[Path],
    overrides: Positional[tuple[str, ...]] = (),
    task: Task = "inference",
    size: tuple[int, int] | None = None,
    images: int = 1,
    repeat: int = 5,
    graphs: bool = False,
    output: Path | None = None,
) -> None:
    """Measure inference (800x1088 by default) or a training step (512x512 by default) of a configuration.

    Example: python -m tools.benchmarks.model shapes/dimaskdino_r18 train.precision=bf16 --task training --size 128 128

    Args:
        config: YAML file, or the name of one of the kit's configurations.
        overrides: Settings that differ, key=value.
        task: What to measure.
        size: Height and width of the images.
        images: Number of images per repetition; a training step splits them into train.accumulate parts.
        repeat: Number of repetitions after the warm-up; the median is reported.
        graphs: Compile the whole detector and replay it as a CUDA graph, for inference at one size.
        output: File to append the result to, one line of JSON.
    """
    height, width = size or ((800, 1088) if task == "inference" else (512, 512))
    result = measure(load_config(config, overrides), task, height, width, repeat, images, graphs)
    how = f"{result['precision']}{', compiled' * result['compiled']}{', CUDA graph' * graphs}"
    print(f"{config.stem}, {task}, {images} × {height}×{width}, {how}")
    print(f"{result['device']}, {result['threads']} threads, torch {result['torch']}, {result['operator']}")
    print(
        f"{result['seconds']:.3f} s ({result['fastest']:.3f} to {result['slowest']:.3f}, {repeat} times), "
        f"{result['images_per_second']:.2f} images/s, peak memory {result['peak_memory_gib']:.1f} GiB"
    )
    if result["gflop"]:
        print(f"{result['gflop']:.0f} GFLOP, {result['parameters'] / 1e6:.1f} M parameters")
    for name, seconds in sorted(result["parts"].items(), key=lambda part: -part[1]):
        print(f"  {name:<24}{seconds:7.3f} s")
    save({"config": config.stem, **result}, output)


if __name__ == "__main__":
    tyro.cli(main)
