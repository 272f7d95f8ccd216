"""Convert images to (3, h, w) uint8 RGB: files, Pillow images, arrays and tensors."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import require_regular

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

_TURNED = (5, 6, 7, 8)  # values of the EXIF orientation that exchange height and width
_NATIVE = {"b": np.bool_, "u": np.int64, "i": np.int64, "f": np.float64}

ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor


def to_image_tensor(image: ImageInput) -> UInt8[Tensor, "3 h w"]:
    """Convert an image to (3, h, w) uint8, RGB.

    Args:
        image: a path; a Pillow image of any mode; an array (h, w, 3) or (h, w); or a tensor (3, h, w) or (1, h, w).
            Integers are 0 to 255, floating-point numbers 0 to 1, booleans black or white. `load_image` says how files
            and Pillow images with other values are converted.

    Raises:
        UserError: the file cannot be read, or the array has another shape, type or range.
    """
    if isinstance(image, str | os.PathLike):
        return load_image(Path(image))
    if isinstance(image, Image.Image):
        return _from_pillow(ImageOps.exif_transpose(image))
    if isinstance(image, np.ndarray):
        kind = image.dtype.kind
        if kind not in "buif":
            raise UserError(f"the values of an image are numbers, got an array of the type {image.dtype}")
        # PyTorch has no other byte orders, and not every type of numpy
        array = torch.from_numpy(np.ascontiguousarray(image, np.uint8 if image.dtype == np.uint8 else _NATIVE[kind]))
        array = array[None] if array.ndim == 2 else array.movedim(-1, 0)
        expected = "an array (h, w, 3) or (h, w)"
    elif isinstance(image, Tensor):
        array, expected = image.detach().cpu(), "a tensor (3, h, w) or (1, h, w)"
    else:
        raise UserError(f"an image is a path, a Pillow image, an array or a tensor, got {type(image).__name__}")
    if array.ndim != 3 or array.shape[0] not in (1, 3) or 0 in array.shape:
        raise UserError(f"expected {expected}, got the shape {tuple(image.shape)}")
    return _to_uint8(array).expand(3, -1, -1).contiguous()


def _to_uint8(array: Tensor) -> UInt8[Tensor, "c h w"]:
    if array.dtype == torch.uint8:
        return array
    if array.is_complex():
        raise UserError(f"the values of an image are real numbers, got a tensor of the type {array.dtype}")
    limit = 1 if array.is_floating_point() or array.dtype == torch.bool else 255
    array = array.double()  # PyTorch finds no minimum of some types
    low, high = float(array.min()), float(array.max())
    if not 0 <= low <= high <= limit:  # also false for NaN
        raise UserError(
            f"{'floating-point' if limit == 1 else 'integer'} images have values from 0 to {limit}, got {low:g} to "
            f"{high:g}; convert it to uint8"
        )
    return (array * (255 / limit)).round().to(torch.uint8)


@contextlib.contextmanager
def open_image(path: Path, what: str = "image") -> Iterator[Image.Image]:
    """Open an image file; it is decoded when the pixels are asked for, inside the `with` block.

    Args:
        path: the file.
        what: names it in error messages.

    Raises:
        UserError: the file is missing, truncated or no image.
    """
    require_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damage that is an error below, or does not matter
            # given the path, Pillow maps an uncompressed TIFF to memory, and mixes up the pixels of a turned one
            with path.open("rb") as file, Image.open(file) as opened:
                yield opened
    except FileNotFoundError:
        raise UserError(f"the {what} {path} does not exist") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"the {what} {path} cannot be read, it may be truncated or no image: {error}") from None


def load_image(
    path: Path, expected: tuple[int | None, int | None] = (None, None), least: tuple[int, int] | None = None
) -> UInt8[Tensor, "3 h w"]:
    """Load any image that Pillow reads as RGB. Grey, palette and CMYK images are converted, alpha is dropped.

    Of grey images with more than 8 bits, the largest value becomes white if it exceeds 255, or 1 for floating-point
    values; otherwise 255 or 1 is white. Zero is black, as are negative values and NaN.

    Args:
        path: the file.
        expected: (h, w) according to the annotations. The orientation stored in the file is applied unless only the
            unrotated image has that size.
        least: decode a larger JPEG at a half, a quarter or an eighth of its size, if that is at least this (h, w).

    Raises:
        UserError: the file is missing, truncated or no image, or has another size than expected.
    """
    with open_image(path) as opened:
        stored = (opened.height, opened.width)
        # Pillow applies the orientation of a TIFF itself
        orientation = 1 if opened.format == "TIFF" else opened.getexif().get(ExifTags.Base.Orientation, 1)
        upright = stored[::-1] if orientation in _TURNED else stored
        applied = None in expected or expected == upright
        if not applied and expected != stored:
            raise UserError(
                f"the image {path} is {stored[0]}x{stored[1]}, the annotations say {expected[0]}x{expected[1]} (h x w)"
            )
        if least is not None:
            opened.draft(opened.mode, least if applied and orientation in _TURNED else least[::-1])
        opened.load()
        return _from_pillow(ImageOps.exif_transpose(opened) if applied and orientation != 1 else opened)


def _from_pillow(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    if (found := _deep_range(image)) is not None:
        white = max(1 if image.mode == "F" else 255, found[1])
        values = np.nan_to_num(np.asarray(image).astype(np.float64) * 255 / white)
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    if image.mode != "RGB":
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _deep_range(image: Image.Image) -> tuple[float, float] | None:
    if not (image.mode.startswith("I") or image.mode == "F"):
        return None
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def deep_range(path: Path) -> tuple[float, float] | None:
    """The smallest and the largest finite value of a grey image with more than 8 bits; None for other images.

    Raises:
        UserError: it cannot be read.
    """
    with open_image(path) as image:
        return _deep_range(image)


def files_in(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files with these suffixes in a folder and all its subfolders, in order."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes and not path.is_dir()]


def find_files(paths: Sequence[Path], suffixes: Sequence[str] = SUFFIXES) -> list[tuple[Path, Path]]:
    """List image files, folders searched with all their subfolders.

    Args:
        paths: files and folders.
        suffixes: what counts as a file of interest inside a folder.

    Returns:
        Each file with its path relative to the argument it was found under: for a file given directly its name, and
        with several folders the folder's name first.

    Raises:
        UserError: a path does not exist, or there is no such file at all.
    """
    files: list[tuple[Path, Path]] = []
    several = sum(path.is_dir() for path in paths) > 1
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        if path.is_dir():
            start = Path(path.resolve().name) if several else Path()
            files += [(file, start / file.relative_to(path)) for file in files_in(path, suffixes)]
        else:
            files.append((path, Path(path.name)))
    if not files:
        raise UserError(f"no file of the types {', '.join(suffixes)} in {', '.join(map(str, paths))}")
    return files
