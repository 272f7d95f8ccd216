"""Detectors with a ResNet-50 side by side: `python -m tools.benchmarks.detectors --output FILE`.

DI-MaskDINO, torchvision's Mask R-CNN and transformers' Mask2Former as they were published, with random weights, on the
same image. Each measurement is a process of its own, and the models take turns. All give 100 detections with masks at
the image's size, so that none is faster because random weights find nothing.
"""

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from tyro.conf import Positional

from dimaskdino.config import load_config
from dimaskdino.modeling import ImageBatch
from dimaskdino.modeling.precision import autocast
from dimaskdino.modeling.structures import resize_to
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.progress import progress_bar
from tools.benchmarks.model import count_gflop, prepare, synthetic_sample
from tools.benchmarks.record import save

Name = Literal["dimaskdino", "mask_rcnn", "mask2former"]
ComparedPrecision = Literal["fp32", "bf16"]
LABELS = {
    "dimaskdino": "DI-MaskDINO",
    "mask_rcnn": "Mask R-CNN (torchvision)",
    "mask2former": "Mask2Former (transformers)",
}
DETECTIONS, OBJECTS = 100, 7
R50 = "configs/coco/instance-segmentation/dimaskdino_r50_4scale_bs16_12ep.yaml"
PEAK = """
import sys, time, torch
a = torch.randn(3072, 3072, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[sys.argv[1]])
times = []
for _ in range(6):
    started = time.perf_counter()
    a @ a
    times.append(time.perf_counter() - started)
print(2 * 3072**3 / min(times) / 1e9)
"""


def peak(precision: str, threads: int) -> float:
    """GFLOP/s of a matrix product of 3,072², the fastest of six."""
    command, environment = [sys.executable, "-c", PEAK, precision], os.environ | {"OMP_NUM_THREADS": str(threads)}
    return float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median, fastest and slowest seconds and the largest memory of several processes with the same task."""
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "fastest": min(run["fastest"] for run in runs),
        "slowest": max(run["slowest"] for run in runs),
        "peak_memory_gib": max(run["peak_memory_gib"] for run in runs),
    }


def dimaskdino(image: Tensor, precision: ComparedPrecision) -> Callable[[], Any]:
    """Inference of the kit's model, with its own post-processing."""
    config = load_config(Path(R50), [f"train.precision={precision}"])
    return prepare(config, "inference", image.shape[-2], image.shape[-1], OBJECTS)[2]


def mask_rcnn(image: Tensor, precision: ComparedPrecision) -> Callable[[], Any]:
    """Inference of Mask R-CNN with a feature pyramid."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    height, width = image.shape[-2:]
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=height,
        max_size=width,
        box_score_thresh=0.0,  # random weights are sure of nothing
        box_detections_per_img=DETECTIONS,
    ).eval()

    def run() -> Any:
        with torch.inference_mode(), autocast(torch.device("cpu"), precision):
            return model([image.float() / 255])

    return run


def mask2former(image: Tensor, precision: ComparedPrecision) -> Callable[[], Any]:
    """Inference of Mask2Former with 100 queries; the masks of the best 100 pairs of query and class."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = ResNetConfig(depths=[3, 4, 6, 3], out_features=stages)
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, num_labels=80)).eval()

    def run() -> Any:
        with torch.inference_mode():
            pixels = ImageBatch.from_images([image]).pixels
            with autocast(torch.device("cpu"), precision):
                found = model(pixels)
            scores = found.class_queries_logits[0].float().softmax(-1)[:, :-1]
            queries = scores.flatten().topk(DETECTIONS).indices // scores.shape[1]
            masks = resize_to(found.masks_queries_logits[:, queries.unique()].float(), pixels) > 0
            return scores, masks[..., : image.shape[-2], : image.shape[-1]]

    return run


MODELS: dict[Name, Callable[[Tensor, ComparedPrecision], Callable[[], Any]]] = {
    "dimaskdino": dimaskdino,
    "mask_rcnn": mask_rcnn,
    "mask2former": mask2former,
}


def measure(name: Name, height: int, width: int, precision: ComparedPrecision, repeat: int) -> dict[str, float]:
    """Seconds (the fastest, the median, the slowest), arithmetic and memory of one model in this process."""
    torch.manual_seed(0)
    image = synthetic_sample(height, width, OBJECTS, 80).image
    run = MODELS[name](image, precision)
    run()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": statistics.median(times),
        "fastest": min(times),
        "slowest": max(times),
        "peak_memory_gib": memory,
        "gflop": count_gflop(run),
    }


def compare(
    names: Sequence[Name], height: int, width: int, threads: Sequence[int], rounds: int, repeat: int
) -> list[dict[str, Any]]:
    """Every model in every precision and with every number of threads, in turns."""
    jobs = [(precision, count) for count in threads for precision in ("fp32", "bf16")]
    found = []
    for precision, count in progress_bar(jobs, "measurements"):
        seen: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        peaks = []
        for _ in range(rounds):
            peaks.append(peak(precision, count))
            for name in names:
                command = [sys.executable, "-m", "tools.benchmarks.detectors", "--one", name]
                command += ["--size", str(height), str(width), "--precision", precision, "--repeat", str(repeat)]
                done = subprocess.run(
                    command, env=os.environ | {"OMP_NUM_THREADS": str(count)}, capture_output=True, text=True
                )
                if done.returncode:
                    raise UserError(f"{LABELS[name]} failed:\n{done.stderr}")
                seen[name].append(json.loads(done.stdout.splitlines()[-1]))
        for name, runs in seen.items():
            row = {"model": LABELS[name], "precision": precision, "threads": count}
            row |= {"peak_gflops": statistics.median(peaks), "gflop": runs[0]["gflop"], **summary(runs)}
            found.append(row)
            print(
                f"{row['model']}, {precision}, {count} threads: {row['seconds']:.2f} s, {row['gflop']:.0f} GFLOP, "
                f"{row['peak_memory_gib']:.1f} GiB"
            )
    return found


def main(
    models: Positional[tuple[Name, ...]] = ("dimaskdino", "mask_rcnn", "mask2former"),
    size: tuple[int, int] = (800, 1088),
    threads: tuple[int, ...] = (1, 2),
    rounds: int = 2,
    repeat: int = 2,
    output: Path | None = None,
    one: Name | None = None,
    precision: ComparedPrecision = "fp32",
) -> None:
    """Measure detectors with a ResNet-50 on the same image, in turns.

    For example: python -m tools.benchmarks.detectors dimaskdino mask_rcnn --size 480 640

    Args:
        models: Which models; those that need a package that is missing are left out, with a word.
        size: Height and width of the image.
        threads: Numbers of threads.
        rounds: Number of turns; medians are reported.
        repeat: Repetitions in a turn after one to warm up.
        output: File for the record, json.
        one: Measure this model in this process alone, once, and print a line of json.
        precision: Precision for --one.
    """
    if one:
        print(json.dumps(measure(one, *size, precision, repeat)))
        return
    if "mask2former" in models and importlib.util.find_spec("transformers") is None:
        print("note: without Mask2Former, which needs transformers: pip install 'dimaskdino[peers]'")
        models = tuple(name for name in models if name != "mask2former")
    found = compare(models, *size, threads, rounds, repeat)
    save({"size": size, "rounds": rounds, "detections": DETECTIONS, "rows": found}, output)


if __name__ == "__main__":
    tyro.cli(main)
