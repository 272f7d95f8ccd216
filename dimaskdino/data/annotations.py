"""Read annotations in COCO format.

Training, evaluation and `dimaskdino data check` share this reader. It accepts each entry; or repairs it, which is
counted and reported; or refuses it with its id, the problem and a remedy.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic needs this one before Python 3.12
)

from pycocotools import mask as coco_mask
from pydantic import BeforeValidator, TypeAdapter, ValidationError, ValidationInfo
from typing_extensions import TypedDict

from dimaskdino.utils.collection import without_collection
from dimaskdino.utils.errors import UserError

LARGEST_ID = 2**63 - 1
LARGEST_SIDE = 2**16 - 1  # pixels, of an image
FARTHEST = 2.0**17  # pixels, of a coordinate
_MAKE_INTEGERS = f"must be an integer from 0 to {LARGEST_ID}; number the records"


def _integer(value: Any, info: ValidationInfo) -> int:
    if type(value) is int and 0 <= value <= LARGEST_ID:
        return value
    number = _as_integer(value, info)
    if number is None or not 0 <= number <= LARGEST_ID:
        raise ValueError(_MAKE_INTEGERS)
    return number


def _side(value: Any, info: ValidationInfo) -> int:
    number = value if type(value) is int else _as_integer(value, info)
    if number is None or not 1 <= number <= LARGEST_SIDE:
        raise ValueError(f"must be the image's size in pixels, from 1 to {LARGEST_SIDE}")
    return number


def _as_integer(value: Any, info: ValidationInfo) -> int | None:
    """The integer that a text or a whole floating-point number stands for; None if it stands for none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.strip().isdigit() and len(value) < 20:
        info.context["numbers given as text"] += 1
        return int(value)
    return None


def _file_name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("must be the path of an image, relative to the image folder")
    return value


def _crowd(value: Any, info: ValidationInfo) -> int:
    if type(value) is int and value in (0, 1):
        return value
    known = {None: 0, "0": 0, "1": 1, False: 0, True: 1}  # 0.0 and 1.0 are equal to the last two
    if not isinstance(value, None | bool | str | float) or value not in known:
        raise ValueError("must be 0 (an object) or 1 (a crowd)")
    info.context["iscrowd given as text or empty"] += 1
    return known[value]


def _box(value: Any) -> list[float] | None:
    """A box, None for one that has to be made from the mask."""
    right = isinstance(value, list) and len(value) == 4 and all(isinstance(x, int | float) for x in value)
    if not right or not all(-FARTHEST < x < FARTHEST for x in value) or value[2] < 0 or value[3] < 0:
        return None
    return value


def _area(value: Any) -> float | None:
    """An area, None for one that has to be made from the mask."""
    right = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST_SIDE**2
    return value if right else None


def _segmentation(value: Any, info: ValidationInfo) -> list[list[float]] | dict[str, Any] | None:
    if isinstance(value, list):
        outlines = [_outline(outline) for outline in value]
        kept = [outline for outline in outlines if len(outline) >= 6]
        if len(kept) < len(outlines):
            info.context["outlines of fewer than three points, left out"] += len(outlines) - len(kept)
        return kept
    if value is None or isinstance(value, dict):
        return value
    raise ValueError("must be a list of outlines [x1, y1, x2, y2, …] or run lengths {size, counts}")


def _outline(outline: Any) -> list[float]:
    try:
        if not isinstance(outline, list) or len(outline) % 2:
            raise ValueError("has an outline that is not a list of pairs x, y; write [x1, y1, x2, y2, …]")
        # the sum of a list with NaN or infinity is one of them, whatever the order
        if outline and not (math.isfinite(sum(outline)) and min(outline) > -FARTHEST and max(outline) < FARTHEST):
            raise ValueError(f"has a coordinate that is not finite or beyond ±{FARTHEST:,.0f} pixels; correct it")
    except TypeError:
        raise ValueError("has an outline with something that is not a number; correct it") from None
    return outline


Id = Annotated[int, BeforeValidator(_integer)]
Side = Annotated[int, BeforeValidator(_side)]


class ImageRecord(TypedDict):
    """One of `images`. Sizes are in pixels, before the orientation stored in the file is applied or after."""

    id: Id
    file_name: Annotated[str, BeforeValidator(_file_name)]
    height: Side
    width: Side


class CategoryRecord(TypedDict):
    """One of `categories`. Without a name, the id is its name."""

    id: Id
    name: NotRequired[Any]


class AnnotationRecord(TypedDict):
    """One of `annotations`: boxes are xywh in pixels, masks are outlines or run lengths."""

    id: NotRequired[Any]
    image_id: Id
    category_id: Id
    bbox: NotRequired[Annotated[list[float] | None, BeforeValidator(_box)]]
    area: NotRequired[Annotated[float | None, BeforeValidator(_area)]]
    iscrowd: NotRequired[Annotated[int, BeforeValidator(_crowd)]]
    segmentation: NotRequired[Annotated[Any, BeforeValidator(_segmentation)]]


_SCHEMAS = {
    "images": TypeAdapter(list[ImageRecord]),
    "categories": TypeAdapter(list[CategoryRecord]),
    "annotations": TypeAdapter(list[AnnotationRecord]),
}


@dataclass(frozen=True)
class Annotations:
    """The content of a file, in which every record can be used.

    Attributes:
        file: where it comes from.
        images, categories, annotations: the records, in the form of COCO, complete: each annotation has an `id` of its
            own, `image_id`, `category_id`, `bbox` (xywh, pixels), `area` (pixels), `iscrowd` (0 or 1), `segmentation`.
        repaired: what was repaired, and how often.
        problems: what is wrong with the records that cannot be used, which are left out.
    """

    file: Path
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    repaired: Mapping[str, int]
    problems: tuple[str, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """What was repaired, for people."""
        return [f"{self.file}: {count:,} {what}" for what, count in self.repaired.items()]

    @property
    def objects(self) -> list[dict[str, Any]]:
        """The annotations that are no crowds."""
        return [annotation for annotation in self.annotations if not annotation["iscrowd"]]

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

    def as_coco(self) -> dict[str, list[dict[str, Any]]]:
        """The content as a COCO dictionary."""
        return {"images": self.images, "categories": self.categories, "annotations": self.annotations}


@without_collection()
def read_annotations(file: Path) -> Annotations:
    """Read a COCO annotations file.

    Raises:
        UserError: the file cannot be read, is not in COCO format, or has a record that cannot be used.
    """
    return without_problems(inspect_annotations(file))


def without_problems(found: Annotations) -> Annotations:
    """The annotations themselves.

    Raises:
        UserError: a record cannot be used.
    """
    if found.problems:
        more = f", and {len(found.problems) - 1:,} more records" if len(found.problems) > 1 else ""
        raise UserError(f"{found.problems[0]}{more} ('dimaskdino data check' lists all)")
    return found


def inspect_annotations(file: Path) -> Annotations:
    """Read a COCO annotations file, and collect what is wrong with single records instead of raising it.

    Raises:
        UserError: the file cannot be read or is not in COCO format.
    """
    return inspect_records(parse_json(file), file)


def inspect_records(content: dict[str, Any], file: Path) -> Annotations:
    """Check the content of a COCO annotations file; what is wrong with single records is collected, not raised.

    Args:
        content: what `parse_json` read.
        file: where it comes from.

    Raises:
        UserError: it is not in COCO format.
    """
    repaired: Counter[str] = Counter()
    records, problems = {}, []
    for part in ("images", "categories", "annotations"):
        if not isinstance(content.get(part), list):
            raise UserError(f"{file} is not in COCO format: it has no list '{part}'")
        if part != "annotations" and not content[part]:
            raise UserError(f"{file} lists no {part}")
        records[part], wrong = _validate(content[part], part, repaired)
        problems += wrong
    for part, what in (("images", "image"), ("categories", "category")):
        problems += _duplicates(records[part], what)
    for category in records["categories"]:
        if not isinstance(category.get("name"), str) or not category["name"].strip():
            repaired["categories without a name, named by their id"] += 1
            category["name"] = str(category["id"])
    checker = _Checker(records["images"], records["categories"], repaired)
    # annotations of an image that cannot be used need no message of their own
    listed = {image.get("id") for image in content["images"] if isinstance(image, dict) and _hashable(image.get("id"))}
    refused = listed - checker.sizes.keys()
    annotations, wrong = _collect(
        (record for record in records["annotations"] if record["image_id"] not in refused), checker.complete
    )
    problems += wrong
    _number(annotations, repaired)
    named = tuple(f"{file}: {problem}" for problem in problems)
    return Annotations(file, records["images"], records["categories"], annotations, dict(repaired), named)


def parse_json(file: Path) -> dict[str, Any]:
    """The object that a json file holds.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the annotations {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not in UTF-8; save it in that encoding") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid json ({error}); was it copied completely?") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not in COCO format: it holds a {type(content).__name__}, expected an object")
    return content


def _validate(records: list[Any], part: str, repaired: Counter[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The valid records, and what is wrong with the others."""
    what = {"images": "image", "categories": "category", "annotations": "annotation"}[part]
    counts: Counter[str] = Counter()  # not those of a pass that fails
    try:
        valid: list[Any] = _SCHEMAS[part].validate_python(records, context=counts)
    except ValidationError as error:
        wrong: dict[int, str] = {}
        for problem in error.errors(include_url=False):
            index, *field = problem["loc"]
            wrong.setdefault(int(index), _describe(what, int(index), records[int(index)], field, problem))
        rest = [record for index, record in enumerate(records) if index not in wrong]
        valid, _ = _validate(rest, part, repaired)
        return valid, list(wrong.values())
    repaired.update(counts)
    return valid, []


def _describe(what: str, index: int, record: Any, field: list[Any], problem: Any) -> str:
    if not isinstance(record, dict):
        return f"{what} number {index + 1} is {_short(record)}, expected an object {{…}}"
    name = f"{what} {_short(record['id'])}" if "id" in record else f"{what} number {index + 1}"
    if what == "annotation" and "image_id" in record:
        name += f" of image {_short(record['image_id'])}"
    if problem["type"] == "missing":
        return f"{name} has no '{field[0]}'; add it or remove the {what}"
    reason = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"].lower()
    return f"{name}: '{field[0]}' {reason}; it is {_short(problem['input'])}"


def _short(value: Any, length: int = 40) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= length else f"{text[:length]}…"


def _hashable(value: Any) -> bool:
    return not isinstance(value, dict | list)


def _collect(
    records: Iterable[dict[str, Any]], complete: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    valid, wrong = [], []
    for record in records:
        try:
            valid.append(complete(record))
        except ValueError as error:
            wrong.append(f"annotation {_short(record.get('id'))} of image {record['image_id']} {error}")
    return valid, wrong


def _duplicates(records: list[dict[str, Any]], what: str) -> list[str]:
    counts = Counter(record["id"] for record in records)
    return [f"{what} id {i} occurs {n} times; ids must be unique" for i, n in counts.items() if n > 1]


def _number(annotations: list[dict[str, Any]], repaired: Counter[str]) -> None:
    """Number the annotations anew unless each has an id of its own: scoring tells them apart by it."""
    ids = [annotation.get("id") for annotation in annotations]
    if all(type(i) is int and 0 < i <= LARGEST_ID for i in ids) and len(set(ids)) == len(ids):
        return
    repaired["annotations numbered anew, since ids were missing or not unique"] += len(annotations)
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number


class _Checker:
    """What an annotation needs beyond its own fields: its image and category, and a mask that fits."""

    def __init__(self, images: list[dict[str, Any]], categories: list[dict[str, Any]], repaired: Counter[str]) -> None:
        self.sizes = {image["id"]: (image["height"], image["width"]) for image in images}
        self.categories = {category["id"] for category in categories}
        self.repaired = repaired

    def complete(self, annotation: dict[str, Any]) -> dict[str, Any]:
        """The annotation with all its fields.

        Raises:
            ValueError: it cannot be used.
        """
        if annotation["category_id"] not in self.categories:
            raise ValueError(f"has the unknown category {annotation['category_id']}; add it to 'categories'")
        if annotation["image_id"] not in self.sizes:
            raise ValueError("belongs to an unknown image; add it to 'images' or remove the annotation")
        size = self.sizes[annotation["image_id"]]
        annotation.setdefault("iscrowd", 0)
        segmentation = annotation.get("segmentation")
        if segmentation is None:
            if not annotation["iscrowd"] or annotation.get("bbox") is None:
                raise ValueError("has no segmentation; the model needs masks, boxes are not enough")
            self.repaired["crowds without a mask, for which their box is taken"] += 1
            annotation["segmentation"] = [_corners(annotation["bbox"])]
        elif isinstance(segmentation, dict):
            check_run_lengths(segmentation, size)
        for field, make in (("bbox", coco_mask.toBbox), ("area", coco_mask.area)):
            if annotation.get(field) is None:
                self.repaired[f"'{field}' missing or unusable, computed from the masks"] += 1
                rle = to_run_lengths(annotation["segmentation"], size)
                annotation[field] = make(rle).tolist()
        return annotation


def _corners(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


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
        lengths = run_lengths(counts)
    else:
        raise ValueError("has run lengths without counts")
    if min(lengths, default=0) < 0 or sum(lengths) != size[0] * size[1]:
        raise ValueError(f"has run lengths that cover {sum(lengths)} pixels, of an image of {size[0] * size[1]}")


def run_lengths(counts: str | bytes) -> list[int]:
    """Decode compressed run lengths: numbers in groups of five bits, from the fourth on relative to two before.

    Raises:
        ValueError: the text is none.
    """
    lengths: list[int] = []
    value = shift = 0
    for byte in counts.encode() if isinstance(counts, str) else counts:
        group = byte - 48
        if not 0 <= group < 64 or shift > 50:
            raise ValueError("has run lengths that are not in COCO's compressed form")
        value |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:
            if group & 0x10:
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("has compressed run lengths that end in the middle of a number")
    return lengths
