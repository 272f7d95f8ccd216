"""Memory of long work: `python -m dimaskdino.benchmarks.memory --output docs/measurements/memory.json`.

Memory that is not given back shows as growth: the resident memory of this process is read at equal distances, and the
growth is the slope of a line through the second half of the readings, after everything has been used once.
"""

import contextlib
import ctypes
import gc
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro
from torch import nn

import dimaskdino
from dimaskdino.benchmarks.coco_ap import write_synthetic
from dimaskdino.benchmarks.explorers import change_all, explorers
from dimaskdino.benchmarks.record import save
from dimaskdino.config import load_config
from dimaskdino.data.shapes import ensure
from dimaskdino.evaluation.coco_ap import average_precision, read_truth
from dimaskdino.modeling import Detector
from dimaskdino.progress import progress_bar
from dimaskdino.resources import find_config
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training.trainer import train

READINGS = 20
MEGABYTE = 2**20


def resident() -> float:
    """Resident memory of this process, MiB, without what is ready to be used again."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone can give back what its allocator keeps
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss / MEGABYTE


def growth(readings: list[float]) -> float:
    """Growth over the second half of the readings, MiB: the slope of a line through them, times their number."""
    late = readings[len(readings) // 2 :]
    return float(np.polyfit(np.arange(len(late)), late, 1)[0] * (len(late) - 1))


def measure(title: str, times: int, work: Iterator[None]) -> dict[str, Any]:
    """Do some work a number of times, and read the memory `READINGS` times in between."""
    readings = []
    for number in progress_bar(range(times), title, unit=""):
        next(work)
        if (number + 1) % (times // READINGS) == 0:
            readings.append(resident())
    return _result(times, readings)


def _result(times: int, readings: list[float]) -> dict[str, Any]:
    return {"times": times, "mebibytes": [round(value, 1) for value in readings], "growth": round(growth(readings), 1)}


def _training_steps(steps: int, folder: Path) -> dict[str, Any]:
    """A training in this process, of the small model that the demo trains, read from its own progress."""
    overrides = [
        *(f"data.root={folder / 'data'}", "data.shapes={train: 200, val: 4}", f"schedule.steps={steps}"),
        *("schedule.drops=[]", "train.batch_size=2", "data.workers=0", "train.log_every=1"),
        f"train.checkpoint_every={max(1, steps // 4)}",
    ]
    config = load_config(find_config("shapes/dimaskdino_r18"), overrides)
    readings: list[float] = []
    run, calls = RunFolder(folder / "run"), itertools.count(1)

    def read(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if isinstance(module, Detector) and next(calls) % (steps // READINGS) == 0:
            readings.append(resident())

    ensure(config.data)
    hook = nn.modules.module.register_module_forward_hook(read)
    try:
        with run.running():
            train(config, run)
    finally:
        hook.remove()
    return _result(steps, readings)


def _predictions() -> Iterator[None]:
    model = dimaskdino.load("dimaskdino-shapes", device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (7, 128, 128, 3), dtype=np.uint8)
    while True:
        for number, image in enumerate(images):
            model.predict(image[: 96 + 4 * number])
            yield


def _explorer_changes() -> Iterator[None]:
    made = explorers().values()  # once: the widgets of a closed notebook cell stay registered with the kernel
    while True:
        for explorer, changes in made:
            yield from change_all(explorer, changes)


def _scored_stages(images: int, folder: Path) -> Iterator[None]:
    """Every stage of an evaluation, boxes and masks, again and again."""
    store, annotations, _ = write_synthetic(folder, images, stages=1, detections=100)
    truth = read_truth(annotations)
    while True:
        detections = store["decoder.0"]
        average_precision(truth, detections.boxes, "box")
        average_precision(truth, detections.masks, "mask")
        yield


def main(
    steps: int = 500,
    predictions: int = 400,
    changes: int = 300,
    images: int = 5000,
    stages: int = 20,
    output: Path | None = None,
) -> None:
    """Measure the memory of training steps, predictions, changes of explorers and scored stages.

    Args:
        steps: Number of training steps.
        predictions: Number of predicted images.
        changes: Number of changes of the explorers' controls.
        images: Number of images in the evaluation, as in val2017.
        stages: Number of scored stages of it.
        output: File for the result, json.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scored = _scored_stages(images, folder / "evaluation")
        record = {
            "training steps": _training_steps(steps, folder),
            "predictions": measure("predictions", predictions, _predictions()),
            "explorer changes": measure("explorer changes", changes, _explorer_changes()),
            f"scored stages of {images:,} images": measure("scored stages", stages, scored),
        }
    for what, result in record.items():
        first, last = result["mebibytes"][len(result["mebibytes"]) // 2], result["mebibytes"][-1]
        print(f"{result['times']:>5} {what:<32} {first:8.0f} to {last:8.0f} MiB, growth {result['growth']:+.1f} MiB")
    save({"memory": record}, output)


if __name__ == "__main__":
    tyro.cli(main)
