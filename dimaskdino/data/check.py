"""What to know about a dataset before a training: what is wrong with it, and what a model can see of it."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from dimaskdino.config import Config
from dimaskdino.data.annotations import Annotations, inspect_annotations, to_run_lengths
from dimaskdino.data.coco import find_split
from dimaskdino.data.images import load_image
from dimaskdino.data.near_duplicates import shared_between
from dimaskdino.data.transforms import resize_scale
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.progress import progress_bar

SMALL, MEDIUM = 32**2, 96**2  # pixels of area, COCO's limits
MOST_CLASSES = 10  # shown
CELL = 4  # pixels: the stride of the masks that the model predicts
TINY_SHARE = 0.005  # of the objects, from which on it is told
_SHOWN = 10
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
        share = 100 / max(self.objects, 1)
        lines = [
            self.summary(),
            f"{self.crowds:,} crowds, which training leaves out",
            f"objects by area: {self.small * share:.0f} % small (below 32²), {self.medium * share:.0f} % medium, "
            f"{self.large * share:.0f} % large (96² and more)",
            "objects relative to the image's side: {:.0%} in the median, 5 % below {:.0%}, 5 % above {:.0%}".format(
                *(self.relative_sizes[i] for i in (1, 0, 2))
            ),
            f"95 % of the images have at most {self.objects_per_image[1]} objects",
            "longer side of the images: {} to {} pixels, median {}".format(*(self.longest_sides[i] for i in (0, 2, 1))),
            *(f"  {c.name:<24}{c.objects:>9,} objects in {c.images:>8,} images" for c in self.classes[:MOST_CLASSES]),
        ]
        rest = self.classes[MOST_CLASSES:]
        if rest:
            lines.append(f"  {len(rest)} more classes{sum(c.objects for c in rest):>17,} objects")
        return "\n".join(lines)


def shortened(names: Sequence[str], count: int = MOST_CLASSES) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def describe(annotations: Annotations, folder: Path) -> Statistics:
    """Count a split.

    Args:
        annotations: its annotations.
        folder: its image folder.
    """
    objects = annotations.objects
    in_image = Counter(a["image_id"] for a in objects)
    by_class = Counter(a["category_id"] for a in objects)
    images_of = Counter(category for _, category in {(a["image_id"], a["category_id"]) for a in objects})
    classes = [ClassCount(c["name"], by_class[c["id"]], images_of[c["id"]]) for c in annotations.categories]
    areas = np.array([a["area"] for a in objects])
    pixels = {i["id"]: i["height"] * i["width"] for i in annotations.images}
    relative = np.sqrt(areas / np.array([pixels[a["image_id"]] for a in objects])) if objects else np.zeros(1)
    counts = np.array(list(in_image.values()) or [0])
    sides = np.array([max(i["height"], i["width"]) for i in annotations.images] or [0])
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    missing = [i["file_name"] for i in annotations.images if i["file_name"] not in present]
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
        classes=tuple(sorted(classes, key=lambda c: -c.objects)),
        missing_files=tuple(folder / name for name in missing if not (folder / name).exists()),
    )


@dataclass
class SplitReport:
    """What was found in one split.

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
        read: also read every image and mask, and look for photographs that are in several splits.
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
        report.advice += advice(annotations, found, settings)
        present = [image for image in annotations.images if (folder / image["file_name"]) not in found.missing_files]
        if read:
            report.problems += _read(annotations, present, folder, split)
            files[split] = [folder / image["file_name"] for image in present]
    if len(files) > 1 and not any(report.problems for report in reports):
        reports[-1].advice += _leaks(files)
    return reports


def _read(annotations: Annotations, images: list[dict[str, Any]], folder: Path, split: str) -> Iterator[str]:
    """Problems with reading the images and decoding the masks."""
    objects = defaultdict(list)
    for annotation in annotations.annotations:
        objects[annotation["image_id"]].append(annotation)
    for image in progress_bar(images, f"reading {split}"):
        size = (image["height"], image["width"])
        try:
            load_image(folder / image["file_name"], size)
        except UserError as error:
            yield str(error)
        for annotation in objects[image["id"]]:
            # empty lists of outlines are among the advice
            if annotation["segmentation"] and not coco_mask.area(to_run_lengths(annotation["segmentation"], size)):
                yield f"annotation {annotation['id']} of image {image['id']} has an empty mask; correct or remove it"


def _leaks(files: Mapping[str, Sequence[Path]]) -> list[str]:
    pairs = shared_between(files)
    if not pairs:
        return []
    listed = "; ".join(f"{first} and {second}" for first, second in pairs[:3])
    return [
        f"{len(pairs):,} images are near-duplicates of one in another split, so that scores are too good ({listed}). "
        "Remove them from one split"
    ]


def advice(annotations: Annotations, found: Statistics, settings: Config) -> list[str]:
    """What a model with these settings will have trouble with.

    Args:
        annotations: of one split.
        found: their counts.
        settings: image size, number of selected tokens and of detections.
    """
    told = []
    objects = annotations.objects
    sizes = {image["id"]: (image["height"], image["width"]) for image in annotations.images}
    resize = settings.data.resize
    tiny = sum(a["area"] * resize_scale(sizes[a["image_id"]], resize) ** 2 < CELL**2 for a in objects)
    if tiny >= TINY_SHARE * max(len(objects), 1) and tiny:
        told.append(
            f"{tiny:,} of {len(objects):,} objects ({tiny / len(objects):.1%}) cover less than {CELL}x{CELL} pixels, a "
            f"cell of the masks, at the model's size of images (shortest side {resize.shortest}, longest "
            f"{resize.longest}); raise data.resize and data.jitter.size"
        )
    without = sum(not a["segmentation"] for a in objects)
    if without:
        told.append(f"{without:,} objects have no mask; training leaves them out")
    per_image = Counter(a["image_id"] for a in objects)
    kept, detections = settings.model.selection.k[-1], settings.evaluation.detections
    for limit, key in ((kept, "model.selection.k"), (detections, "evaluation.detections")):
        crowded = sum(count > limit for count in per_image.values())
        if crowded:
            told.append(
                f"{crowded:,} image{'s have' if crowded > 1 else ' has'} more than the {limit} objects that {key} "
                f"allows, at most {max(per_image.values())}; raise {key}"
            )
    of_boxes = sum(abs(a["area"] - a["bbox"][2] * a["bbox"][3]) < 1e-3 * max(a["area"], 1) for a in objects)
    if of_boxes > len(objects) / 20:
        told.append(
            f"{of_boxes:,} areas are those of the boxes, so that AP of small and large objects is wrong; 'dimaskdino "
            "data import' computes areas from the masks"
        )
    lacking = [c.name for c in found.classes if not c.objects]
    if lacking:
        told.append(f"without a single object: {shortened(lacking)}")
    rare = [c.name for c in found.classes if 0 < c.objects < _SHOWN]
    if rare:
        told.append(f"with fewer than {_SHOWN} objects: {shortened(rare)}")
    return told


def grouped(problems: Sequence[str]) -> list[str]:
    """The first of each kind of problem with the number of others like it, most frequent first, ten kinds at most."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        kinds[_VARYING.sub("…", problem)].append(problem)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    lines = [same[0] + (f" (and {len(same) - 1:,} more like it)" if len(same) > 1 else "") for same in ordered[:_SHOWN]]
    return lines + ([f"and {len(ordered) - _SHOWN:,} more kinds of problems"] if len(ordered) > _SHOWN else [])
