"""Readers of the layouts in which annotation tools export masks, and the parts that they share.

A reader takes the export's folder, or its annotations file, and returns a list of `ExportedSplit`; None if the source
has another layout. `data.importing.READERS` lists them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import ImageOps
from pycocotools import mask as coco_mask

from dimaskdino.data.annotations import (
    LARGEST_SIDE,
    check_outline,
    check_run_lengths,
    image_sizes,
    parse_json,
    to_run_lengths,
)
from dimaskdino.data.coco import encode_masks
from dimaskdino.data.images import files_in, open_image
from dimaskdino.utils.errors import UserError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}

Outline = list[float]


@dataclass
class ExportedSplit:
    """One split of an export, or all of it where it has no splits.

    Attributes:
        name: train, val or test; None where the export has no splits.
        classes: names of the classes, in the order of their ids, which begin with 1.
        images: entries in COCO format.
        annotations: entries in COCO format, of objects with a mask; without boxes and areas.
        paths: the image file of each image id.
        boxes: number of objects that have a box and no mask, which are left out.
        remarks: number of repairs and omissions of each kind.
    """

    name: str | None
    classes: list[str]
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    paths: dict[int, Path] = field(default_factory=dict)
    boxes: int = 0
    remarks: Counter[str] = field(default_factory=Counter)

    def add_image(self, path: Path, size: tuple[int, int]) -> int:
        """Add an image of size (h, w), and return its id.

        Raises:
            UserError: no image has that size.
        """
        if not all(1 <= side <= LARGEST_SIDE for side in size):
            raise UserError(f"{path} is {size[0]}x{size[1]} (h x w) in the annotations; correct its size")
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": path.name, "height": size[0], "width": size[1]})
        self.paths[number] = path
        return number

    def add_object(
        self,
        image: int,
        label: int,
        segmentation: list[Outline] | dict[str, Any] | np.ndarray | None,
        iscrowd: int = 0,
    ) -> None:
        """Add an object of the class with index `label`; one without a mask is only counted.

        Args:
            image: id of the image.
            label: index of the class.
            segmentation: outlines, run lengths, or a mask (h, w) of booleans.
            iscrowd: 1 for a crowd.

        Raises:
            UserError: the mask cannot be that of an object in the image.
        """
        if isinstance(segmentation, np.ndarray):
            segmentation = encode_masks(segmentation[None])[0]
        if not segmentation:
            self.boxes += 1
            return
        try:
            if isinstance(segmentation, dict):
                entry = self.images[image - 1]
                check_run_lengths(segmentation, (entry["height"], entry["width"]))
            else:
                list(map(check_outline, segmentation))
        except ValueError as error:
            raise UserError(f"an object in {self.paths[image]} {error}") from None
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": image,
                "category_id": label + 1,
                "segmentation": segmentation,
                "iscrowd": iscrowd,
            }
        )

    def measure(self) -> None:
        """Compute boxes and areas from the masks, and leave out objects without a pixel."""
        sizes, kept = image_sizes(self.images), []
        for annotation in self.annotations:
            rle = to_run_lengths(annotation["segmentation"], sizes[annotation["image_id"]])
            annotation["bbox"] = coco_mask.toBbox(rle).tolist()
            annotation["area"] = int(coco_mask.area(rle))
            if annotation["area"]:
                kept.append(annotation)
        if len(kept) < len(self.annotations):
            self.remarks["objects whose mask covers no pixel, left out"] += len(self.annotations) - len(kept)
        self.annotations = kept

    def as_coco(self, classes: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """The split, once it is measured, as a COCO dictionary with these classes."""
        categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}


class ImageFiles:
    """The images in a folder and its subfolders, found by the names that annotations give them.

    The names come from other machines: their folders, separators and capitals need not be those found here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in files_in(folder):
            self._by_name[path.name.lower()].append(path)
            self._by_stem[path.stem.lower()].append(path)

    def __len__(self) -> int:
        return sum(map(len, self._by_name.values()))

    def find(self, name: str, near: Path, split: str | None = None) -> Path | None:
        """The file of an image, None if there is none.

        Args:
            name: as the annotations have it.
            near: the file with the annotations; of equally good images the nearer is taken.
            split: images in a folder of this split come first.

        Raises:
            UserError: several fit equally well.
        """
        *folders, base = name.lower().replace("\\", "/").split("/")
        stem = base.rpartition(".")[0] or base
        found = self._by_name.get(base) or self._by_stem.get(stem, [])
        if len(found) < 2:
            return found[0] if found else None

        def fit(path: Path) -> tuple[int, bool, int]:
            own = [part.lower() for part in path.parent.parts]
            in_split = split is not None and split_of_folder(path.parent, self.folder) == split
            return _shared(reversed(own), reversed(folders)), in_split, _shared(path.parts, near.parts)

        first, second = sorted(found, key=fit, reverse=True)[:2]
        if fit(first) == fit(second):
            raise UserError(f"'{name}' of {near} may be {first} or {second}; remove or rename one of them")
        return first

    def require(self, *names: str, near: Path, split: str | None = None) -> Path:
        """The file of the first of these names that is found, see `find`.

        Raises:
            UserError: none is.
        """
        for name in names:
            path = self.find(name, near, split)
            if path is not None:
                return path
        raise UserError(
            f"'{names[0]}' of {near} is not among the {len(self):,} images in {self.folder}; give the folder that "
            "holds both the annotations and the images"
        )


def _shared(first: Iterable[str], second: Iterable[str]) -> int:
    """How many elements two sequences have in common before they differ."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def split_of(file: Path, folder: Path) -> str | None:
    """The split that a file belongs to by its name or by the folders between it and `folder`, the nearest first."""
    return split_in(file.stem) or split_of_folder(file.parent, folder)


def split_of_folder(place: Path, folder: Path) -> str | None:
    """The split that a folder inside `folder` is for by its name or by those of the folders around it."""
    parts = place.relative_to(folder).parts if place.is_relative_to(folder) else ()
    for part in reversed(parts):
        if name := split_in(part):
            return name
    return None


def split_in(name: str) -> str | None:
    """The split that a name mentions: train, val or test."""
    for word in re.findall("[a-z]+", name.lower()):
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return None


def upright_size(path: Path) -> tuple[int, int]:
    """(h, w) of an image, with the orientation stored in the file applied, as annotation tools show it.

    Raises:
        UserError: it cannot be read.
    """
    with open_image(path) as image:
        if image.format == "TIFF":  # Pillow applies its orientation, and forgets it when the pixels are read
            image.load()
        turned = image.getexif().get(0x0112, 1) >= 5  # orientations that swap the sides
        return (image.width, image.height) if turned else (image.height, image.width)


def read_mask(path: Path, size: tuple[int, int], mode: str | None = None) -> np.ndarray:
    """An image of object numbers or of one mask as an array (h, w).

    Args:
        path: the file.
        size: (h, w) of the image that it belongs to.
        mode: Pillow's mode to convert it to; the stored values by default.

    Raises:
        UserError: it cannot be read, or has another size.
    """
    with open_image(path, "mask") as image:
        upright = ImageOps.exif_transpose(image)
    pixels = np.asarray(upright.convert(mode) if mode else upright)
    if pixels.shape != size:
        raise UserError(f"{path} is {pixels.shape[0]}x{pixels.shape[1]}, its image {size[0]}x{size[1]} (h x w)")
    return pixels


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return ElementTree.parse(path).getroot()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path} is not valid XML ({error}); was it copied completely?") from None


def json_object(file: Path) -> dict[str, Any]:
    """The object in a json file; empty if it holds anything else, since not every json file holds annotations."""
    try:
        return parse_json(file)
    except UserError:
        return {}
