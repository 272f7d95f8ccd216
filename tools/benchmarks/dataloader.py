"""Time of loading training images: decoding, masks, augmentation, collation, and the rate of the data loader.

python -m tools.benchmarks.dataloader CONFIG data.root=data/coco --output docs/measurements/loading.jsonl
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from dimaskdino.config import Config, load_config
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.dataloader import collate, training_dataset, training_loader
from dimaskdino.data.images import load_image
from dimaskdino.data.transforms import training_transform
from tools.benchmarks.record import report


def measure(config: Config, images: int) -> dict[str, Any]:
    """Milliseconds per image of each part in one process, and images per second of the data loader.

    Args:
        config: its data, jitter, batch size and workers.
        images: number of images to load.
    """
    plain = CocoDataset(config.data.root, config.data.train, only_with_objects=True)
    jitter = training_transform(config.data)
    parts: dict[str, list[float]] = {"decode": [], "decode and masks": [], "jitter": [], "collate": []}

    def timed(part: str, function: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = function()
        parts[part].append(1000 * (time.perf_counter() - started))
        return result

    for i in range(images):
        index = i % len(plain)
        path = plain.image_folder / plain.images[index]["file_name"]
        timed("decode", lambda path=path: load_image(path))
        sample = timed("decode and masks", lambda index=index: plain[index])
        jittered = timed("jitter", lambda sample=sample: jitter(sample))
        timed("collate", lambda jittered=jittered: collate([jittered]))
    medians = {part: statistics.median(times) for part, times in parts.items()}
    batch, workers = config.train.batch_size, config.data.workers
    loader = iter(training_loader(training_dataset(config), config, 0, 0, 1))
    for _ in range(2 * max(workers, 1)):
        next(loader)  # the workers have started and have filled their queues
    started, loaded = time.perf_counter(), 0
    while loaded < images:
        loaded += len(next(loader).images)
    seconds = time.perf_counter() - started
    return {
        "images": images,
        "jitter": config.data.jitter.size,
        "batch_size": batch,
        "workers": workers,
        "cpu_cores": os.cpu_count(),
        "milliseconds_per_image": medians | {"masks": medians["decode and masks"] - medians["decode"]},
        "images_per_second": loaded / seconds,
        "seconds_per_batch": seconds / loaded * batch,
    }


def main(
    config: tyro.conf.Positional[Path],
    overrides: tyro.conf.Positional[tuple[str, ...]] = (),
    images: int = 64,
    output: Path | None = None,
) -> None:
    """Measure how fast training images are loaded.

    Args:
        config: YAML file.
        overrides: Settings that differ, key=value; set data.workers and train.batch_size as for one GPU.
        images: Number of images to load.
        output: File to append the result to, one line of json.
    """
    report(measure(load_config(config, overrides), images), output)


if __name__ == "__main__":
    tyro.cli(main)
