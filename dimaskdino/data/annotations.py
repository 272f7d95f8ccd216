"""Read annotations in COCO format.

Training, evaluation and `dimaskdino data check` share this reader. It accepts each entry; or repairs it, which is
counted and reported; or refuses it with its id, the problem and a remedy.
"""

import gc
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from pycocotools import mask as coco_mask

from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import is_text, read_text

LARGEST_ID = 2**63 - 1
LARGEST_EXACT = 2**53  # COCO's evaluation keeps ids as floating-point numbers, which are exact up to here
LARGEST_SIDE = 2**16 - 1  # pixels, of an image
FARTHEST = 2.0**17  # pixels, of a coordinate
LONGEST = 2.0**22  # pixels, of an outline; pycocotools takes 80 bytes for each of them

Entry = dict[str, Any]
Size = tuple[int, int]  # h, w


@dataclass(frozen=True)
class Annotations:
    """The usable content of an annotations file.

    Attributes:
        file: where it comes from.
        images: entries with `id`, `file_name`, `height` and `width`. Where a file has ids of images or categories from
            2^53 on, these are numbered anew in their order. Sizes are in pixels, before or after the
            orientation stored in the file is applied.
        categories: entries with `id` and `name`.
        annotations: entries with an `id` of their own, `image_id`, `category_id`, `bbox` (xywh, pixels), `area`
            (pixels), `iscrowd` (0 or 1) and `segmentation` (outlines or run lengths).
        repaired: number of repairs of each kind.
        problems: messages about the entries that cannot be used, which are left out.
    """

    file: Path
    images: list[Entry]
    categories: list[Entry]
    annotations: list[Entry]
    repaired: Mapping[str, int]
    problems: tuple[str, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """Sentences about the repairs."""
        return [f"{self.file}: {count:,} {repair}" for repair, count in self.repaired.items()]

    @property
    def objects(self) -> list[Entry]:
        """The annotations that are not crowds."""
        return [annotation for annotation in self.annotations if not annotation["iscrowd"]]

    def check_entries(self) -> None:
        """Check that every entry can be used.

        Raises:
            UserError: the first problem, with the number of others.
        """
        if self.problems:
            others = len(self.problems) - 1
            more = f", and {others:,} more entries" if others else ""
            raise UserError(f"{self.problems[0]}{more} ('dimaskdino data check' lists all)")

    def check_masks(self) -> None:
        """Check that there are masks to learn from, which exports of boxes lack.

        Raises:
            UserError: there are objects, and none has a mask.
        """
        objects = self.objects
        if objects and not any(annotation["segmentation"] for annotation in objects):
            raise UserError(
                f"{self.file}: none of the {len(objects):,} objects has a mask; the model needs masks, boxes are not "
                "enough. Export polygons or masks from the annotation tool"
            )

    def as_coco(self) -> dict[str, list[Entry]]:
        """The content as a COCO dictionary."""
        return {"images": self.images, "categories": self.categories, "annotations": self.annotations}


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause the garbage collector for a `with` block or a decorated function that makes many objects.

    A full collection takes 0.4 s with PyTorch loaded. Without it, reading annotations takes a third less time, and
    listing 500,000 masks as dictionaries 0.5 s instead of 1.9 s.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@without_collection()
def read_annotations(file: Path) -> Annotations:
    """Read a COCO annotations file.

    Raises:
        UserError: the file cannot be read, is not in COCO format, or has an entry that cannot be used.
    """
    found = inspect_annotations(file)
    found.check_entries()
    return found


def inspect_annotations(file: Path) -> Annotations:
    """Read a COCO annotations file, collecting problems with single entries instead of raising them.

    Raises:
        UserError: the file cannot be read or is not in COCO format.
    """
    return inspect_content(parse_json(file), file)


def parse_json(file: Path) -> Entry:
    """The object that a json file holds.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} is not in COCO format: it holds a {type(content).__name__}, expected an object")
    return content


def read_json(file: Path) -> Any:
    """What a json file holds.

    Raises:
        UserError: the file cannot be read.
    """
    text = read_text(file, "annotations")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid json ({error}); was it copied completely?") from None


def inspect_content(content: Entry, file: Path) -> Annotations:
    """Check the content of a COCO annotations file, collecting problems with single entries.

    Args:
        content: what `parse_json` read.
        file: where it comes from.

    Raises:
        UserError: it is not in COCO format.
    """
    for part in _FIELDS:
        if not isinstance(content.get(part), list):
            raise UserError(f"{file} is not in COCO format: it has no list '{part}'")
        if part != "annotations" and not content[part]:
            raise UserError(f"{file} lists no {part}")
    repaired: Counter[str] = Counter()
    problems: list[str] = []
    images = _validated(content["images"], "images", repaired, problems)
    categories = _validated(content["categories"], "categories", repaired, problems)
    entries = _validated(content["annotations"], "annotations", repaired, problems)
    problems += _duplicates(images, "image") + _duplicates(categories, "category")
    _name_categories(categories, repaired)

    sizes = image_sizes(images)
    known = {category["id"] for category in categories}
    # annotations of an image that cannot be used need no message of their own
    refused = _ids(content["images"]) - sizes.keys()
    annotations = []
    for entry in entries:
        if entry["image_id"] in refused:
            continue
        try:
            annotations.append(_complete(entry, sizes, known, repaired))
        except ValueError as error:
            problems.append(f"annotation {_short(entry.get('id'))} of image {entry['image_id']} {error}")
    _number(annotations, repaired)
    _shorten_ids(images, annotations, "image_id", repaired)
    _shorten_ids(categories, annotations, "category_id", repaired)
    named = tuple(f"{file}: {problem}" for problem in problems)
    return Annotations(file, images, categories, annotations, dict(repaired), named)


def image_sizes(images: Iterable[Entry]) -> dict[int, Size]:
    """(h, w) of each image by its id."""
    return {image["id"]: (image["height"], image["width"]) for image in images}


# ---- single fields: each check returns the value to use, and adds to `repairs` what it changed


def _integer(value: Any, repairs: list[str]) -> int:
    if type(value) is int and 0 <= value <= LARGEST_ID:
        return value
    number = _as_integer(value, repairs)
    if number is None or not 0 <= number <= LARGEST_ID:
        raise ValueError(f"must be an integer from 0 to {LARGEST_ID}; number the entries")
    return number


def _side(value: Any, repairs: list[str]) -> int:
    number = value if type(value) is int else _as_integer(value, repairs)
    if number is None or not 1 <= number <= LARGEST_SIDE:
        raise ValueError(f"must be the image's size in pixels, from 1 to {LARGEST_SIDE}")
    return number


def _as_integer(value: Any, repairs: list[str]) -> int | None:
    """The integer that a text or a whole floating-point number stands for; None if it stands for none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.strip().isdigit() and len(value) < 20:
        repairs.append("numbers given as text")
        return int(value)
    return None


def _file_name(value: Any, repairs: list[str]) -> str:
    if not isinstance(value, str) or not value.strip() or not _can_be_opened(value):
        raise ValueError("must be the path of an image, relative to the image folder")
    return value


def _can_be_opened(name: str) -> bool:
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half a character; on Linux names of any bytes have a form of their own
        return False


def _crowd(value: Any, repairs: list[str]) -> int:
    if type(value) is int and value in (0, 1):
        return value
    known: dict[Any, int] = {None: 0, "0": 0, "1": 1, False: 0, True: 1}  # 0.0 and 1.0 are equal to the last two
    if not isinstance(value, None | bool | str | float) or value not in known:
        raise ValueError("must be 0 (an object) or 1 (a crowd)")
    repairs.append("iscrowd given as text or empty")
    return known[value]


def _box(value: Any, repairs: list[str]) -> list[float] | None:
    """A box; None for one to be computed from the mask."""
    right = isinstance(value, list) and len(value) == 4 and all(isinstance(x, int | float) for x in value)
    if not right or not all(-FARTHEST < x < FARTHEST for x in value) or value[2] < 0 or value[3] < 0:
        return None
    return list(map(float, value))


def _area(value: Any, repairs: list[str]) -> float | None:
    """An area; None for one to be computed from the mask."""
    right = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST_SIDE**2
    return float(value) if right else None


def _segmentation(value: Any, repairs: list[str]) -> list[list[float]] | Entry | None:
    if value is None or isinstance(value, dict):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a list of outlines [x1, y1, x2, y2, …] or run lengths {size, counts}")
    kept = []
    for outline in value:
        check_outline(outline)
        if len(outline) >= 6:
            kept.append(outline)
        else:
            repairs.append("outlines of fewer than three points, left out")
    return kept


def check_outline(outline: Any) -> None:
    """Check an outline before any rasteriser sees it: pycocotools crashes on numbers that no image has.

    Raises:
        ValueError: it is no list of pairs of numbers, is longer than `LONGEST`, or has a number that is not finite or
            beyond `FARTHEST`.
    """
    if not isinstance(outline, list) or len(outline) % 2:
        raise ValueError("has an outline that is not a list of pairs x, y; write [x1, y1, x2, y2, …]")
    try:
        least, most = min(outline, default=0), max(outline, default=0)
        # the sum of a list with NaN or infinity is one of them, whatever the order
        if not (least > -FARTHEST and most < FARTHEST and math.isfinite(sum(outline))):
            raise ValueError(f"has a coordinate that is not finite or beyond ±{FARTHEST:,.0f} pixels; correct it")
    except TypeError:
        raise ValueError("has an outline with something that is not a number; correct it") from None
    # the length is at most the product, which spares all but a few outlines the exact sum
    if len(outline) / 2 * (most - least) > LONGEST and (length := _length(outline)) > LONGEST:
        raise ValueError(f"has an outline of {length:,.0f} pixels, longer than any image explains; draw it again")


def _length(outline: list[float]) -> float:
    points = np.reshape(outline, (-1, 2))
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(1).sum())


def _unchecked(value: Any, repairs: list[str]) -> Any:
    return value


Check = Callable[[Any, list[str]], Any]
_FIELDS: dict[str, dict[str, Check]] = {  # other fields are dropped
    "images": {"id": _integer, "file_name": _file_name, "height": _side, "width": _side},
    "categories": {"id": _integer, "name": _unchecked},
    "annotations": {
        "id": _unchecked,
        "image_id": _integer,
        "category_id": _integer,
        "bbox": _box,
        "area": _area,
        "iscrowd": _crowd,
        "segmentation": _segmentation,
    },
}
_REQUIRED = {
    "images": {"id", "file_name", "height", "width"},
    "categories": {"id"},
    "annotations": {"image_id", "category_id"},
}
_SINGULAR = {"images": "image", "categories": "category", "annotations": "annotation"}


def _validated(entries: list[Any], part: str, repaired: Counter[str], problems: list[str]) -> list[Entry]:
    """The valid entries; the others add to the problems."""
    valid = []
    for number, entry in enumerate(entries, start=1):
        repairs: list[str] = []
        try:
            valid.append(_checked_fields(entry, part, repairs))
        except ValueError as error:
            problems.append(f"{_describe(entry, part, number)}{error}")
        else:
            repaired.update(repairs)
    return valid


def _checked_fields(entry: Any, part: str, repairs: list[str]) -> Entry:
    if not isinstance(entry, dict):
        raise ValueError(f" is {_short(entry)}, expected an object {{…}}")
    checked = {}
    for field, check in _FIELDS[part].items():
        if field in entry:
            try:
                checked[field] = check(entry[field], repairs)
            except ValueError as error:
                raise ValueError(f": '{field}' {error}; it is {_short(entry[field])}") from None
        elif field in _REQUIRED[part]:
            raise ValueError(f" has no '{field}'; add it or remove the {_SINGULAR[part]}")
    return checked


def _describe(entry: Any, part: str, number: int) -> str:
    if not isinstance(entry, dict) or "id" not in entry:
        name = f"{_SINGULAR[part]} number {number}"
    else:
        name = f"{_SINGULAR[part]} {_short(entry['id'])}"
    if part == "annotations" and isinstance(entry, dict) and "image_id" in entry:
        name += f" of image {_short(entry['image_id'])}"
    return name


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= 40 else f"{text[:40]}…"


# ---- entries together


def _duplicates(entries: list[Entry], what: str) -> list[str]:
    counts = Counter(entry["id"] for entry in entries)
    return [f"{what} id {i} occurs {n} times; ids must be unique" for i, n in counts.items() if n > 1]


def _ids(entries: list[Any]) -> set[Any]:
    """The ids that entries have before any check; numbers and texts, since nothing else can be looked up."""
    ids = set()
    for entry in entries:
        if isinstance(entry, dict) and not isinstance(entry.get("id"), dict | list):
            ids.add(entry.get("id"))
    return ids


def _name_categories(categories: list[Entry], repaired: Counter[str]) -> None:
    for category in categories:
        name = category.get("name")
        if not is_text(name) or not str(name).strip():
            repaired["categories without a usable name, named by their id"] += 1
            category["name"] = str(category["id"])


def _complete(annotation: Entry, sizes: Mapping[int, Size], categories: set[int], repaired: Counter[str]) -> Entry:
    """The annotation with all its fields.

    Raises:
        ValueError: it cannot be used: its image or category is unknown, or it has no mask that fits.
    """
    if annotation["category_id"] not in categories:
        raise ValueError(f"has the unknown category {annotation['category_id']}; add it to 'categories'")
    if annotation["image_id"] not in sizes:
        raise ValueError("belongs to an unknown image; add it to 'images' or remove the annotation")
    size = sizes[annotation["image_id"]]
    annotation.setdefault("iscrowd", 0)
    segmentation = annotation.get("segmentation")
    if segmentation is None:
        if not annotation["iscrowd"] or annotation.get("bbox") is None:
            raise ValueError("has no segmentation; the model needs masks, boxes are not enough")
        repaired["crowds without a mask, for which their box is taken"] += 1
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    elif isinstance(segmentation, dict):
        check_run_lengths(segmentation, size)
    for field, measure in (("bbox", coco_mask.toBbox), ("area", coco_mask.area)):
        if annotation.get(field) is None:
            repaired[f"'{field}' missing or unusable, computed from the masks"] += 1
            annotation[field] = measure(to_run_lengths(annotation["segmentation"], size)).tolist()
    return annotation


def _number(annotations: list[Entry], repaired: Counter[str]) -> None:
    """Number the annotations anew unless each has a valid id of its own, by which scoring tells them apart."""
    ids = [annotation.get("id") for annotation in annotations]
    if all(type(i) is int and 0 < i <= LARGEST_ID for i in ids) and len(set(ids)) == len(ids):
        return
    repaired["annotations numbered anew, since ids were missing or not unique"] += len(annotations)
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number


def _shorten_ids(entries: list[Entry], annotations: list[Entry], key: str, repaired: Counter[str]) -> None:
    """Number images or categories anew, in the order of their ids, if an id is too large for scoring."""
    ids = sorted(entry["id"] for entry in entries)
    if not ids or ids[-1] < LARGEST_EXACT:
        return
    repaired[f"{key}s numbered anew in their order, since ids from 2^53 on are not exact in scoring"] += len(ids)
    number = {old: new for new, old in enumerate(ids, start=1)}
    for entry in entries:
        entry["id"] = number[entry["id"]]
    for annotation in annotations:
        annotation[key] = number[annotation[key]]


# ---- masks


def to_run_lengths(segmentation: list[list[float]] | dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The mask of a checked segmentation as compressed run lengths.

    Args:
        segmentation: outlines, or run lengths of either kind.
        size: (h, w) of the image.
    """
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size)) if segmentation else _empty(size)
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, *size)
    return segmentation


def _empty(size: tuple[int, int]) -> dict[str, Any]:
    return coco_mask.frPyObjects({"size": list(size), "counts": [size[0] * size[1]]}, *size)


def check_run_lengths(rle: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Check that run lengths cover an image exactly; pycocotools reads beyond the end of those that do not.

    Raises:
        ValueError: they do not.
    """
    counts, own = rle.get("counts"), rle.get("size")
    if not isinstance(own, list) or [type(side) for side in own] != [int, int]:
        raise ValueError("has run lengths without a size [h, w]")
    if tuple(own) != size:
        raise ValueError(f"has run lengths for {own}, but its image is {list(size)} (h, w)")
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("has run lengths with something that is not a number of pixels")
        lengths = counts
    elif isinstance(counts, str | bytes):
        lengths = run_lengths(counts).tolist()
    else:
        raise ValueError("has run lengths without counts")
    covered = int(sum(lengths))
    if min(lengths, default=0) < 0 or covered != size[0] * size[1]:
        raise ValueError(f"has run lengths that cover {covered} pixels, of an image of {size[0] * size[1]}")


def run_lengths(counts: str | bytes) -> Int[np.ndarray, " runs"]:
    """Decode compressed run lengths: numbers in groups of five bits, from the fourth on relative to two before.

    Raises:
        ValueError: the text is none.
    """
    groups = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    last = groups & 0x20 == 0
    starts = np.flatnonzero(np.r_[True, last[:-1]])
    sizes = np.diff(np.r_[starts, len(groups)])
    if len(groups) and (groups.min() < 0 or groups.max() > 63 or sizes.max() > 10):
        raise ValueError("has run lengths that are not in COCO's compressed form")
    if len(groups) and not last[-1]:
        raise ValueError("has compressed run lengths that end in the middle of a number")
    if not len(groups):
        return groups
    shift = 5 * (np.arange(len(groups)) - np.repeat(starts, sizes))
    numbers = np.add.reduceat((groups & 0x1F) << shift, starts)
    numbers -= np.where(groups[last] & 0x10, 1 << 5 * sizes, 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers
