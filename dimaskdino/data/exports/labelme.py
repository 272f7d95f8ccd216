"""LabelMe: a json file per image."""

import base64
import io
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dimaskdino.data.annotations import check_outline, parse_json
from dimaskdino.data.exports import ExportedSplit, ImageFiles, Outline, json_object, split_of_folder, upright_size
from dimaskdino.utils.errors import UserError

_CIRCLE_POINTS = 64


def read(source: Path) -> list[ExportedSplit] | None:
    """The splits of a folder with LabelMe's files. None if it holds none.

    Raises:
        UserError: a file is damaged, or its image is missing.
    """
    files = [] if source.is_file() else sorted(source.rglob("*.json"))
    if not any({"shapes", "imagePath"} <= json_object(file).keys() for file in files[:20]):
        return None
    contents: dict[Path, dict[str, Any]] = {}
    classes: set[str] = set()
    for file in files:
        content = parse_json(file)
        if "shapes" in content:
            contents[file] = content
            classes.update(_label(shape, file) for shape in _shapes(content, file))
    images = ImageFiles(source)
    splits: dict[str | None, ExportedSplit] = {}
    for file, content in contents.items():
        name = split_of_folder(file.parent, source)
        _add(splits.setdefault(name, ExportedSplit(name, sorted(classes))), file, content, images)
    return list(splits.values())


def _shapes(content: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    shapes = content["shapes"]
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise UserError(f"{file}: 'shapes' must be a list of objects")
    return shapes


def _label(shape: dict[str, Any], file: Path) -> str:
    label = shape.get("label")
    if not isinstance(label, str) or not label.strip():
        raise UserError(f"{file}: a shape has no label")
    return label.strip()


def _add(split: ExportedSplit, file: Path, content: dict[str, Any], images: ImageFiles) -> None:
    name = content.get("imagePath")
    size: tuple[Any, Any] = (content.get("imageHeight"), content.get("imageWidth"))
    if not isinstance(name, str) or not all(type(side) is int and side > 0 for side in size):
        raise UserError(f"{file} has no 'imagePath', 'imageHeight' and 'imageWidth'")
    path = images.require(name, file.stem, near=file, split=split.name)
    if sorted(size) != sorted(upright_size(path)):
        raise UserError(f"{file}: the image is {size[0]}x{size[1]} (h x w), but {path} has another size")
    image = split.add_image(path, size)
    outlines: dict[tuple[int, Any], list[Outline]] = defaultdict(list)
    for number, shape in enumerate(_shapes(content, file)):
        label, kind = split.classes.index(_label(shape, file)), shape.get("shape_type", "polygon")
        # parts of one object, such as what is left of it behind a pole, have one group
        group = shape.get("group_id")
        key = (label, f"shape {number}" if group is None else str(group))
        if kind == "mask":
            split.add_object(image, label, _mask(shape, size, file))
        elif kind == "rectangle":
            outlines[key] += []  # a box without a mask, unless other parts have one
        elif kind in ("polygon", "circle"):
            outlines[key].append(_outline(shape, kind, file))
        else:
            split.remarks[f"shapes of the type {kind}, left out"] += 1
    for (label, _), parts in outlines.items():
        split.add_object(image, label, parts)


def _points(shape: dict[str, Any], file: Path) -> list[tuple[float, float]]:
    try:
        points = [(float(x), float(y)) for x, y in shape["points"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{file}: the points of a shape must be pairs [x, y]") from None
    try:
        check_outline([value for point in points for value in point])
    except ValueError as error:
        raise UserError(f"{file}: a shape {error}") from None
    return points


def _outline(shape: dict[str, Any], kind: str, file: Path) -> Outline:
    points = _points(shape, file)
    if kind == "circle":
        if len(points) != 2:
            raise UserError(f"{file}: a circle must have its centre and a point on it, got {len(points)} points")
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        angles = np.linspace(0, 2 * math.pi, _CIRCLE_POINTS, endpoint=False)
        points = [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]
    if len(points) < 3:
        raise UserError(f"{file}: a polygon must have at least three points, got {len(points)}")
    return [value for point in points for value in point]


def _mask(shape: dict[str, Any], size: tuple[int, int], file: Path) -> np.ndarray:
    """A mask (h, w) that is stored as a small image at the shape's first point."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as stored:
            small = np.asarray(stored.convert("L")) > 0
    except (KeyError, TypeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: the mask of a shape cannot be read ({error})") from None
    points = _points(shape, file)
    if not points:
        raise UserError(f"{file}: a mask has no points, of which the first is its corner")
    left, top = map(round, points[0])
    whole = np.zeros(size, bool)
    area = whole[max(top, 0) : max(top + small.shape[0], 0), max(left, 0) : max(left + small.shape[1], 0)]
    area |= small[max(-top, 0) :, max(-left, 0) :][: area.shape[0], : area.shape[1]]
    return whole
