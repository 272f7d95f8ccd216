"""The built-in data: synthetic scenes of drawn shapes, or of rendered solids, in COCO format, deterministic."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset

from dimaskdino import config
from dimaskdino.data import solids
from dimaskdino.data.coco import encode_masks
from dimaskdino.data.dataloader import without_worker_traceback
from dimaskdino.utils.errors import writing
from dimaskdino.utils.files import new_folder, write_text
from dimaskdino.utils.progress import progress_bar
from dimaskdino.utils.threads import available_cores

CLASSES = config.Shapes().kinds  # of the default data
SPLITS = ("train", "val")
MOST_SHAPES = 6
LEAST_CONTRAST = 60  # difference of mean colour between a shape and what it covers, in at least one channel
LEAST_PIXELS = 16  # of a shape that counts as an object
LEAST_VISIBLE = 0.3  # fraction of a shape that later shapes must leave visible
BAR_WIDTH = 0.02, 0.04  # of the image's side
SUPERSAMPLING = 4

Array = np.ndarray


def generate(root: Path, settings: config.Shapes, processes: int = 2) -> None:
    """Generate the shapes data: annotations/{train,val}.json and images/{train,val}/ in `root`.

    The folder appears when it is complete. The same settings give the same data.

    Raises:
        UserError: the folder exists, or cannot be written. Nothing is left then.
    """
    with new_folder(root) as partial, without_worker_traceback():
        for split in SPLITS:
            _write_split(partial, split, settings, processes)


def ensure(data: config.Data) -> None:
    """Generate the shapes data if the settings ask for it and the folder does not exist.

    Of several processes one generates them; the others wait.
    """
    if data.shapes is None or data.root.exists():
        return
    file = data.root.with_name(f"{data.root.name}.lock")
    lock = filelock.FileLock(file)
    with writing(data.root), contextlib.suppress(NotImplementedError):  # a file system without locks
        data.root.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        if not data.root.exists():
            generate(data.root, data.shapes)
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            file.unlink()  # those who still wait for it will find the data


def _write_split(root: Path, split: str, settings: config.Shapes, processes: int) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True)
    count = getattr(settings, split)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    scenes = DataLoader(
        _Scenes(folder, settings, split, count), batch_size=None, num_workers=min(processes, available_cores())
    )
    for index, (name, objects) in enumerate(progress_bar(scenes, f"shapes {split}", count)):
        images.append({"id": index, "file_name": name, "height": settings.size, "width": settings.size})
        for found in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": index} | found)
    categories = [{"id": number, "name": name} for number, name in enumerate(settings.kinds, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_text(root / "annotations" / f"{split}.json", json.dumps(content))


class _Scenes(Dataset[tuple[str, list[dict]]]):
    """Writes an image when its item is loaded, so that loader processes share the work."""

    def __init__(self, folder: Path, settings: config.Shapes, split: str, count: int) -> None:
        self.folder, self.settings, self.split, self.count = folder, settings, split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[str, list[dict]]:
        """The image's name, and its annotations in COCO format without their ids."""
        image, labels, masks = scene(self.settings, self.split, index)
        name = f"{index:06d}.jpg"
        with writing(self.folder / name):
            Image.fromarray(image).save(self.folder / name, quality=92)
        objects = []
        for label, mask in zip(labels, masks, strict=True):
            (rle,) = encode_masks(mask[None])
            box, area = coco_mask.toBbox(rle).tolist(), int(mask.sum())
            objects.append({"category_id": label + 1, "segmentation": rle, "area": area, "bbox": box, "iscrowd": 0})
        return name, objects


def scene(settings: config.Shapes, split: str, index: int) -> tuple[Array, list[int], list[Array]]:
    """Generate one scene, a function of the arguments alone.

    Returns:
        The image (size, size, 3) uint8, the class of each shape, and each shape's visible mask (size, size) uint8.
    """
    if settings.rendered:
        return solids.scene(settings, split, index)
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), index])
    size = settings.size
    image = _texture(rng, size)
    labels: list[int] = []
    masks: list[Array] = []
    areas: list[int] = []
    for _ in range(int(rng.integers(1, MOST_SHAPES + 1))):
        label = int(rng.integers(len(settings.kinds)))
        coverage = _coverage(rng, label, settings)
        mask = coverage > 0.5
        left = _left_visible(masks, areas, mask)
        if left is None or mask.sum() < LEAST_PIXELS:
            continue
        surface = _texture(rng, size)
        while np.abs((surface - image)[mask].mean(0)).max() < LEAST_CONTRAST:
            surface = _texture(rng, size)
        image = image + (surface - image) * coverage[..., None]
        masks = [*left, mask.astype(np.uint8)]
        labels.append(label)
        areas.append(int(mask.sum()))
    for _ in range(settings.bars):
        coverage = _bar(rng, size)
        left = _left_visible(masks, areas, coverage > 0.5)
        if left is not None:
            image, masks = image + (_texture(rng, size) - image) * coverage[..., None], left
    noise = rng.normal(0, 4, (size, size, 3))
    return np.clip(image + noise, 0, 255).astype(np.uint8), labels, masks


def _left_visible(masks: list[Array], areas: list[int], cover: Array) -> list[Array] | None:
    """The masks without the pixels that something covers; None if too little would be left of one of them."""
    left = [mask & ~cover for mask in masks]
    for mask, area in zip(left, areas, strict=True):
        if mask.sum() < max(LEAST_PIXELS, LEAST_VISIBLE * area):
            return None
    return left


def _coverage(rng: np.random.Generator, label: int, settings: config.Shapes) -> Array:
    """Coverage of each pixel by a random shape, (size, size) in [0, 1]."""
    size = settings.size
    big = size * SUPERSAMPLING
    radius = big * math.exp(rng.uniform(math.log(settings.smallest), math.log(settings.largest)))
    centre = rng.uniform(0.08 * big, 0.92 * big, 2)
    turn, stretch = rng.uniform(0, 2 * math.pi), rng.uniform(0.55, 1.0)
    canvas = Image.new("L", (big, big))
    draw = ImageDraw.Draw(canvas)
    cos, sin = math.cos(turn), math.sin(turn)
    for outline, fill in _OUTLINES[settings.kinds[label]]:
        x, y = outline[:, 0], outline[:, 1] * stretch
        points = np.stack([cos * x - sin * y, sin * x + cos * y], axis=1) * radius + centre
        draw.polygon(list(map(tuple, points)), fill=255 * fill)
    return _reduced(canvas, size)


def _bar(rng: np.random.Generator, size: int) -> Array:
    """Coverage of each pixel by a thin bar across the image, (size, size) in [0, 1]."""
    big = size * SUPERSAMPLING
    canvas = Image.new("L", (big, big))
    angle, middle = rng.uniform(0, math.pi), rng.uniform(0.2 * big, 0.8 * big, 2)
    along = np.array([math.cos(angle), math.sin(angle)]) * 2 * big
    ends = [tuple(middle - along), tuple(middle + along)]
    ImageDraw.Draw(canvas).line(ends, fill=255, width=int(big * rng.uniform(*BAR_WIDTH)))
    return _reduced(canvas, size)


def _reduced(canvas: Image.Image, size: int) -> Array:
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float64) / 255


def _polar(angle: Array, radius: Array | float = 1.0) -> Array:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _circle(radius: float = 1.0) -> Array:
    return _polar(np.linspace(0, 2 * math.pi, 64, endpoint=False), radius)


def _spikes(points: int, inner: float) -> Array:
    corner = np.arange(2 * points)
    return _polar(corner * math.pi / points, np.where(corner % 2 == 0, 1.0, inner))


def _corners(count: int) -> Array:
    return _polar(np.arange(count) * 2 * math.pi / count + math.pi / count)


def _cross(half: float) -> Array:
    """A plus sign whose arms are `2 · half` wide."""
    arm = np.array([[1, half], [half, half], [half, 1]])
    turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return np.concatenate([arm @ turn.T for turn in turns]) / math.hypot(1, half)


# outlines in the unit circle; a second one with fill 0 cuts a hole
_OUTLINES: dict[str, list[tuple[Array, int]]] = {
    "disk": [(_circle(), 1)],
    "rectangle": [(_corners(4), 1)],
    "triangle": [(_corners(3), 1)],
    "star": [(_spikes(5, 0.42), 1)],
    "ring": [(_circle(), 1), (_circle(0.55), 0)],
    "frame": [(_corners(4), 1), (0.6 * _corners(4), 0)],
    "cross": [(_cross(0.3), 1)],
    "gear": [(_spikes(9, 0.68), 1), (_circle(0.35), 0)],
    "crescent": [(_circle(), 1), (_circle(0.75) + np.array([0.45, 0.0]), 0)],
}


def _texture(rng: np.random.Generator, size: int) -> Array:
    """A two-coloured texture (size, size, 3): waves, checks, blotches or a gradient."""
    yy, xx = np.mgrid[0:size, 0:size] / size
    a, b = rng.uniform(20, 235, (2, 3))
    b = a + (b - a) * rng.uniform(0.15, 0.6)
    angle, frequency, phase = rng.uniform(0, math.pi), rng.uniform(3, 18), rng.uniform(0, 2 * math.pi)
    u = xx * math.cos(angle) + yy * math.sin(angle)
    v = yy * math.cos(angle) - xx * math.sin(angle)
    kind = int(rng.integers(4))
    if kind == 0:
        mix = 0.5 + 0.5 * np.sin(2 * math.pi * frequency * u + phase)
    elif kind == 1:
        mix = ((np.floor(frequency * u) + np.floor(frequency * v)) % 2).astype(float)
    elif kind == 2:
        coarse = Image.fromarray((rng.random((8, 8)) * 255).astype(np.uint8))
        mix = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
    else:
        mix = (u - u.min()) / (u.max() - u.min())
    return a + (b - a) * mix[..., None]
