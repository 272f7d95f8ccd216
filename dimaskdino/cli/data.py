"""The commands for datasets: `dimaskdino data …`."""

import sys
from importlib import import_module
from pathlib import Path

from tyro.conf import Positional

from dimaskdino.cli.options import OptionalConfigPath
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import refuse_existing, write_atomically
from dimaskdino.utils.terminal import print_lines

DETECTRON2 = "detectron2:"


def shapes(
    root: Positional[Path], train: int = 4000, val: int = 200, size: int = 128, seed: int = 0, rendered: bool = False
) -> int:
    """Generate the built-in shapes data in COCO format: drawn shapes, or rendered solids on a table.

    For example: dimaskdino data shapes data/shapes

    Args:
        root: Folder to make.
        train: Training images.
        val: Validation images.
        size: Side of the images, pixels.
        seed: The same seed gives the same data.
        rendered: Balls, blocks, cans, cones and hoops with textures, light and shadow, instead of drawn shapes. An
            image takes about half a second.
    """
    from pydantic import ValidationError

    from dimaskdino import config
    from dimaskdino.data.shapes import generate

    try:
        kinds = config.SOLIDS if rendered else config.Shapes().kinds
        settings = config.Shapes(train=train, val=val, size=size, seed=seed, kinds=kinds)
    except ValidationError as error:
        raise UserError(config.explain(error, "dimaskdino data shapes", config.Shapes)) from None
    generate(root, settings)
    print(f"written: {root}; use it with data.root={root} data.train=train data.val=val")
    return 0


def check(
    root: Positional[Path],
    splits: Positional[tuple[str, ...]] = (),
    config: OptionalConfigPath = None,
    read: bool = True,
    show: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Count the content of a COCO-format dataset, list its errors, and warn of objects that a model may miss.

    For example: dimaskdino data check data/animals; dimaskdino data check my/data train val --show my/images.png

    Args:
        root: Dataset folder.
        splits: Names of the splits; all by default.
        config: Configuration, or run folder, whose image size and numbers of tokens the data are compared with.
        read: Also read every image, which takes about 20 minutes for COCO; --no-read checks the annotations
            and the existence of the images.
        show: Picture to write, of images with their annotations.
        overwrite: Replace the picture if it exists.
    """
    from dimaskdino.config import Config, load_config
    from dimaskdino.data.check import check_dataset, grouped
    from dimaskdino.data.coco import find_splits

    if show:
        refuse_existing([show], overwrite)
    settings = load_config(config) if config else Config()
    reports = check_dataset(root, splits or find_splits(root) or ("train",), settings, read)
    for report in reports:
        if report.statistics:
            print(f"{report.split}: {report.statistics.text()}")
        for line in report.remarks:
            print_lines(f"repaired when read: {line}")
        for line in report.advice:
            print_lines(f"note: {line}")
        for line in grouped(report.problems):
            print_lines(f"{report.split}: {line}", file=sys.stderr)
    count = sum(len(report.problems) for report in reports)
    if show and count:
        print(f"{show} is not written; correct the problems first", file=sys.stderr)
    elif show:
        _draw_samples(root, reports[0].split, show)
        print(f"written: {show}")
    print(f"{count:,} problem{'s' * (count != 1)}")
    return 1 if count else 0


def _draw_samples(root: Path, split: str, file: Path, count: int = 12) -> None:
    """Draw images of a split with their annotations."""
    from dimaskdino.data.coco import CocoDataset
    from dimaskdino.viz import draw_samples

    data = CocoDataset(root, split, only_with_objects=True)
    samples = [data[i] for i in range(0, len(data), max(1, len(data) // count))[:count]]
    figure = draw_samples(samples, data.classes)
    try:
        write_atomically(file, lambda partial: figure.savefig(partial, dpi=150))
    except ValueError as error:  # an unknown format
        raise UserError(f"cannot write {file}: {error}") from None


def import_(
    source: Positional[Path],
    folder: Positional[Path],
    val: float = 0.2,
    seed: int = 0,
    link: bool = False,
    register: str | None = None,
) -> int:
    """Convert an annotation tool's export, with outlines or masks in any of the usual layouts, to COCO's format.

    For example: dimaskdino data import downloads/animals data/animals

    Layouts: COCO in any arrangement (Roboflow's included), YOLO segmentation, CVAT for images, Pascal VOC, LabelMe, and
    a folder per image with one mask per object. detectron2:NAME,NAME takes datasets that are registered in detectron2.
    Splits are kept; without a validation split, images are drawn for it, with copies of the same photograph in one
    split. The source is not changed.

    Args:
        source: Folder of the export, or its annotations file.
        folder: Folder to make.
        val: Fraction of the images that becomes the validation split if the source has none.
        seed: The same seed draws the same images.
        link: Link the images instead of copying them: hard links where possible (the two names are one file), else
            symbolic links to the source, which must stay where it is.
        register: Python module whose import registers the datasets in detectron2.
    """
    from dimaskdino.data.importing import import_dataset, import_splits

    registered = str(source).removeprefix(DETECTRON2)
    if registered == str(source):
        if register:
            raise UserError(f"--register is for datasets of detectron2: {DETECTRON2}NAME instead of {source}")
        done = import_dataset(source, folder, val, seed, link)
    else:
        if register:
            sys.path.append("")  # for modules in the current folder, after all installed ones
            try:
                import_module(register)
            except ImportError as error:
                raise UserError(f"--register: {register} cannot be imported ({error})") from None
        from dimaskdino.interop.detectron2 import exported_split

        splits = [exported_split(name) for name in registered.split(",")]
        done = import_splits(splits, str(source), "datasets of detectron2", folder, val, seed, link)
    print(done.summary())
    print(f"written: {folder}; next: dimaskdino data check {folder}")
    return 0


def bdd100k(
    root: Positional[Path], splits: Positional[tuple[str, ...]] = ("train", "val"), overwrite: bool = False
) -> int:
    """Convert BDD100K's instance segmentation labels (bitmasks or run lengths) to COCO annotations.

    For example: dimaskdino data bdd100k data/bdd100k

    Args:
        root: Folder with images/10k and labels/ins_seg, as downloaded.
        splits: Names of the splits.
        overwrite: Replace annotations that exist.
    """
    from dimaskdino.data.bdd100k import annotations_file, convert

    refuse_existing([annotations_file(root, split) for split in splits], overwrite)
    for split in splits:
        print(f"written: {convert(root, split)}")
    return 0
