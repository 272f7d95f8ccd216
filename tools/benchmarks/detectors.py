"""DI-MaskDINO, torchvision's Mask R-CNN and transformers' Mask2Former with a ResNet-50, side by side.

All have their published settings and random weights, and see the same image. Each measurement has a process of its own,
and the models take turns. All return 100 detections with masks at the image's size, so that none is faster because
random weights find nothing.
"""

import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
from dimaskdino.utils.progress import progress_bar
from tools.benchmarks.measuring import peak_memory_gib, save
from tools.benchmarks.model import count_gflop, prepare, synthetic_sample

Name = Literal["dimaskdino", "mask_rcnn", "mask2former"]
Inference = Callable[[], Any]
LABELS = {
    "dimaskdino": "DI-MaskDINO",
    "mask_rcnn": "Mask R-CNN (torchvision)",
    "mask2former": "Mask2Former (transformers)",
}
DETECTIONS = 100
CPU = torch.device("cpu")


def dimaskdino(image: Tensor, precision: str) -> Inference:
    """Inference of the kit's model, with its own post-processing."""
    config = load_config("coco/instance-segmentation/dimaskdino_r50_4scale_bs16_12ep", [f"train.precision={precision}"])
    return prepare(config, "inference", image.shape[-2], image.shape[-1])[2]


def mask_rcnn(image: Tensor, precision: str) -> Inference:
    """Inference of Mask R-CNN with a feature pyramid."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    height, width = image.shape[-2:]
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=height,
        max_size=width,
        box_score_thresh=0.0,  # random weights have low scores
        box_detections_per_img=DETECTIONS,
    ).eval()

    def run() -> Any:
        with torch.inference_mode(), autocast(CPU, precision):
            return model([image.float() / 255])

    return run


def mask2former(image: Tensor, precision: str) -> Inference:
    """Inference of Mask2Former with 100 queries; the masks of the best 100 pairs of query and class."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ResNetConfig(depths=[3, 4, 6, 3], out_features=stages)
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, num_labels=80)).eval()

    def run() -> Any:
        with torch.inference_mode():
            pixels = ImageBatch.from_images([image]).pixels
            with autocast(CPU, precision):
                found = model(pixels)
            scores = found.class_queries_logits[0].float().softmax(-1)[:, :-1]
            queries = scores.flatten().topk(DETECTIONS).indices // scores.shape[1]
            masks = resize_to(found.masks_queries_logits[:, queries.unique()].float(), pixels) > 0
            return scores, masks[..., : image.shape[-2], : image.shape[-1]]

    return run


MODELS: dict[Name, Callable[[Tensor, str], Inference]] = {
    "dimaskdino": dimaskdino,
    "mask_rcnn": mask_rcnn,
    "mask2former": mask2former,
}


def measure(name: Name, height: int, width: int, precision: str, repeat: int) -> dict[str, Any]:
    """Time one model in this process.

    Returns:
        Seconds of each repetition after a warm-up, GFLOP, and peak memory in GiB.
    """
    torch.manual_seed(0)
    run = MODELS[name](synthetic_sample(height, width, 80).image, precision)
    run()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return {"seconds": times, "peak_memory_gib": peak_memory_gib(), "gflop": count_gflop(run)}


def main(
    models: Positional[tuple[Name, ...]] = ("dimaskdino", "mask_rcnn", "mask2former"),
    size: tuple[int, int] = (800, 1088),
    rounds: int = 2,
    output: Path | None = None,
) -> None:
    """Time detectors with a ResNet-50 on a CPU, on the same image, in fp32 and bf16. OMP_NUM_THREADS sets the threads.

    Example: python -m tools.benchmarks.detectors dimaskdino mask_rcnn --size 480 640

    Args:
        models: Which models; Mask2Former is left out where transformers is missing.
        size: Height and width of the image.
        rounds: Number of processes per model and precision, two repetitions in each; the median is reported.
        output: JSON file to write.
    """
    if "mask2former" in models and importlib.util.find_spec("transformers") is None:
        print("note: Mask2Former is left out; it needs transformers: pip install 'dimaskdino[peers]'")
        models = tuple(name for name in models if name != "mask2former")
    rows = []
    print("| model | precision | seconds (fastest to slowest) | GFLOP | peak memory |\n|---|---|---|---|---|")
    for precision in ("fp32", "bf16"):
        runs: dict[Name, list[dict[str, Any]]] = {name: [] for name in models}
        for _ in progress_bar(range(rounds), precision):
            for name in models:
                # the peak memory of a process never decreases, so each measurement has a new one
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    runs[name].append(pool.submit(measure, name, *size, precision, 2).result())
        for name, found in runs.items():
            seconds = [one for run in found for one in run["seconds"]]
            row = {
                "model": LABELS[name],
                "precision": precision,
                "seconds": statistics.median(seconds),
                "fastest": min(seconds),
                "slowest": max(seconds),
                "gflop": found[0]["gflop"],
                "peak_memory_gib": max(run["peak_memory_gib"] for run in found),
            }
            rows.append(row)
            print(
                f"| {row['model']} | {precision} | {row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f}) "
                f"| {row['gflop']:.0f} | {row['peak_memory_gib']:.1f} GiB |"
            )
    save({"size": size, "rounds": rounds, "detections": DETECTIONS, "rows": rows}, output)


if __name__ == "__main__":
    tyro.cli(main)
