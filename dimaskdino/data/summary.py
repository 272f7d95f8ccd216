"""Summary of a dataset, from its annotations alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dimaskdino.data.annotations import Annotations

SMALL, MEDIUM = 32**2, 96**2  # pixels of area, COCO's limits
MOST_CLASSES = 10  # shown


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
