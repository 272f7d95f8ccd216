"""Readers of the layouts in which annotation tools export instance masks."""

from collections import Counter
from pathlib import Path

from dimaskdino.data.exports import coco, cvat, labelme, mask_folders, voc, yolo
from dimaskdino.data.exports.records import ExportedSplit
from dimaskdino.utils.errors import UserError

# each returns None if the source is not of its kind
READERS = {
    "COCO": coco.read,
    "YOLO segmentation": yolo.read,
    "CVAT for images": cvat.read,
    "Pascal VOC": voc.read,
    "LabelMe": labelme.read,
    "masks in folders": mask_folders.read,
}

__all__ = ["READERS", "ExportedSplit", "read_export"]


def read_export(source: Path) -> tuple[str, list[ExportedSplit]]:
    """Read an export of any known layout.

    Args:
        source: the export's folder, or its annotations file (json, yaml or xml).

    Returns:
        The layout's name, and its splits.

    Raises:
        UserError: there is no such source, its layout is not known, or its content cannot be used.
    """
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
