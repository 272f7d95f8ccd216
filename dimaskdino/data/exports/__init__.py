"""What every reader gives, and what several of them need."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image, ImageOps

from dimaskdino.data.images import SUFFIXES, open_image
from dimaskdino.utils.errors import UserError

SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "val"
)

Outline = list[float]


@dataclass
class ExportedSplit:
    """One split of an export, or all of it where it has no splits.

    Attributes:
        name: train, val or test; None where the export has no splits.
        classes: names of the classes, in the order of their ids, which begin with 1.
        images: records in COCO format.
        annotations: records in COCO format, of objects with a mask; without boxes and areas.
        paths: the image file of each image id.
        boxes: number of objects that have a box and no mask, which are left out.
        remarks: what was repaired or left out, and how often.
    """

    name: str | None
    classes: list[str]
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    paths: dict[int, Path] = field(default_factory=dict)
    boxes: int = 0
    remarks: Counter[str] = field(default_factory=Counter)

    def add_image(self, path: Path, size: tuple[int, int]) -> int:
        """Add an image of size (h, w), and return its id."""
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": path.name, "height": size[0], "width": size[1]})
        self.paths[number] = path
        return number

    def add_object(
        self, image: int, label: int, segmentation: list[Outline] | dict[str, Any] | None, iscrowd: int = 0
    ) -> None:
        """Add an object of the class with index `label`; one without a mask is only counted."""
        if not segmentation:
            self.boxes += 1
            return
        number = len(self.annotations) + 1
        record = {"id": number, "image_id": image, "category_id": label + 1, "segmentation": segmentation}
        self.annotations.append(record | {"iscrowd": iscrowd})


class ImageFiles:
    """The images in a folder and its subfolders, found by the names that records give them.

    The names come from other machines: their folders, separators and capitals need not be those found here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                self._by_name[path.name.lower()].append(path)
                self._by_stem[path.stem.lower()].append(path)

    def __len__(self) -> int:
        return sum(map(len, self._by_name.values()))

    def find(self, name: str, near: Path, split: str | None = None) -> Path | None:
        """The file of a record, None if there is none.

        Args:
            name: as the record has it.
            near: the file with the record; of equally good images the nearer is taken.
            split: images in a folder of this split come first.

        Raises:
            UserError: several fit equally well.
        """
        parts = name.lower().replace("\\", "/").split("/")
        found = self._by_name.get(parts[-1], []) or self._by_stem.get(parts[-1].rpartition(".")[0] or parts[-1], [])
        if len(found) < 2:
            return found[0] if found else None

        def fit(path: Path) -> tuple[int, bool, int]:
            own = [part.lower() for part in path.parts]
            matching = _shared(reversed(own[:-1]), reversed(parts[:-1]))
            return (
                matching,
                split is not None and split_of_folder(path.parent, self.folder) == split,
                _shared(path.parts, near.parts),
            )

        first, second = sorted(found, key=fit, reverse=True)[:2]
        if fit(first) == fit(second):
            raise UserError(f"'{name}' of {near} may be {first} or {second}; remove or rename one of them")
        return first


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
    return next((name for part in reversed(parts) if (name := split_in(part))), None)


def split_in(name: str) -> str | None:
    """The split that a name says: train, val or test."""
    return next((SPLIT_NAMES[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_NAMES), None)


def upright_size(path: Path) -> tuple[int, int]:
    """(h, w) of an image, with the orientation stored in the file applied, as annotation tools show it.

    Raises:
        UserError: it cannot be read.
    """
    with open_image(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # orientations that swap the sides
        return (image.width, image.height) if turned else (image.height, image.width)


def read_mask(path: Path) -> Image.Image:
    """An image of object numbers or of one mask, as stored.

    Raises:
        UserError: it cannot be read.
    """
    with open_image(path, "mask") as image:
        return ImageOps.exif_transpose(image)


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


def missing_image(name: str, file: Path, images: ImageFiles) -> UserError:
    """The error for a record whose image is not there."""
    return UserError(
        f"'{name}' of {file} is not among the {len(images):,} images in {images.folder}; give the folder that holds "
        "both the annotations and the images"
    )
