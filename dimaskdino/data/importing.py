"""Convert an export of any known layout to a COCO-format folder with a training and a validation split."""

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dimaskdino.data.annotations import read_annotations
from dimaskdino.data.check import shortened
from dimaskdino.data.duplicates import groups_of_copies, shared_between
from dimaskdino.data.exports import ExportedSplit, coco, labelme, mask_folders, xml, yolo
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import is_text, new_folder, require_regular
from dimaskdino.utils.terminal import printable

# each returns None if the source is not of its kind
READERS = {
    "COCO": coco.read,
    "YOLO segmentation": yolo.read,
    "CVAT for images": xml.read_cvat,
    "Pascal VOC": xml.read_voc,
    "LabelMe": labelme.read,
    "masks in folders": mask_folders.read,
}
_SPLITS = ("train", "val", "test")
COPIED = "copied"
_DRAWS = 200  # random divisions, of which the one with the evenest classes is taken


@dataclass(frozen=True)
class Imported:
    """The result of `import_dataset`.

    Attributes:
        folder: the COCO-format folder: annotations/SPLIT.json and images/SPLIT/.
        layout: what the source was recognised as.
        counts: number of images and of objects of each split.
        classes: their names, in the order of the model's classes.
        remarks: sentences about the division, repairs and omissions.
    """

    folder: Path
    layout: str
    counts: dict[str, tuple[int, int]]
    classes: tuple[str, ...]
    remarks: tuple[str, ...]

    def summary(self) -> str:
        """A few lines."""
        count = "1 class" if len(self.classes) == 1 else f"{len(self.classes):,} classes"
        lines = [f"read as {self.layout}: {count} ({shortened(self.classes)})"]
        for split, (images, objects) in self.counts.items():
            lines.append(f"{split}: {images:,} images, {objects:,} objects")
        lines += [f"note: {remark}" for remark in self.remarks]
        return "\n".join(map(printable, lines))


def import_dataset(source: Path, folder: Path, val: float = 0.2, seed: int = 0, link: bool = False) -> Imported:
    """Make a COCO-format folder of an export.

    The source stays as it is, and its images are copied. Areas and boxes are computed from the masks. The splits of the
    source are kept; without a validation split, training images are divided at random. Copies of the same photograph,
    known by their base name or by identical content, then stay on one side.

    Args:
        source: an export's folder, or its annotations file. The layouts are those of `READERS`.
        folder: folder to make.
        val: fraction of the images that becomes the validation split if the source has none.
        seed: of the random division; the same seed divides alike.
        link: link the images instead of copying them: hard links, or symbolic links where the file system has none. A
            program that changes a linked image in place changes the source.

    Raises:
        UserError: the source has no known layout, its content cannot be used or has no masks, or the folder exists.
            Nothing is left then.
    """
    _check_target(folder, val)
    layout, exported = _read_export(source)
    return import_splits(exported, str(source), layout, folder, val, seed, link)


def _read_export(source: Path) -> tuple[str, list[ExportedSplit]]:
    """The name of the export's layout, and its splits."""
    if not source.exists():
        raise UserError(f"{source} does not exist")
    for layout, read in READERS.items():
        splits = read(source)
        if splits:
            return layout, splits
    found = Counter(path.suffix.lower() or "no suffix" for path in source.rglob("*") if path.is_file())
    holds = ", ".join(f"{count:,} {suffix}" for suffix, count in found.most_common(6))
    holds = holds or ("no files" if source.is_dir() else "no annotations")
    raise UserError(
        f"{source} is no export of a known layout ({', '.join(READERS)}); it holds {holds}. "
        "Give the folder with the annotations, or the json, yaml or xml file itself"
    )


def import_splits(
    exported: list[ExportedSplit],
    source: str,
    layout: str,
    folder: Path,
    val: float = 0.2,
    seed: int = 0,
    link: bool = False,
) -> Imported:
    """Make a COCO-format folder of splits that were read already, see `import_dataset`.

    Args:
        exported: the splits.
        source: what they were read from, for messages.
        layout: what it was recognised as.
        folder: folder to make.
        val: fraction of the images that becomes the validation split if there is none.
        seed: of the random division.
        link: link the images instead of copying them.
    """
    _check_target(folder, val)
    splits = _by_name(exported)
    for path in (path for split in exported for path in split.paths.values()):
        require_regular(path)
    for split in splits.values():
        split.measure()
    _check_masks(source, splits)
    classes = _common_classes(splits)
    remarks = _remarks(splits)
    if "val" not in splits:
        splits["train"], splits["val"], remark = _divide(splits["train"], val, seed)
        remarks.append(remark)
    elif shared := shared_between({name: list(split.paths.values()) for name, split in splits.items()}):
        first, second = shared[0]
        remarks.append(
            f"{len(shared):,} images have a copy of the same photograph in another split, such as {first} and {second}"
        )
    splits = {name: splits[name] for name in _SPLITS if name in splits}
    for way, count in _write(splits, classes, folder, link).items():
        if way != COPIED:
            remarks.append(f"{count:,} images {way}")
    counts = {name: (len(split.images), len(split.annotations)) for name, split in splits.items()}
    return Imported(folder, layout, counts, tuple(classes), tuple(remarks))


def _check_target(folder: Path, val: float) -> None:
    if not 0 < val < 1:
        raise UserError(f"the fraction of validation images must be between 0 and 1, got {val:g}")
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another folder or delete it")


def _by_name(exported: list[ExportedSplit]) -> dict[str, ExportedSplit]:
    """The splits by name, with one for training: an export without one has no splits."""
    names = [split.name or "a part without a name" for split in exported]
    if "train" not in names:
        if len(exported) > 1:
            raise UserError(f"the export has {' and '.join(names)}, but no training split; rename one to train")
        exported[0].name = "train"
    return {split.name: split for split in exported if split.name}


def _check_masks(source: str, splits: dict[str, ExportedSplit]) -> None:
    if any(split.annotations for split in splits.values()):
        return
    boxes = sum(split.boxes for split in splits.values())
    what = f"{boxes:,} objects with boxes alone" if boxes else "no objects"
    raise UserError(
        f"{source} has {what}; the model learns from masks. Export polygons or masks from the annotation tool; most "
        "tools turn boxes into masks with one click per object (Segment Anything)"
    )


def _common_classes(splits: dict[str, ExportedSplit]) -> list[str]:
    """Names of the classes of all splits; the splits' categories are numbered by them.

    Raises:
        UserError: two classes of a split have the same name.
    """
    numbers: dict[str, int] = {}
    for split in splits.values():
        for name, count in Counter(split.classes).items():
            if not is_text(name):
                raise UserError(f"the class name {name!r} is no text; correct it in the annotations")
            if count > 1:
                raise UserError(f"two classes have the name '{name}'; rename one in the annotations")
            numbers.setdefault(name, len(numbers) + 1)
        for annotation in split.annotations:
            annotation["category_id"] = numbers[split.classes[annotation["category_id"] - 1]]
    return list(numbers)


def _remarks(splits: dict[str, ExportedSplit]) -> list[str]:
    counts: Counter[str] = Counter()
    boxes = 0
    for split in splits.values():
        counts += split.remarks
        boxes += split.boxes
    if boxes:
        counts["objects with a box and no mask, left out"] = boxes
    return [f"{count:,} {remark}" for remark, count in counts.items()]


def _divide(split: ExportedSplit, val: float, seed: int) -> tuple[ExportedSplit, ExportedSplit, str]:
    """Training and validation images, and a sentence about them. Copies of a photograph stay on one side."""
    ids = [image["id"] for image in split.images]
    group = dict(zip(ids, groups_of_copies([split.paths[i] for i in ids]), strict=True))
    if not any(group.values()):
        raise UserError(
            f"{len(ids)} image{'s' * (len(ids) > 1)} of one photograph cannot be divided into training and validation "
            "images. Add images, or give the export a validation split"
        )
    chosen = _most_even_draw(split, group, val, np.random.default_rng(seed))
    drawn = {i for i in ids if group[i] in chosen}
    remark = f"the source has no validation split: {len(drawn):,} of {len(ids):,} images were drawn (seed {seed})"
    kept = sum(count for count in Counter(group.values()).values() if count > 1)
    if kept:
        remark += f"; {kept:,} copies of the same photograph stay in one split"
    return _part(split, set(ids) - drawn), _part(split, drawn), remark


def _most_even_draw(split: ExportedSplit, group: dict[int, int], val: float, rng: np.random.Generator) -> set[int]:
    """The groups for validation: of many random draws the one in which each class is nearest to its fraction."""
    groups = max(group.values()) + 1
    classes = max((annotation["category_id"] for annotation in split.annotations), default=0)
    counts = np.zeros((groups, 1 + classes))  # of the images, and of the objects of each class
    for number in group.values():
        counts[number, 0] += 1
    for annotation in split.annotations:
        counts[group[annotation["image_id"]], annotation["category_id"]] += 1
    counts = counts[:, counts.any(0)]
    share = counts / counts.sum(0)
    best, draw = np.inf, set[int]()
    for _ in range(_DRAWS):
        order = rng.permutation(groups)
        count = int(np.clip(np.searchsorted(share[order, 0].cumsum(), val) + 1, 1, groups - 1))
        uneven = float(np.square(share[order[:count]].sum(0) - val).sum())
        if uneven < best:
            best, draw = uneven, set(order[:count].tolist())
    return draw


def _part(split: ExportedSplit, ids: set[int]) -> ExportedSplit:
    images = [image for image in split.images if image["id"] in ids]
    annotations = [annotation for annotation in split.annotations if annotation["image_id"] in ids]
    return ExportedSplit(split.name, split.classes, images, annotations, split.paths)


def _write(splits: dict[str, ExportedSplit], classes: list[str], folder: Path, link: bool) -> Counter[str]:
    """Write the folder, all of it or nothing, and count the ways in which images were placed."""
    ways: Counter[str] = Counter()
    with new_folder(folder) as partial:
        (partial / "annotations").mkdir()
        for name, split in splits.items():
            ways += _place_images(split, partial / "images" / name, link)
            file = partial / "annotations" / f"{name}.json"
            file.write_text(json.dumps(split.as_coco(classes)), encoding="utf-8")
            read_annotations(file)
    return ways


def _place_images(split: ExportedSplit, folder: Path, link: bool) -> Counter[str]:
    folder.mkdir(parents=True)
    ways: Counter[str] = Counter()
    used: set[str] = set()
    for image in split.images:
        path = split.paths[image["id"]]
        image["file_name"] = _free_name(path, used)
        ways[_place(path.resolve(), folder / image["file_name"], link)] += 1
    return ways


def _free_name(path: Path, used: set[str]) -> str:
    """A file name that no other image of the split has, on file systems that ignore capitals either."""
    name, number = path.name, 1
    while name.lower() in used:
        number += 1
        name = f"{path.stem}-{number}{path.suffix}"
    used.add(name.lower())
    return name


def _place(source: Path, target: Path, link: bool) -> str:
    """Copy or link an image, and return which of them in words."""
    links = (
        (os.link, "hard-linked: a program that changes one of them in place changes the source, too"),
        (os.symlink, "linked to the source, which must stay where it is"),
    )
    for make, way in links if link else ():
        try:
            make(source, target)
        except OSError:
            continue
        return way
    shutil.copyfile(source, target)
    return COPIED
