"""A folder per image, with the image in `images/` and one mask per object in `masks/` (Data Science Bowl 2018)."""

from pathlib import Path

import numpy as np

from dimaskdino.data.coco import encode_masks
from dimaskdino.data.exports import ExportedSplit, read_mask, split_of_folder, upright_size
from dimaskdino.data.images import SUFFIXES
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.progress import progress_bar

CLASS = "object"


def read(source: Path) -> list[ExportedSplit] | None:
    """The splits of such folders. None if there are none.

    Raises:
        UserError: an image or a mask cannot be read, or they do not fit together.
    """
    folders = [] if source.is_file() else sorted(place.parent for place in source.rglob("masks") if place.is_dir())
    folders = [folder for folder in folders if (folder / "images").is_dir()]
    if not folders:
        return None
    splits: dict[str | None, ExportedSplit] = {}
    for folder in progress_bar(folders, "reading masks"):
        images, masks = _files(folder / "images"), _files(folder / "masks")
        if len(images) != 1:
            raise UserError(
                f"{folder / 'images'} must hold one image, the masks of which lie beside it; got {len(images)}"
            )
        name = split_of_folder(folder.parent, source)
        split = splits.setdefault(name, ExportedSplit(name, [CLASS]))
        size = upright_size(images[0])
        image = split.add_image(images[0], size)
        for mask in masks:
            pixels = np.asarray(read_mask(mask).convert("L")) > 0
            if pixels.shape != size:
                raise UserError(f"{mask} is {pixels.shape[0]}x{pixels.shape[1]}, its image {size[0]}x{size[1]} (h x w)")
            (encoded,) = encode_masks(pixels[None])
            split.add_object(image, 0, encoded)
    return list(splits.values())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
