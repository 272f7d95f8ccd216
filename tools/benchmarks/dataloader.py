"""Time of loading training images: decoding, whole samples, collation, and the speed of the data loader."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from dimaskdino.config import Config, load_config
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.dataloader import collate, training_dataset, training_loader
from dimaskdino.data.images import load_image
from tools.benchmarks.measuring import save


def measure(config: Config, images: int) -> dict[str, Any]:
    """Measure the parts of loading in this process, and the data loader with its workers.

    Args:
        config: its data, jitter, batch size and workers.
        images: number of images to load.

    Returns:
        Milliseconds per image (median) of each part, and images per second of the data loader.
    """
    plain = CocoDataset(config.data.root, config.data.train, only_with_objects=True)
    augmented = training_dataset(config)
    parts: dict[str, list[float]] = {"decode": [], "sample": [], "collate": []}

    def timed(part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        parts[part].append(1000 * (time.perf_counter() - started))
        return result

    for i in range(images):
        index = i % len(plain)
        timed("decode", load_image, plain.image_folder / plain.images[index]["file_name"])
        sample = timed("sample", augmented.__getitem__, index)
        timed("collate", collate, [sample])

    loader = iter(training_loader(training_dataset(config), config, 0, 0, 1))
    for _ in range(2 * max(config.data.workers, 1)):
        next(loader)  # the workers have started and filled their queues
    started, loaded = time.perf_counter(), 0
    while loaded < images:
        loaded += len(next(loader).images)
    seconds = time.perf_counter() - started
    return {
        "images": images,
        "jitter": config.data.jitter.size,
        "batch_size": config.train.batch_size,
        "workers": config.data.workers,
        "milliseconds_per_image": {part: statistics.median(times) for part, times in parts.items()},
        "images_per_second": loaded / seconds,
    }


def main(
    config: Positional[Path],
    overrides: Positional[tuple[str, ...]] = (),
    images: int = 64,
    output: Path | None = None,
) -> None:
    """Measure how fast training images are loaded.

    Example: python -m tools.benchmarks.dataloader CONFIG data.root=data/coco data.workers=8 train.batch_size=2

    Args:
        config: YAML file, or the name of one of the kit's configurations.
        overrides: Settings that differ, key=value; set data.workers and train.batch_size as for one GPU.
        images: Number of images to load.
        output: File to append the result to, one line of JSON.
    """
    result = measure(load_config(config, overrides), images)
    for part, milliseconds in result["milliseconds_per_image"].items():
        print(f"{part}: {milliseconds:.1f} ms per image")
    print(f"data loader with {result['workers']} workers: {result['images_per_second']:.1f} images per second")
    save(result, output)


if __name__ == "__main__":
    tyro.cli(main)
