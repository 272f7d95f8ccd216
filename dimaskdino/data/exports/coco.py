"""COCO format in any arrangement of files: COCO's own, Roboflow's, CVAT's, one file beside its images."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from dimaskdino.data.annotations import inspect_content, parse_json
from dimaskdino.data.exports import ExportedSplit, ImageFiles, json_object, split_of
from dimaskdino.utils.errors import UserError

PARTS = ("images", "annotations", "categories")


def read(source: Path) -> list[ExportedSplit] | None:
    """The splits of a COCO export: a folder, or one annotations file. None if it holds no COCO annotations.

    Raises:
        UserError: files for the same split compete, or images are missing.
    """
    contents = _contents(source)
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


def _contents(source: Path) -> dict[Path, dict[str, Any]]:
    """The content of each COCO annotations file. Other json files are passed over, but an only file must be json."""
    files = [source] if source.suffix.lower() == ".json" else sorted(source.rglob("*.json"))
    contents = {}
    for file in files:
        content = parse_json(file) if len(files) == 1 else json_object(file)
        if all(isinstance(content.get(part), list) for part in PARTS):
            contents[file] = content
    return contents


def _split(name: str | None, file: Path, content: dict[str, Any], images: ImageFiles) -> ExportedSplit:
    entries = content["annotations"]
    # what is no dictionary is kept, for the message of the reader
    with_masks = [e for e in entries if not isinstance(e, dict) or e.get("segmentation") or e.get("iscrowd")]
    found = inspect_content(content | {"annotations": with_masks}, file)
    found.check_entries()
    categories = _categories(content, found.categories, {entry["category_id"] for entry in found.annotations})
    number = {category["id"]: n for n, category in enumerate(categories, start=1)}
    split = ExportedSplit(name, [category["name"] for category in categories])
    split.boxes = len(entries) - len(with_masks)
    split.remarks.update(found.repaired)
    missing = []
    for image in found.images:
        path = images.find(image["file_name"], file, name)
        if path is None:
            missing.append(image["file_name"])
        else:
            split.images.append(image)
            split.paths[image["id"]] = path
    if not split.images:
        images.require(missing[0], near=file)  # raises: it is not there
    if missing:
        split.remarks[f"images that are not there, such as {missing[0]}, left out"] += len(missing)
    for entry in found.annotations:
        if entry["image_id"] in split.paths:
            kept = {key: entry[key] for key in ("id", "image_id", "iscrowd", "segmentation")}
            split.annotations.append(kept | {"category_id": number[entry["category_id"]]})
    return split


def _categories(content: dict[str, Any], categories: list[dict[str, Any]], used: set[int]) -> list[dict[str, Any]]:
    """The categories by id, without the one that stands for the data set."""
    # Roboflow lists the data set itself as a category of no supercategory, which has no objects
    whole = {c.get("name") for c in content["categories"] if isinstance(c, dict) and c.get("supercategory") == "none"}
    kept = [category for category in categories if category["id"] in used or category["name"] not in whole]
    return sorted(kept or categories, key=lambda category: category["id"])
