"""Conversion of BDD100K's instance segmentation labels, bitmasks or run lengths, to COCO annotations.

The format is BDD100K's own documentation (doc.bdd100k.com/format.html): in a bitmask, an RGBA image, R is the category
from 1, G holds truncated, occluded, crowd and ignore in its bits 3 to 0, and B·256 + A is the number of the instance.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dimaskdino.data.annotations import read_annotations, read_json
from dimaskdino.data.exports import ExportedSplit
from dimaskdino.data.images import open_image
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import write_atomically
from dimaskdino.utils.progress import progress_bar

CLASSES = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
_ALIASES = {"person": "pedestrian", "motor": "motorcycle", "bike": "bicycle"}  # of earlier releases
_SIZE = (720, 1280)  # (h, w) of all images
_CROWD, _IGNORE = 2, 1  # bits of G

# class index, whether it is a crowd, and the mask as an array or run lengths
_Instance = tuple[int, bool, Any]
_Frame = tuple[str, tuple[int, int], list[_Instance]]  # image, (h, w), instances


def convert(root: Path, split: str) -> Path:
    """Write `annotations/instances_SPLIT.json` beside BDD100K's `images/10k` and `labels/ins_seg`.

    Bitmasks are used if they exist, as BDD100K advises, else run lengths. Objects marked crowd or ignore become crowds:
    training leaves them out, and evaluation ignores detections on them.

    Args:
        root: folder with `images/10k/SPLIT` and `labels/ins_seg/bitmasks/SPLIT` or `labels/ins_seg/rles/`.
        split: train or val.

    Returns:
        The file.

    Raises:
        UserError: a folder is missing or a label cannot be used. Nothing is written then.
    """
    images = root / "images" / "10k" / split
    bitmasks = root / "labels" / "ins_seg" / "bitmasks" / split
    run_lengths = root / "labels" / "ins_seg" / "rles"
    if not images.is_dir():
        raise UserError(f"{images} does not exist; BDD100K's '10K Images' belong there")
    if bitmasks.is_dir():
        frames = _from_bitmasks(bitmasks)
    elif files := sorted(run_lengths.rglob(f"*{split}*.json")):
        frames = _from_run_lengths(files)
    else:
        raise UserError(
            f"no labels: neither {bitmasks} nor a json of the split in {run_lengths}; BDD100K's 'Instance "
            "Segmentation' labels belong there"
        )
    converted = ExportedSplit(split, list(CLASSES))
    for name, size, instances in progress_bar(frames, f"converting {split}", unit="images"):
        if not (images / name).exists():
            raise UserError(f"the image {images / name} does not exist, but it has labels")
        image = converted.add_image(images / name, size)
        for label, crowd, mask in instances:
            converted.add_object(image, label, mask, int(crowd))
    converted.measure()
    target = annotations_file(root, split)

    def write(partial: Path) -> None:
        partial.write_text(json.dumps(converted.as_coco(CLASSES)), encoding="utf-8")
        read_annotations(partial)

    write_atomically(target, write)
    return target


def annotations_file(root: Path, split: str) -> Path:
    """The file that `convert` writes."""
    return root / "annotations" / f"instances_{split}.json"


def _from_bitmasks(folder: Path) -> Iterator[_Frame]:
    files = sorted(folder.glob("*.png"))
    if not files:
        raise UserError(f"{folder} has no bitmasks (*.png)")
    for file in files:
        with open_image(file, "bitmask") as opened:
            pixels = np.asarray(opened)
        if pixels.ndim != 3 or pixels.shape[2] != 4:
            raise UserError(f"{file} is no bitmask of BDD100K: it has mode {opened.mode}, not RGBA")
        yield f"{file.stem}.jpg", pixels.shape[:2], list(_instances(pixels, file))


def _instances(pixels: UInt8[np.ndarray, "h w 4"], file: Path) -> Iterator[_Instance]:
    category, attributes = pixels[..., 0], pixels[..., 1]
    number = pixels[..., 2].astype(np.int32) * 256 + pixels[..., 3]
    for n in np.unique(number[category > 0]):
        inside = (number == n) & (category > 0)
        if category[inside].min() != category[inside].max():
            raise UserError(f"{file}: instance {n} has several categories")
        kind, bits = int(category[inside][0]), int(attributes[inside][0])
        if kind <= len(CLASSES):  # traffic lights and signs have boxes only
            yield kind - 1, bool(bits & (_CROWD | _IGNORE)), inside


def _from_run_lengths(files: list[Path]) -> Iterator[_Frame]:
    for file in files:
        content = read_json(file)
        for frame in content["frames"] if isinstance(content, dict) else content:
            instances, size = [], _SIZE
            for label in frame.get("labels") or []:
                name = _ALIASES.get(label["category"], label["category"])
                if name not in CLASSES or "rle" not in label:
                    continue
                marks = label.get("attributes") or {}
                crowd = any(marks.get(key) or label.get(key) for key in ("crowd", "ignored", "ignore"))
                instances.append((CLASSES.index(name), crowd, label["rle"]))
                size = tuple(label["rle"]["size"])
            yield frame["name"], size, instances
