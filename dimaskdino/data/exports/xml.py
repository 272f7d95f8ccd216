"""Layouts in XML: Pascal VOC with a file per image, and CVAT for images 1.1 with one file, read by hotcoco."""

import warnings
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from dimaskdino.data.exports import (
    ExportedSplit,
    ImageFiles,
    Outline,
    read_mask,
    read_xml,
    split_of_folder,
    upright_size,
)
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import read_text

_VOID = 255  # pixels between objects
_LISTS = ("ImageSets/Segmentation", "ImageSets/Main")


def read_voc(source: Path) -> list[ExportedSplit] | None:
    """The splits of a Pascal VOC folder. None if it holds no such annotations.

    Masks are outlines, as Roboflow writes them, or images of object numbers.

    Raises:
        UserError: an annotation is damaged, or its image or the image of its object numbers does not fit.
    """
    if source.is_file():
        return None
    roots = {file: root for file in sorted(source.rglob("*.xml")) if (root := read_xml(file)).tag == "annotation"}
    if not roots:
        return None
    classes: set[str] = set()
    for file, root in roots.items():
        classes.update(_text(found, "name", file) for found in root.findall("object"))
    listed, images = _listed(source), ImageFiles(next(source.rglob("JPEGImages"), source))
    splits: dict[str | None, ExportedSplit] = {}
    for file, root in roots.items():
        name = listed.get(file.stem) if listed else split_of_folder(file.parent, source)
        split = splits.setdefault(name, ExportedSplit(name, sorted(classes)))
        _add(split, file, root, images)
    if listed and None in splits:  # VOC lists the images with masks; the others have boxes alone
        left = splits.pop(None)
        next(iter(splits.values())).remarks["images that no list of ImageSets names, left out"] += len(left.images)
    return list(splits.values())


def _listed(source: Path) -> dict[str, str]:
    """The split of each image by the lists in ImageSets, none without lists."""
    for folder in _LISTS:
        for place in [source / folder, *source.glob(f"*/{folder}")]:
            listed: dict[str, str] = {}
            for split in ("train", "val", "test"):
                file = place / f"{split}.txt"
                if file.is_file():
                    listed |= dict.fromkeys(read_text(file).split(), split)
            if listed:
                return listed
    return {}


def _add(split: ExportedSplit, file: Path, root: Element, images: ImageFiles) -> None:
    path = images.require(_text(root, "filename", file), file.stem, near=file, split=split.name)
    size = upright_size(path)
    image = split.add_image(path, size)
    numbers = _object_numbers(file, size)
    for index, found in enumerate(root.findall("object"), start=1):
        mask = _outlines(found, file) or None
        if mask is None and numbers is not None and (numbers == index).any():
            mask = numbers == index
        split.add_object(image, split.classes.index(_text(found, "name", file)), mask)


def _object_numbers(file: Path, size: tuple[int, int]) -> np.ndarray | None:
    """(h, w): the number of the object in each pixel, counted from 1 in the order of the XML file; None without one."""
    mask = file.parent.parent / "SegmentationObject" / f"{file.stem}.png"
    if not mask.is_file():
        return None
    numbers = read_mask(mask, size)
    return np.where(numbers == _VOID, 0, numbers)


def _outlines(found: Element, file: Path) -> list[Outline]:
    outlines = []
    for polygon in found.findall("polygon"):
        values = {child.tag: child.text for child in polygon}
        outline: Outline = []
        try:
            for i in range(1, sum(tag.startswith("x") for tag in values) + 1):
                outline += [float(values[f"x{i}"] or ""), float(values[f"y{i}"] or "")]
        except (KeyError, ValueError):
            raise UserError(f"{file}: a polygon must hold x1, y1, x2, y2, … as numbers") from None
        if len(outline) >= 6:
            outlines.append(outline)
    return outlines


def _text(element: Element, tag: str, file: Path) -> str:
    text = element.findtext(tag)
    if not text or not text.strip():
        raise UserError(f"{file}: <{element.tag}> has no <{tag}>")
    return text.strip()


def read_cvat(source: Path) -> list[ExportedSplit] | None:
    """The content of a CVAT export: a folder with the XML file, or that file. None if there is none.

    Raises:
        UserError: the file is damaged, its images are missing, or hotcoco cannot be imported.
    """
    files = [source] if source.suffix.lower() == ".xml" else sorted([*source.glob("*.xml"), *source.glob("*/*.xml")])
    file = next((file for file in files if read_xml(file).tag == "annotations"), None)
    if file is None:
        return None
    try:
        import hotcoco
    except ImportError as error:
        raise UserError(f"reading {file} needs hotcoco ({error}); or export as COCO 1.0 instead") from None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            content = hotcoco.COCO.from_cvat(str(file)).dataset
        except (ValueError, OSError) as error:
            raise UserError(f"{file} cannot be read as CVAT for images 1.1: {error}") from None
    images = ImageFiles(file.parent if source.is_file() else source)
    # hotcoco numbers categories and images from 1
    split = ExportedSplit(None, [category["name"] for category in content["categories"]])
    for image in content["images"]:
        split.add_image(images.require(image["file_name"], near=file), (image["height"], image["width"]))
    for entry in content["annotations"]:
        split.add_object(entry["image_id"], entry["category_id"] - 1, entry.get("segmentation"))
    masks = len(read_xml(file).findall("./image/mask"))
    if masks:
        split.remarks["masks drawn with the brush, left out; export as COCO 1.0 to keep them"] += masks
    for warning in caught:
        split.remarks[f"({str(warning.message).removeprefix('hotcoco: ')})"] += 1
    return [split]
