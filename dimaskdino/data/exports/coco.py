"""COCO format in any arrangement of files: COCO's own, Roboflow's, CVAT's, one file beside its images."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from dimaskdino.data.annotations import inspect_records, parse_json, without_problems
from dimaskdino.data.exports import ExportedSplit, ImageFiles, missing_image, split_of
from dimaskdino.utils.errors import UserError

PARTS = ("images", "annotations", "categories")


def read(source: Path) -> list[ExportedSplit] | None:
    """The splits of a COCO export: a folder, or one annotations file. None if it holds no COCO annotations.

    Raises:
        UserError: files for the same split compete, or images are missing.
    """
    files = [source] if source.suffix.lower() == ".json" else sorted(source.rglob("*.json"))
    contents = {file: content for file in files if (content := _content(file, only=len(files) == 1))}
    if not contents:
        return None
    folder = source if source.is_dir() else source.parent
    images = ImageFiles(folder)
    if not len(images) and source.is_file():  # annotations/ beside images/
        folder = folder.resolve().parent
        images = ImageFiles(folder)
    by_split: dict[str | None, list[Path]] = defaultdict(list)
    for file in contents:
        by_split[split_of(file, folder)].append(file)
    splits = []
    for name, competing in by_split.items():
        # beside the instances COCO itself has files of keypoints for the same images
        chosen = [file for file in competing if "instances" in file.stem] or competing
        if len(chosen) > 1:
            listed = ", ".join(str(file.relative_to(folder)) for file in chosen[:5])
            which = f"the split {name}" if name else "no split by their names"
            raise UserError(f"{len(chosen)} annotation files of {folder} are of {which}: {listed}; give one of them")
        splits.append(_split(name, chosen[0], contents[chosen[0]], images))
    return splits


def _content(file: Path, only: bool) -> dict[str, Any] | None:
    """What a COCO annotations file holds, None if it is another kind of file. The only file has to be one."""
    if only:
        content = parse_json(file)
    else:
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError):
            return None
    is_coco = isinstance(content, dict) and all(isinstance(content.get(part), list) for part in PARTS)
    return content if is_coco else None


def _split(name: str | None, file: Path, content: dict[str, Any], images: ImageFiles) -> ExportedSplit:
    records = content["annotations"]
    with_masks = [r for r in records if not isinstance(r, dict) or r.get("segmentation") or r.get("iscrowd")]
    found = without_problems(inspect_records(content | {"annotations": with_masks}, file))
    used = {record["category_id"] for record in found.annotations}
    # Roboflow lists the data set itself as a category of no supercategory, which has no objects
    whole = {c.get("name") for c in content["categories"] if isinstance(c, dict) and c.get("supercategory") == "none"}
    categories = [c for c in found.categories if c["id"] in used or c["name"] not in whole] or found.categories
    categories = sorted(categories, key=lambda category: category["id"])
    label = {category["id"]: number for number, category in enumerate(categories)}
    split = ExportedSplit(name, [category["name"] for category in categories])
    split.boxes = len(records) - len(with_masks)
    split.remarks.update(found.repaired)
    missing = []
    for record in found.images:
        path = images.find(record["file_name"], file, name)
        if path is None:
            missing.append(record["file_name"])
        else:
            split.images.append({key: record[key] for key in ("id", "file_name", "height", "width")})
            split.paths[record["id"]] = path
    if not split.images:
        raise missing_image(missing[0], file, images)
    if missing:
        split.remarks[f"images that are not there, such as {missing[0]}, left out"] += len(missing)
    for record in found.annotations:
        if record["image_id"] in split.paths:
            kept = {key: record[key] for key in ("id", "image_id", "iscrowd", "segmentation")}
            split.annotations.append(kept | {"category_id": label[record["category_id"]] + 1})
    return split
