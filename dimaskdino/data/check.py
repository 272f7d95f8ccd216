"""Counts of a dataset, problems with it, and advice on the settings for it."""

import contextlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from dimaskdino.config import Config
from dimaskdino.data.annotations import Annotations, image_sizes, inspect_annotations, to_run_lengths
from dimaskdino.data.coco import find_split
from dimaskdino.data.duplicates import shared_between
from dimaskdino.data.images import deep_range, load_image
from dimaskdino.data.transforms import resize_scale
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.progress import progress_bar
from dimaskdino.utils.terminal import printable

SMALL, MEDIUM = 32**2, 96**2  # pixels of area, COCO's limits
CELL = 4  # pixels: the stride of the masks that the model predicts
TINY_SHARE = 0.005  # of the objects, from which on small ones are reported
_SHOWN = 10  # classes and kinds of problems
_VARYING = re.compile(r"'[^']*'|\S*[/\\]\S*|-?\d+(\.\d+)?")


@dataclass(frozen=True)
class ClassCount:
    """Number of objects of a class, and of images with such objects."""

    name: str
    objects: int
    images: int


@dataclass(frozen=True)
class Statistics:
    """Counts of one split. Crowds are counted separately, since training leaves them out.

    Attributes:
        images, empty_images: number of images, and of those without objects.
        objects, crowds: number of annotations of each kind.
        small, medium, large: objects by area, in pixels of the image: below 32², below 96², the others.
        relative_sizes: 5th percentile, median and 95th percentile of √(area of the object / area of its image).
        objects_per_image: median, 95th percentile and largest number, of images with objects.
        longest_sides: smallest, median and largest longer side of the images, in pixels.
        classes: most frequent first.
        missing_files: images that are in the annotations but not in the folder.
    """

    images: int
    empty_images: int
    objects: int
    crowds: int
    small: int
    medium: int
    large: int
    relative_sizes: tuple[float, float, float]
    objects_per_image: tuple[int, int, int]
    longest_sides: tuple[int, int, int]
    classes: tuple[ClassCount, ...]
    missing_files: tuple[Path, ...]

    def summary(self) -> str:
        """One line."""
        median, _, most = self.objects_per_image
        return (
            f"{self.images:,} images, {self.empty_images:,} of them without objects; {self.objects:,} objects of "
            f"{len(self.classes)} classes, {median} in the median image, at most {most}"
        )

    def text(self) -> str:
        """All numbers, with one line per class."""
        percent = 100 / max(self.objects, 1)
        low, middle, high = self.relative_sizes
        shortest, median, longest = self.longest_sides
        lines = [
            self.summary(),
            f"{self.crowds:,} crowds, which training leaves out",
            f"objects by area: {self.small * percent:.0f} % small (below 32²), {self.medium * percent:.0f} % medium, "
            f"{self.large * percent:.0f} % large (96² and more)",
            f"objects relative to the image's side: {middle:.0%} in the median, 5 % below {low:.0%}, "
            f"5 % above {high:.0%}",
            f"95 % of the images have at most {self.objects_per_image[1]} objects",
            f"longer side of the images: {shortest} to {longest} pixels, median {median}",
        ]
        for count in self.classes[:_SHOWN]:
            lines.append(f"  {count.name:<24}{count.objects:>9,} objects in {count.images:>8,} images")
        rest = self.classes[_SHOWN:]
        if rest:
            lines.append(f"  {len(rest)} more classes{sum(count.objects for count in rest):>17,} objects")
        return "\n".join(map(printable, lines))


def shortened(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def describe(annotations: Annotations, folder: Path) -> Statistics:
    """Count a split.

    Args:
        annotations: its annotations.
        folder: its image folder.
    """
    objects = annotations.objects
    sizes = image_sizes(annotations.images)
    in_image: Counter[int] = Counter()
    by_class: Counter[int] = Counter()
    images_of: dict[int, set[int]] = defaultdict(set)
    areas, relative = np.zeros(len(objects)), np.zeros(max(len(objects), 1))
    for number, annotation in enumerate(objects):
        image, category = annotation["image_id"], annotation["category_id"]
        in_image[image] += 1
        by_class[category] += 1
        images_of[category].add(image)
        areas[number] = annotation["area"]
        relative[number] = math.sqrt(annotation["area"] / math.prod(sizes[image]))
    classes = []
    for category in annotations.categories:
        number = category["id"]
        classes.append(ClassCount(category["name"], by_class[number], len(images_of[number])))
    counts = np.array(list(in_image.values()) or [0])
    sides = np.array(list(map(max, sizes.values())) or [0])
    return Statistics(
        images=len(annotations.images),
        empty_images=len(annotations.images) - len(in_image),
        objects=len(objects),
        crowds=len(annotations.annotations) - len(objects),
        small=int((areas < SMALL).sum()),
        medium=int(((areas >= SMALL) & (areas < MEDIUM)).sum()),
        large=int((areas >= MEDIUM).sum()),
        relative_sizes=tuple(np.percentile(relative, (5, 50, 95)).tolist()),
        objects_per_image=(int(np.median(counts)), int(np.percentile(counts, 95)), int(counts.max())),
        longest_sides=(int(sides.min()), int(np.median(sides)), int(sides.max())),
        classes=tuple(sorted(classes, key=lambda count: -count.objects)),
        missing_files=tuple(_missing_files(annotations, folder)),
    )


def _missing_files(annotations: Annotations, folder: Path) -> Iterator[Path]:
    # listing the folder once is faster than asking for each of 100,000 files
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for image in annotations.images:
        path = folder / image["file_name"]
        if image["file_name"] not in present and not path.exists():
            yield path


@dataclass
class SplitReport:
    """The findings about one split.

    Attributes:
        split: its name.
        statistics: counts; None if the annotations cannot be read.
        problems: what has to be corrected.
        advice: what to know, and what to do about it.
        remarks: what is repaired whenever the annotations are read.
    """

    split: str
    statistics: Statistics | None = None
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def check_dataset(root: Path, splits: Sequence[str], settings: Config, read: bool = True) -> list[SplitReport]:
    """Check a COCO-format folder.

    Args:
        root: the folder.
        splits: names of the splits.
        settings: the image size and the numbers of tokens and detections that the data are compared with.
        read: also read every image, and look for photographs that are in several splits.
    """
    reports, files = [], {}
    for split in splits:
        report = SplitReport(split)
        reports.append(report)
        try:
            file, folder = find_split(root, split)
            annotations = inspect_annotations(file)
            annotations.check_masks()
        except UserError as error:
            report.problems.append(str(error))
            continue
        found = report.statistics = describe(annotations, folder)
        report.problems += annotations.problems
        report.problems += [f"the image {path} does not exist" for path in found.missing_files]
        report.remarks += annotations.remarks
        report.problems += record_faults(annotations)
        report.advice += advice(annotations, found, settings)
        if read:
            present = [image for image in annotations.images if folder / image["file_name"] not in found.missing_files]
            report.problems += _read(present, folder, split)
            files[split] = [folder / image["file_name"] for image in present]
            report.advice += _deep_images(files[split])
    if len(files) > 1 and not any(report.problems for report in reports):
        reports[-1].advice += _leaks(files)
    return reports


def _read(images: list[dict[str, Any]], folder: Path, split: str) -> Iterator[str]:
    """Problems with reading the images."""
    for image in progress_bar(images, f"reading {split}"):
        size = (image["height"], image["width"])
        try:
            load_image(folder / image["file_name"], size)
        except UserError as error:
            yield str(error)


def _deep_images(files: Sequence[Path]) -> list[str]:
    ranges = []
    for file in files:
        with contextlib.suppress(UserError):  # is among the problems already
            ranges.append(deep_range(file))
    found = [each for each in ranges if each is not None]
    if not found:
        return []
    low, high = min(each[0] for each in found), max(each[1] for each in found)
    return [
        f"{len(found):,} grey image{'s have' if len(found) > 1 else ' has'} more than 8 bits, with values from {low:g} "
        f"to {high:g}. The largest value of an image becomes white if it exceeds 255 (1 in floating-point images); "
        "convert the images to 8 bits to choose the white yourself"
    ]


def _leaks(files: Mapping[str, Sequence[Path]]) -> list[str]:
    pairs = shared_between(files)
    if not pairs:
        return []
    listed = "; ".join(f"{first} and {second}" for first, second in pairs[:3])
    return [
        f"{len(pairs):,} images have a copy of the same photograph in another split, so that scores are too good "
        f"({listed}). Remove them from one split"
    ]


def advice(annotations: Annotations, found: Statistics, settings: Config) -> list[str]:
    """Sentences about objects that a model with these settings cannot learn or find, and about rare classes.

    Args:
        annotations: of one split.
        found: their counts.
        settings: image size, number of selected tokens and of detections.
    """
    lines = []
    resize = settings.data.resize
    sizes = image_sizes(annotations.images)
    per_image: Counter[int] = Counter()
    tiny = of_boxes = 0
    for annotation in annotations.objects:
        area, (_, _, width, height) = annotation["area"], annotation["bbox"]
        per_image[annotation["image_id"]] += 1
        tiny += area * resize_scale(sizes[annotation["image_id"]], resize) ** 2 < CELL**2
        of_boxes += abs(area - width * height) < 1e-3 * max(area, 1)
    if tiny and tiny >= TINY_SHARE * found.objects:
        lines.append(
            f"{tiny:,} of {found.objects:,} objects ({tiny / found.objects:.1%}) cover less than {CELL}x{CELL} pixels, "
            f"a cell of the masks, at the model's size of images (shortest side {resize.shortest}, longest "
            f"{resize.longest}); raise data.resize and data.jitter.size"
        )
    kept, detections = settings.model.selection.k[-1], settings.evaluation.detections
    for limit, key in ((kept, "model.selection.k"), (detections, "evaluation.detections")):
        crowded = sum(count > limit for count in per_image.values())
        if crowded:
            lines.append(
                f"{crowded:,} image{'s have' if crowded > 1 else ' has'} more than the {limit} objects that {key} "
                f"allows, at most {max(per_image.values())}; raise {key}"
            )
    if of_boxes > found.objects / 20:
        lines.append(
            f"{of_boxes:,} areas are those of the boxes, so that AP of small and large objects is wrong; 'dimaskdino "
            "data import' computes areas from the masks"
        )
    lacking = [count.name for count in found.classes if not count.objects]
    if lacking:
        lines.append(f"without a single object: {shortened(lacking)}")
    rare = [count.name for count in found.classes if 0 < count.objects < _SHOWN]
    if rare:
        lines.append(f"with fewer than {_SHOWN} objects: {shortened(rare)}")
    return lines


def record_faults(annotations: Annotations) -> list[str]:
    """Sentences about valid records that probably do not mean what they say, each with an example.

    Evaluation takes them as they are. `data import` computes boxes and areas anew, and leaves out objects without a
    pixel.
    """
    sizes, objects = image_sizes(annotations.images), annotations.objects
    corners, areas, empty = [], [], []
    for annotation in objects:
        mask = to_run_lengths(annotation["segmentation"], sizes[annotation["image_id"]])
        x0, y0, width, height = coco_mask.toBbox(mask).tolist()
        if not coco_mask.area(mask):
            empty.append(annotation["id"])
            continue
        x, y, *ends = annotation["bbox"]
        slack = (2 + width / 20, 2 + height / 20) * 2  # pixels
        if _near((x, y, *ends), (x0, y0, x0 + width, y0 + height), slack) and not _near(ends, (width, height), slack):
            corners.append(annotation["id"])
        if annotation["area"] <= 1 and width * height > 16:
            areas.append(annotation["id"])
    remedy = "'dimaskdino data import' repairs this"
    lines = []
    for found, least, what in (
        (corners, len(objects) / 2, "boxes are x0, y0, x1, y1 instead of x, y, width, height, so box AP is wrong"),
        (areas, len(objects) / 2, "areas are 0 or 1, so AP by size is wrong"),
        (
            empty,
            0,
            "objects have no mask or none that covers a pixel: training leaves them out, in scoring they are missed",
        ),
    ):
        if found and len(found) > least:
            lines.append(f"{annotations.file}: {len(found):,} {what}, such as annotation {found[0]}; {remedy}")
    for entries, key, what in (
        (annotations.images, "file_name", "images are listed more than once: each has only a part of the objects"),
        (annotations.categories, "name", "categories have the name of another one"),
    ):
        repeated = [name for name, count in Counter(entry[key] for entry in entries).items() if count > 1]
        if repeated:
            lines.append(f"{annotations.file}: {len(repeated):,} {what}, such as {repeated[0]}; merge them")
    return lines


def _near(numbers: Sequence[float], others: Sequence[float], slack: Sequence[float]) -> bool:
    return all(abs(a - b) <= most for a, b, most in zip(numbers, others, slack, strict=False))


def grouped(problems: Sequence[str]) -> list[str]:
    """The first of each kind of problem with the number of others like it, most frequent first, ten kinds at most."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        kinds[_VARYING.sub("…", problem)].append(problem)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    lines = []
    for first, *others in ordered[:_SHOWN]:
        lines.append(first + (f" (and {len(others):,} more like it)" if others else ""))
    if len(ordered) > _SHOWN:
        lines.append(f"and {len(ordered) - _SHOWN:,} more kinds of problems")
    return lines
