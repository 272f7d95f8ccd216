"""YOLO segmentation: a data.yaml with the names, and a text file of outlines per image."""

from pathlib import Path, PurePosixPath
from typing import Any

from dimaskdino.config import parse_yaml
from dimaskdino.data.exports import SPLIT_NAMES, ExportedSplit, upright_size
from dimaskdino.data.images import files_in
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import read_text

_KEYS = ("train", "val", "valid", "test")
_BEYOND = 0.5  # of the image's side, how far an outline may reach beyond it; farther, and it is no share of the side


def read(source: Path) -> list[ExportedSplit] | None:
    """The splits of a YOLO export: a folder with its YAML file, or that file. None if there is none.

    Raises:
        UserError: the images or labels are not where the YAML file says, or a label cannot be used.
    """
    found = _settings(source)
    if found is None:
        return None
    file, settings = found
    names = settings["names"]
    if not isinstance(names, list | dict) or not names:
        raise UserError(f"{file}: 'names' must list the classes, got {names!r}")
    named = names if isinstance(names, dict) else dict(enumerate(names))
    classes = [str(name) for name in named.values()]
    index = {str(key): label for label, key in enumerate(named)}
    splits = {}
    for key in _KEYS:
        if settings.get(key):
            images = _images(file, settings, key)
            splits[SPLIT_NAMES[key]] = _split(SPLIT_NAMES[key], classes, index, images)
    if not splits:
        raise UserError(f"{file} names no images; add 'train: images/train' and 'val: images/val'")
    if not any(split.annotations or split.boxes for split in splits.values()):
        example = next(iter(next(iter(splits.values())).paths.values()))
        raise UserError(f"no image of {file} has a label file; that of {example} would be {_label_file(example)}")
    return list(splits.values())


def _settings(source: Path) -> tuple[Path, dict[str, Any]] | None:
    if source.is_file():
        candidates = [source] if source.suffix.lower() in (".yaml", ".yml") else []
    else:
        candidates = sorted([*source.glob("*.y*ml"), *source.glob("*/*.y*ml")], key=lambda file: file.stem != "data")
    for file in candidates:
        try:
            content = parse_yaml(read_text(file), str(file))
        except UserError:
            if source.is_file():
                raise
            continue
        if isinstance(content, dict) and "names" in content:
            return file, content
    return None


def _images(file: Path, settings: dict[str, Any], key: str) -> list[Path]:
    """The images of a split: those in its folders, and those that its lists name."""
    roots = [file.parent / str(settings.get("path") or ""), file.parent]
    entries = settings[key] if isinstance(settings[key], list) else [settings[key]]
    images: list[Path] = []
    for entry in map(str, entries):
        place = _find(entry, roots)
        if place is None:
            raise UserError(f"{file}: '{key}: {entry}' does not exist beside it; correct the path")
        if place.is_dir():
            images += files_in(place)
            continue
        listed = [line.strip() for line in read_text(place).splitlines() if line.strip()]
        for line in listed:
            path = _find(line, [place.parent, *roots])
            if path is None:
                raise UserError(f"{place} names the image '{line}', which does not exist")
            images.append(path)
    if not images:
        raise UserError(f"{file}: '{key}' holds no images")
    return images


def _find(entry: str, roots: list[Path]) -> Path | None:
    """The place that a path means; paths of other machines and Roboflow's '../train/images' count from the roots."""
    parts = [part for part in PurePosixPath(entry.replace("\\", "/")).parts if part not in ("..", "/", ".")]
    for root in roots:
        for start in (0, *range(1, len(parts))):
            for place in (root / entry, root.joinpath(*parts[start:])):
                if place.exists():
                    return place
    return None


def _label_file(image: Path) -> Path:
    """images/train/a.jpg has labels/train/a.txt; without a folder `images` the label lies beside the image."""
    parts = list(image.parts[:-1])
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts, f"{image.stem}.txt")


def _split(name: str | None, classes: list[str], index: dict[str, int], images: list[Path]) -> ExportedSplit:
    split = ExportedSplit(name, classes)
    for path in images:
        h, w = upright_size(path)
        image = split.add_image(path, (h, w))
        labels = _label_file(path)
        if not labels.is_file():
            continue  # an image without objects
        for number, line in enumerate(read_text(labels).splitlines(), start=1):
            if line.strip():
                label, outline = _object(line.split(), index, f"{labels}, line {number}")
                scaled = [x * (h if i % 2 else w) for i, x in enumerate(outline)]
                split.add_object(image, label, [scaled] if scaled else None)
    return split


def _object(words: list[str], index: dict[str, int], where: str) -> tuple[int, list[float]]:
    """Class index and outline, as shares of the image's sides; no outline for a box."""
    label = index.get(words[0])
    if label is None:
        raise UserError(f"{where}: the class {words[0]!r} is not one of the {len(index)} of 'names'")
    try:
        values = [float(word) for word in words[1:]]
    except ValueError:
        raise UserError(f"{where}: something is not a number") from None
    if len(values) == 4:
        return label, []
    if len(values) < 6 or len(values) % 2:
        raise UserError(f"{where}: expected the class and x y of at least three points, got {len(values)} numbers")
    if not all(-_BEYOND <= value <= 1 + _BEYOND for value in values):
        raise UserError(f"{where}: coordinates must be shares of the image's width and height, from 0 to 1")
    return label, values
