"""A folder per image, with the image in `images/` and one mask per object in `masks/` (Data Science Bowl 2018)."""

from pathlib import Path

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
    places = sorted(source.rglob("masks")) if source.is_dir() else []
    folders = [place.parent for place in places if place.is_dir() and (place.parent / "images").is_dir()]
    if not folders:
        return None
    splits: dict[str | None, ExportedSplit] = {}
    for folder in progress_bar(folders, "reading masks"):
        images = _files(folder / "images")
        if len(images) != 1:
            raise UserError(
                f"{folder / 'images'} must hold one image (its masks are in {folder / 'masks'}), got {len(images)}"
            )
        name = split_of_folder(folder.parent, source)
        split = splits.setdefault(name, ExportedSplit(name, [CLASS]))
        size = upright_size(images[0])
        image = split.add_image(images[0], size)
        for mask in _files(folder / "masks"):
            split.add_object(image, 0, read_mask(mask, size, "L") > 0)
    return list(splits.values())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
