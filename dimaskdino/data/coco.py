"""Datasets in COCO format: annotations json and a folder of images."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import masks_to_boxes

from dimaskdino import config
from dimaskdino.data.annotations import read_annotations, run_lengths, to_run_lengths
from dimaskdino.data.images import load_image
from dimaskdino.modeling.structures import CroppedMasks
from dimaskdino.utils.errors import UserError

# the known layouts: annotations file and image folders, {} is the split's name
_LAYOUTS = (
    ("annotations/instances_{}.json", ("images/{}", "{}", "images/10k/{}", "images")),
    ("annotations/{}.json", ("images/{}", "{}", "images")),
    ("{}/_annotations.coco.json", ("{}",)),
)


@dataclass(frozen=True)
class Sample:
    """One image with its objects.

    Attributes:
        image: (3, h, w) uint8, RGB.
        labels: (M,) class indices.
        masks: (M, h, w) uint8, 0 or 1.
        image_id: id in the annotations.
        file: the image's path.
        original_size: (h, w) as stored, before any transform.
        skipped: problems of the unreadable images that this one replaces.
    """

    image: UInt8[Tensor, "3 h w"]
    labels: Int[Tensor, " M"]
    masks: UInt8[Tensor, "M h w"]
    image_id: int
    file: str
    original_size: tuple[int, int]
    skipped: tuple[str, ...] = ()

    @property
    def boxes(self) -> Float[Tensor, "M 4"]:
        """Tight boxes of the masks, xyxy in pixels of the image. The upper bounds include the last pixel."""
        if not len(self.masks):
            return torch.zeros(0, 4)
        boxes = masks_to_boxes(self.masks)
        return boxes + boxes.new_tensor([0, 0, 1, 1])

    @classmethod
    def of_image(cls, image: UInt8[Tensor, "3 h w"]) -> "Sample":
        """An image without annotations."""
        size = (image.shape[-2], image.shape[-1])
        return cls(image, torch.zeros(0, dtype=torch.int64), torch.zeros(0, *size, dtype=torch.uint8), 0, "", size)


@dataclass(frozen=True)
class Record:
    """One image and its objects on disk: nothing is decoded yet.

    Attributes:
        path: the image.
        size: (h, w) according to the annotations.
        image_id: id in the annotations.
        labels: class index of each object.
        masks: compressed run lengths of each object.
    """

    path: Path
    size: tuple[int, int]
    image_id: int
    labels: list[int]
    masks: list[dict[str, Any]]

    def sample(
        self,
        image: UInt8[Tensor, "3 h w"] | None = None,
        rows: Int[np.ndarray, " h"] | None = None,
        columns: Int[np.ndarray, " w"] | None = None,
    ) -> Sample:
        """The sample, at the image's own size by default.

        Args:
            image: the image after a transform; the one on disk by default.
            rows: which row of the stored image each row of the masks comes from; −1 is outside. Masks are decoded at
                these rows and columns alone, so that large images cost little more than small ones.
            columns: the same for the columns.

        Raises:
            UserError: the image cannot be read.
        """
        image = load_image(self.path, expected=self.size) if image is None else image
        rows = np.arange(self.size[0]) if rows is None else rows
        columns = np.arange(self.size[1]) if columns is None else columns
        masks = np.zeros((len(self.masks), len(rows), len(columns)), np.uint8)
        for mask, encoded in zip(masks, self.masks, strict=True):
            _decode(encoded, rows, columns, mask)
        labels = torch.tensor(self.labels, dtype=torch.int64)
        return Sample(image, labels, torch.from_numpy(masks), self.image_id, str(self.path), self.size)


def _decode(
    encoded: dict[str, Any], rows: Int[np.ndarray, " h"], columns: Int[np.ndarray, " w"], mask: UInt8[np.ndarray, "h w"]
) -> None:
    """Write the pixels of a mask at these rows and columns, of which −1 are outside, to a mask of zeros."""
    x, y, width, height = coco_mask.toBbox(encoded).astype(int).tolist()
    down = np.flatnonzero((rows >= y) & (rows < y + height))
    across = np.flatnonzero((columns >= x) & (columns < x + width))
    # run lengths go down the columns; zeros and ones alternate
    places = columns[across] * encoded["size"][0] + rows[down][:, None]
    ends = np.cumsum(run_lengths(encoded["counts"]))
    mask[np.ix_(down, across)] = np.searchsorted(ends, places, side="right") % 2


def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """Annotations file and image folder of a split.

    Raises:
        UserError: no known layout matches; the message lists them.
    """
    if not root.is_dir():
        raise UserError(f"the dataset folder {root} does not exist; set data.root to a COCO-format folder")
    for annotations, folders in _LAYOUTS:
        file = root / annotations.format(split)
        if not file.exists():
            continue
        places = [root / folder.format(split) for folder in folders]
        for place in places:
            if place.is_dir():
                return file, place
        raise UserError(f"{file} is there but none of its image folders: {', '.join(map(str, places))}")
    splits = find_splits(root)
    if splits:
        raise UserError(f"{root} has no annotations of the split '{split}', only of {', '.join(splits)}")
    tried = ", ".join(layout.format(split) for layout, _ in _LAYOUTS)
    raise UserError(
        f"{root} has no annotations of the split '{split}' (looked for {tried}). "
        f"'dimaskdino data import {root} FOLDER' makes a folder in this layout"
    )


def find_splits(root: Path) -> list[str]:
    """Names of the splits that `find_split` finds in a folder, training first."""
    names: set[str] = set()
    for annotations, _ in _LAYOUTS:
        before, after = annotations.split("{}")
        for file in root.glob(annotations.format("*")):
            names.add(file.relative_to(root).as_posix().removeprefix(before).removesuffix(after))
        if names:  # COCO itself has more annotation files of the same images beside the instances
            break
    return sorted(names, key=lambda name: (not name.startswith("train"), not name.startswith("val"), name))


class CocoDataset(torch.utils.data.Dataset[Sample]):
    """The images of a split with their objects, crowds left out.

    Args:
        root: dataset folder, see `find_split` for the layouts.
        split: its name, such as train2017.
        transform: makes the sample of a record; `Record.sample` by default, at the image's own size.
        only_with_objects: leave out images without objects, as training does.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        transform: Callable[[Record], Sample] = Record.sample,
        only_with_objects: bool = False,
    ) -> None:
        self.annotations_file, self.image_folder = find_split(root, split)
        self.annotations = read_annotations(self.annotations_file)
        self.annotations.check_masks()
        categories = sorted(self.annotations.categories, key=lambda category: category["id"])
        self.category_ids = [category["id"] for category in categories]
        self.classes = [category["name"] for category in categories]
        self.transform = transform
        self._label = {category: label for label, category in enumerate(self.category_ids)}
        self._objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in self.annotations.objects:
            self._objects[annotation["image_id"]].append(annotation)
        self.images = self.annotations.images
        if only_with_objects:
            self.images = [image for image in self.images if image["id"] in self._objects]
        if not self.images:
            raise UserError(f"{self.annotations_file} has no image with an object in it")

    def check_classes(self, count: int) -> None:
        """Check that a model for `count` classes fits this dataset.

        Raises:
            UserError: the dataset has another number of categories.
        """
        if len(self.classes) != count:
            raise UserError(
                f"the model has {count} classes, but {self.annotations_file} has {len(self.classes)} categories; for "
                f"training set model.classes={len(self.classes)}"
            )

    def use_classes(self, classes: Sequence[str], settings: config.Data) -> None:
        """Number the classes as a model does, by their names. A note is printed where their order differs.

        Args:
            classes: names of the model's classes, in its order.
            settings: `class_map` and `by_order`.

        Raises:
            UserError: the dataset has other classes.
        """
        self.check_classes(len(classes))
        own = [settings.class_map.get(name, name) for name in self.classes]
        if own == list(classes) or settings.by_order or list(classes) == config.unnamed_classes(len(classes)):
            return
        if sorted(own) != sorted(classes) or len(set(own)) < len(own):
            here = [name for name in own if name not in classes] or own
            there = [name for name in classes if name not in own] or classes
            raise UserError(
                f"{self.annotations_file} has other classes ({', '.join(here[:5])}) than the model "
                f"({', '.join(there[:5])}). Match names with 'data.class_map={{{here[0]}: {there[0]}}}', or take the "
                "classes in the order of their ids with data.by_order=true"
            )
        print(f"note: {self.annotations_file}: classes are matched by name, since their order is not the model's")
        places = [own.index(name) for name in classes]
        self.category_ids, self.classes = [self.category_ids[place] for place in places], list(classes)
        self._label = {category: label for label, category in enumerate(self.category_ids)}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        entry = self.images[index]
        size = (entry["height"], entry["width"])
        masks, labels = [], []
        for annotation in self._objects.get(entry["id"], []):
            mask = to_run_lengths(annotation["segmentation"], size)
            if coco_mask.area(mask):  # zero-area and one-point outlines cover nothing
                masks.append(mask)
                labels.append(self._label[annotation["category_id"]])
        return self.transform(Record(self.image_folder / entry["file_name"], size, entry["id"], labels, masks))


def without_empty(sample: Sample) -> Sample:
    """Drop the objects whose mask is empty."""
    keep = sample.masks.flatten(1).any(1).bool()
    return replace(sample, labels=sample.labels[keep], masks=sample.masks[keep])


def encode_masks(masks: Bool[np.ndarray, "n h w"] | CroppedMasks) -> list[dict[str, Any]]:
    """Compressed run lengths (RLE) of masks, ready for json: `size` [h, w] and `counts`, a string."""
    if isinstance(masks, CroppedMasks):
        found = masks.cpu()
        encoded = [
            _encode(*corner, crop.numpy(), found.size) for corner, crop in zip(found.corners, found.crops, strict=True)
        ]
    else:
        encoded = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in encoded]


def _encode(top: int, left: int, crop: Bool[np.ndarray, "h w"], size: tuple[int, int]) -> dict[str, Any]:
    """Run lengths of a mask of this size that is zero outside a crop: only the crop's columns are looked at."""
    (height, width), (h, w) = size, crop.shape
    columns = np.zeros((height, w), np.uint8, order="F")
    columns[top : top + h] = crop
    before, after = left * height, (width - left - w) * height
    lengths = run_lengths(coco_mask.encode(columns)["counts"]) if w else np.zeros(1, np.int64)
    lengths[0] += before
    if len(lengths) % 2:  # the last run is one of zeros
        lengths[-1] += after
    elif after:
        lengths = np.r_[lengths, after]
    return coco_mask.frPyObjects({"size": list(size), "counts": lengths.tolist()}, *size)
