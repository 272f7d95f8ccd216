"""The commands about datasets: `dimaskdino data …`."""

import sys
from pathlib import Path

from tyro.conf import Positional

from dimaskdino.errors import UserError
from dimaskdino.progress import progress_bar


def shapes(root: Positional[Path], train: int = 4000, val: int = 200, size: int = 128, seed: int = 0) -> int:
    """Generate the built-in shapes data in COCO format.

    For example: dimaskdino data shapes data/shapes

    Args:
        root: Folder to make.
        train: Training images.
        val: Validation images.
        size: Side of the images, pixels.
        seed: The same seed gives the same data.
    """
    from pydantic import ValidationError

    from dimaskdino import config
    from dimaskdino.data.shapes import generate

    try:
        settings = config.Shapes(train=train, val=val, size=size, seed=seed)
    except ValidationError as error:
        raise UserError(config.explain(error, "dimaskdino data shapes", config.Shapes)) from None
    generate(root, settings)
    print(f"written: {root}; use it with data.root={root} data.train=train data.val=val")
    return 0


def check(
    root: Positional[Path], splits: Positional[tuple[str, ...]] = ("train2017", "val2017"), read: bool = True
) -> int:
    """Count what a COCO-format dataset holds, and report what is missing or wrong.

    For example: dimaskdino data check data/coco; dimaskdino data check my/data train val

    Args:
        root: Dataset folder.
        splits: Names of the splits.
        read: Read every image and mask too, which takes about 20 minutes for COCO; --no-read looks at the annotations
            and for the files alone.
    """
    from dimaskdino.data.annotations import inspect_annotations
    from dimaskdino.data.coco import CocoDataset, find_split
    from dimaskdino.data.summary import describe

    problems = 0
    for split in splits:
        try:
            file, folder = find_split(root, split)
            annotations = inspect_annotations(file)
        except UserError as error:
            print(f"{split}: {error}", file=sys.stderr)
            problems += 1
            continue
        found = describe(annotations, folder)
        print("\n".join([f"{split}: {found.text()}", *(f"mended when read: {line}" for line in annotations.remarks)]))
        for problem in annotations.problems:
            print(problem, file=sys.stderr)
        problems += len(annotations.problems)
        missing = found.missing_files
        if missing:
            problems += len(missing)
            print(f"{split}: {len(missing)} images are missing, the first {missing[0]}", file=sys.stderr)
        if annotations.problems:
            continue  # the images can be read once the annotations are right
        data = CocoDataset(root, split)
        for i in progress_bar(range(len(data) if read else 0), f"reading {split}", disable=not read):
            try:
                data[i]
            except UserError as error:
                problems += 1
                print(error, file=sys.stderr)
    print(f"{problems} problems")
    return 1 if problems else 0


def import_(source: Positional[Path], folder: Positional[Path], val: float = 0.2, seed: int = 0) -> int:
    """Make a COCO-format folder of what an annotation tool exported: outlines or masks in any of the usual layouts.

    For example: dimaskdino data import downloads/animals data/animals

    Layouts: COCO in any arrangement (Roboflow's included), YOLO segmentation, CVAT for images, Pascal VOC, LabelMe, and
    a folder per image with one mask per object. Splits are kept; without a validation split, images are drawn for it,
    with near-duplicates on one side. The source is not changed, and its images are linked, not copied.

    Args:
        source: Folder of the export, or its annotations file.
        folder: Folder to make.
        val: Fraction of the images that becomes the validation split if the source has none.
        seed: The same seed draws the same images.
    """
    from dimaskdino.data.importing import import_dataset

    done = import_dataset(source, folder, val, seed)
    print(done.summary())
    print(f"written: {folder}; next: dimaskdino data check {folder}")
    return 0


def bdd100k(root: Positional[Path], splits: Positional[tuple[str, ...]] = ("train", "val")) -> int:
    """Make COCO annotations of BDD100K's instance segmentation labels (bitmasks or run lengths).

    Args:
        root: Folder with images/10k and labels/ins_seg as they come.
        splits: Names of the splits.
    """
    from dimaskdino.data.bdd100k import convert

    for split in splits:
        print(f"written: {convert(root, split)}")
    return 0


def detectron2(name: Positional[str], root: Positional[Path], register: str | None = None) -> int:
    """Make a COCO-format folder of a dataset that is registered in detectron2; the images stay where they are.

    Args:
        name: As registered in detectron2's DatasetCatalog.
        root: Folder to make.
        register: Python module whose import registers the dataset.
    """
    import importlib

    from dimaskdino.interop.detectron2 import coco_folder

    sys.path.insert(0, "")
    if register:
        importlib.import_module(register)
    print(f"written: {coco_folder(name, root)}; use it with data.root={root} data.train={name}")
    return 0
