"""Time and memory of layer-wise AP at COCO's size, on synthetic detections, compared with pycocotools."""

import contextlib
import io
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dimaskdino.evaluation.bootstrap import DRAWS, image_draws, resampled_ap
from dimaskdino.evaluation.coco_ap import average_precision, read_truth
from dimaskdino.evaluation.detections import Detections, DetectionStore
from dimaskdino.evaluation.layerwise_ap import score_layers
from dimaskdino.utils.progress import progress_bar
from tools.benchmarks.measuring import peak_memory_gib, save

HEIGHT, WIDTH = 480, 640
CLASSES = 80
OBJECTS = 7.4  # per image, as in val2017
SHAPES, VARIANTS = 3000, 6  # outlines at most, and displaced versions of each

Objects = list[tuple[np.ndarray, np.ndarray]]  # of each image: shapes and categories


@dataclass(frozen=True)
class _Pool:
    """Ellipses with wavy outlines. Variant 0 of each is the object, the others are detections of it."""

    codes: list[list[bytes]]
    boxes: np.ndarray  # (shapes, variants, 4) xywh
    areas: np.ndarray  # (shapes, variants)


def _pool(rng: np.random.Generator, shapes: int) -> _Pool:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    codes, boxes, areas = [], [], []
    for _ in progress_bar(range(shapes), "drawing"):
        cy, cx = rng.uniform(0, HEIGHT), rng.uniform(0, WIDTH)
        ry, rx = np.exp(rng.uniform(np.log(6), np.log(200), 2))
        phase, waves = rng.uniform(0, 6.28), rng.integers(2, 9)
        masks = []
        for variant in range(VARIANTS):
            dy, dx = rng.normal(0, 0.06 * variant, 2) * (ry, rx)
            angle = np.arctan2(y - cy - dy, x - cx - dx)
            distance = ((y - cy - dy) / ry) ** 2 + ((x - cx - dx) / rx) ** 2
            masks.append(distance < 1 + 0.2 * np.sin(waves * angle + phase))
        encoded = coco_mask.encode(np.asfortranarray(np.stack(masks, -1).astype(np.uint8)))
        codes.append([code["counts"] for code in encoded])
        boxes.append(coco_mask.toBbox(encoded))
        areas.append(coco_mask.area(encoded))
    return _Pool(codes, np.stack(boxes), np.stack(areas))


def _write_truth(images: int, pool: _Pool, rng: np.random.Generator, file: Path) -> Objects:
    """Write COCO annotations of random objects."""
    objects, annotations = [], []
    for image in range(1, images + 1):
        shapes = rng.integers(0, len(pool.codes), rng.poisson(OBJECTS))
        shapes = shapes[pool.areas[shapes, 0] > 0]
        categories = rng.integers(1, CLASSES + 1, len(shapes))
        objects.append((shapes, categories))
        for shape, category in zip(shapes, categories, strict=True):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image,
                "category_id": int(category),
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": pool.codes[shape][0].decode()},
                "bbox": pool.boxes[shape, 0].tolist(),
                "area": int(pool.areas[shape, 0]),
                "iscrowd": 0,
            }
            annotations.append(annotation)
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)],
    }
    file.write_text(json.dumps(content))
    return objects


def _detections(
    image: int, objects: tuple[np.ndarray, np.ndarray], pool: _Pool, count: int, rng: np.random.Generator
) -> Detections:
    """The objects, some displaced and some of a wrong class, and false alarms of lower scores."""
    shapes, categories = objects
    detected = min(len(shapes), count)
    chosen = np.concatenate([shapes[:detected], rng.integers(0, len(pool.codes), count - detected)])
    variant = np.concatenate([rng.integers(0, VARIANTS, detected), np.zeros(count - detected, np.int64)])
    labels = np.concatenate([categories[:detected], rng.integers(1, CLASSES + 1, count - detected)])
    scores = np.concatenate([rng.uniform(0.2, 1, detected), rng.uniform(0, 0.5, count - detected)])
    codes = [pool.codes[shape][v] for shape, v in zip(chosen, variant, strict=True)]
    xywh = pool.boxes[chosen, variant]
    return Detections(
        np.full(count, image, np.int64),
        labels.astype(np.int64),
        scores.astype(np.float32),
        np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32),
        np.arange(count),
        np.tile([HEIGHT, WIDTH], (count, 1)),
        np.array([len(code) for code in codes], np.int64),
        np.frombuffer(b"".join(codes), np.uint8),
    )


def measure(images: int, stages: int, detections: int) -> dict[str, Any]:
    """Write synthetic detections, score all stages, and compare one stage with pycocotools.

    Args:
        images: number of images.
        stages: number of stages.
        detections: number of detections per image and stage.

    Returns:
        Seconds, memory, box and mask AP of every stage, and the comparison (`one_stage`).
    """
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        pool = _pool(rng, min(SHAPES, images))
        annotations = Path(folder) / "truth.json"
        objects = _write_truth(images, pool, rng, annotations)
        store = DetectionStore(Path(folder) / "detections", {"synthetic": True}, images)
        for part in progress_bar(store.parts, "writing"):
            found = {}
            for stage in range(stages):
                found[f"decoder.{stage}"] = [
                    _detections(i + 1, objects[i], pool, detections, rng) for i in store.images_of(part)
                ]
            store.write(part, found)
        started = time.perf_counter()
        result = score_layers(store, read_truth(annotations), "synthetic")
        return {
            "images": images,
            "stages": stages,
            "detections": detections,
            "score_seconds": time.perf_counter() - started,
            "peak_memory_gib": peak_memory_gib(),
            "ap": {name: [stage.box.AP, stage.mask and stage.mask.AP] for name, stage in result.stages.items()},
            "one_stage": _compare(store["decoder.0"], annotations),
        }


def _compare(detections: Detections, annotations: Path) -> dict[str, Any]:
    """Score one stage with the kit and with pycocotools: seconds, and the largest difference of a summary number."""
    compared = {}
    truth = read_truth(annotations)
    for kind, name, rows in (("box", "bbox", detections.boxes), ("mask", "segm", detections.masks)):
        started = time.perf_counter()
        ours = average_precision(truth, rows, kind)  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        with contextlib.redirect_stdout(io.StringIO()):
            reference = COCO(str(annotations))
            started = time.perf_counter()
            evaluation = COCOeval(reference, reference.loadRes(rows), name)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            pycocotools_seconds = time.perf_counter() - started
        values = [ours.AP, ours.AP50, ours.AP75, ours.APs, ours.APm, ours.APl]
        pairs = zip(values, evaluation.stats[:6], strict=True)
        started = time.perf_counter()
        resampled_ap(truth, rows, kind, image_draws(len(truth.dataset["images"]), DRAWS))  # type: ignore[arg-type]
        compared[kind] = {
            "seconds": seconds,
            "pycocotools_seconds": pycocotools_seconds,
            "largest_difference": max(abs(a - 100 * b) for a, b in pairs if a is not None),
            "bootstrap_seconds": time.perf_counter() - started,
        }
    return compared


def main(images: int = 5000, stages: int = 9, detections: int = 100, output: Path | None = None) -> None:
    """Measure layer-wise AP on synthetic detections, by default at the size of COCO's val2017.

    Example: python -m tools.benchmarks.coco_ap --images 200 --stages 2

    Args:
        images: Number of images.
        stages: Number of stages; DI-MaskDINO with six decoder layers has ten.
        detections: Number of detections per image and stage.
        output: File to append the result to, one line of JSON.
    """
    result = measure(images, stages, detections)
    print(f"all stages: {result['score_seconds']:.1f} s, peak memory {result['peak_memory_gib']:.1f} GiB")
    for kind, one in result["one_stage"].items():
        print(
            f"{kind} AP of one stage: {one['seconds']:.2f} s, pycocotools {one['pycocotools_seconds']:.1f} s, "
            f"largest difference {one['largest_difference']:g}; bootstrap {one['bootstrap_seconds']:.1f} s"
        )
    save(result, output)


if __name__ == "__main__":
    tyro.cli(main)
