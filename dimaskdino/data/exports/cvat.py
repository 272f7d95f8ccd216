"""CVAT for images 1.1, one XML file, read by hotcoco."""

import warnings
from pathlib import Path

import hotcoco

from dimaskdino.data.exports.records import ExportedSplit, ImageFiles, missing_image, read_xml
from dimaskdino.utils.errors import UserError


def read(source: Path) -> list[ExportedSplit] | None:
    """The content of a CVAT export: a folder with the XML file, or that file. None if there is none.

    Raises:
        UserError: the file is damaged, or its images are missing.
    """
    files = [source] if source.suffix.lower() == ".xml" else sorted([*source.glob("*.xml"), *source.glob("*/*.xml")])
    file = next((file for file in files if read_xml(file).tag == "annotations"), None)
    if file is None:
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            content = hotcoco.COCO.from_cvat(str(file)).dataset
        except (ValueError, OSError) as error:
            raise UserError(f"{file} cannot be read as CVAT for images 1.1: {error}") from None
    images = ImageFiles(file.parent if source.is_file() else source)
    split = ExportedSplit(None, [category["name"] for category in content["categories"]])
    label = {category["id"]: number for number, category in enumerate(content["categories"])}
    numbers = {}
    for record in content["images"]:
        path = images.find(record["file_name"], file)
        if path is None:
            raise missing_image(record["file_name"], file, images)
        numbers[record["id"]] = split.add_image(path, (record["height"], record["width"]))
    for record in content["annotations"]:
        split.add_object(numbers[record["image_id"]], label[record["category_id"]], record.get("segmentation"))
    masks = len(read_xml(file).findall("./image/mask"))
    if masks:
        split.remarks["masks drawn with the brush, left out; export as COCO 1.0 to keep them"] += masks
    for warning in caught:
        split.remarks[f"({str(warning.message).removeprefix('hotcoco: ')})"] += 1
    return [split]
