"""Conversion of BDD100K's instance segmentation labels, bitmasks or run lengths, to COCO annotations.

The format is BDD100K's own documentation (doc.bdd100k.com/format.html): in a bitmask, an RGBA image, R is the category
from 1, G holds truncated, occluded, crowd and ignore in its bits 3 to 0, and B·256 + A is the number of the instance.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pycocotools import mask as coco_mask

from dimaskdino.data.annotations import read_annotations
from dimaskdino.data.coco import encode_masks
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.progress import progress_bar

CLASSES = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
_ALIASES = {"person": "pedestrian", "motor": "motorcycle", "bike": "bicycle"}  # of earlier releases
_CROWD, _IGNORE = 2, 1  # bits of G


@dataclass(frozen=True)
class _Instance:
    category: int  # from 1
    crowd: bool
    rle: dict[str, Any]  # counts as text, size h, w


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
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    for name, size, instances in progress_bar(frames, f"converting {split}", unit="images"):
        if not (images / name).exists():
            raise UserError(f"the image {images / name} does not exist, but it has labels")
        number = len(content["images"]) + 1
        content["images"].append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
        for instance in instances:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": instance.category,
                    "segmentation": instance.rle,
                    "bbox": coco_mask.toBbox(instance.rle).tolist(),
                    "area": int(coco_mask.area(instance.rle)),
                    "iscrowd": int(instance.crowd),
                }
            )
    target = root / "annotations" / f"instances_{split}.json"
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    read_annotations(partial)
    partial.replace(target)
    return target


def _from_bitmasks(folder: Path) -> Iterator[tuple[str, tuple[int, int], list[_Instance]]]:
    files = sorted(folder.glob("*.png"))
    if not files:
        raise UserError(f"{folder} has no bitmasks (*.png)")
    for file in files:
        with Image.open(file) as opened:
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
        if kind > len(CLASSES):
            continue  # traffic lights and signs have boxes only
        rle = encode_masks(inside[None])[0]
        yield _Instance(kind, bool(bits & (_CROWD | _IGNORE)), rle)


def _from_run_lengths(files: list[Path]) -> Iterator[tuple[str, tuple[int, int], list[_Instance]]]:
    for file in files:
        try:
            content = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} is not valid json ({error})") from None
        for frame in content["frames"] if isinstance(content, dict) else content:
            instances_found, size = [], (720, 1280)  # of all images of the set
            for label in frame.get("labels") or []:
                name = _ALIASES.get(label["category"], label["category"])
                if name not in CLASSES or "rle" not in label:
                    continue
                marks = label.get("attributes") or {}
                crowd = any(marks.get(key) or label.get(key) for key in ("crowd", "ignored", "ignore"))
                instances_found.append(_Instance(CLASSES.index(name) + 1, bool(crowd), label["rle"]))
                size = tuple(label["rle"]["size"])
            yield frame["name"], size, instances_found
