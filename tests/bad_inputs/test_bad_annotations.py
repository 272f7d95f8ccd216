"""Annotation files that cannot be used: `dimaskdino data check`, training and evaluation refuse them alike."""

import json
import math
from copy import deepcopy

import pytest
from PIL import Image

from dimaskdino import UserError
from dimaskdino.data.coco import CocoDataset
from dimaskdino.evaluation.coco_ap import read_truth

SQUARE = [4, 3, 12, 3, 12, 9, 4, 9]
CONTENT = {
    "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 24}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "segmentation": [SQUARE], "bbox": [4, 3, 8, 6], "area": 48}
    ],
    "categories": [{"id": 3, "name": "cup"}],
}
TEXT = json.dumps(CONTENT)
REMOVED = object()


def rle(counts, size=(20, 24)):
    return {"segmentation": {"size": list(size), "counts": counts}}


def outline(*values):
    return {"segmentation": [list(values)]}


def written(place, text):
    """A dataset with these annotations and their image."""
    place.write("annotations/train.json", text)
    (place.folder / "images" / "train").mkdir(parents=True)
    Image.new("RGB", (24, 20)).save(place.folder / "images" / "train" / "a.png")
    return place.folder


def changed(part: str, fields: dict) -> str:
    """The content with other fields in the only image, category or annotation."""
    content = deepcopy(CONTENT)
    entry = content[part][0] | fields
    content[part][0] = {key: value for key, value in entry.items() if value is not REMOVED}
    return json.dumps(content)


FILES = [
    ("", "not valid json.*copied completely"),
    (TEXT[:100], "not valid json"),
    ("<annotation></annotation>", "not valid json"),
    (TEXT.encode("utf-16"), "not in UTF-8"),
    (bytes(range(256)), "not in UTF-8"),
    ("[]", "not in COCO format: it holds a list"),
    ('"images"', "not in COCO format: it holds a str"),
    ("null", "not in COCO format"),
    ("[" * 1_000_000, "not valid json"),
]
for _part in CONTENT:
    FILES += [
        (json.dumps({part: entries for part, entries in CONTENT.items() if part != _part}), f"no list '{_part}'"),
        (json.dumps(CONTENT | {_part: {}}), f"no list '{_part}'"),
        (json.dumps(CONTENT | {_part: [5]}), "number 1 is 5, expected an object"),
    ]
FILES += [
    (json.dumps(CONTENT | {"images": []}), "lists no images"),
    (json.dumps(CONTENT | {"categories": []}), "lists no categories"),
    (json.dumps(CONTENT | {"images": CONTENT["images"] * 2}), "image id 7 occurs 2 times"),
    (json.dumps(CONTENT | {"categories": CONTENT["categories"] * 2}), "category id 3 occurs 2"),
]
IMAGES = [
    ({"file_name": None}, "image 7: 'file_name' must be the path"),
    ({"file_name": "  "}, "image 7: 'file_name' must be the path"),
    ({"file_name": 12}, "'file_name' must be the path"),
    ({"file_name": "a\0.png"}, "'file_name' must be the path"),
    ({"id": -7}, "image -7: 'id' must be an integer"),
    ({"id": 7.5}, r"image 7\.5: 'id' must be an integer"),
    ({"id": "seven"}, "image 'seven': 'id' must be an integer"),
    ({"id": True}, "image True: 'id' must be an integer"),
    ({"id": 2**64}, "'id' must be an integer from 0 to"),
    ({"id": REMOVED}, "image number 1 has no 'id'"),
    ({"height": 0}, "'height' must be the image's size in pixels"),
    ({"height": 10**9}, "'height' must be the image's size"),
    ({"height": REMOVED}, "image 7 has no 'height'"),
    ({"width": -24}, "'width' must be the image's size in pixels"),
    ({"width": "wide"}, "'width' must be the image's size"),
    ({"width": None}, "'width' must be the image's size"),
    ({"width": math.inf}, "'width' must be the image's size"),
]
CATEGORIES = [
    ({"id": REMOVED}, "category number 1 has no 'id'"),
    ({"id": -3}, "category -3: 'id' must be"),
    ({"id": "cup"}, "category 'cup': 'id' must be"),
    ({"id": [3]}, "category list: 'id' must be"),
]
ANNOTATIONS = [
    ({"image_id": REMOVED}, "annotation 1 has no 'image_id'"),
    ({"image_id": 9}, "annotation 1 of image 9 belongs to an unknown image"),
    ({"category_id": REMOVED}, "annotation 1 of image 7 has no 'category_id'"),
    ({"category_id": 4}, "annotation 1 of image 7 has the unknown category 4"),
    ({"category_id": "cup"}, "'category_id' must be an integer"),
    ({"category_id": None}, "'category_id' must be an integer"),
    ({"category_id": math.nan}, "'category_id' must be an integer"),
    ({"iscrowd": 2}, "'iscrowd' must be 0"),
    ({"iscrowd": "no"}, "'iscrowd' must be 0"),
    ({"iscrowd": [0]}, "'iscrowd' must be 0"),
    ({"segmentation": REMOVED}, "has no segmentation; the model needs masks"),
    ({"segmentation": None}, "has no segmentation; the model needs masks"),
    ({"segmentation": "x"}, "'segmentation' must be a list of outlines"),
    ({"segmentation": 4.0}, "'segmentation' must be a list of outlines"),
    ({"segmentation": SQUARE}, "an outline that is not a list of pairs"),
    (outline(1, 2, 3, 4, 5, 6, 7), "an outline that is not a list of pairs"),
    (outline("1", "2", "3", "4", "5", "6"), "something that is not a number"),
    (outline(1, 2, None, 4, 5, 6), "something that is not a number"),
    (outline([1, 2], [3, 4], [5, 6], [7, 8], [9, 1], [2, 2]), "something that is not a number"),
    (outline(1, 2, math.nan, 4, 5, 6), "not finite or beyond"),
    (outline(1, 2, math.inf, 4, 5, 6), "not finite or beyond"),
    (outline(1, 2, math.inf, -math.inf, 5, 6), "not finite or beyond"),
    (outline(1, 2, 1e7, 4, 5, 6), "not finite or beyond"),
    (outline(1, 2, -1e30, 4, 5, 6), "not finite or beyond"),
    (outline(1, 2, 10**400, 4, 5, 6), "not finite or beyond"),
    ({"segmentation": {"size": [20, 24]}}, "run lengths without counts"),
    ({"segmentation": {"counts": [480]}}, "run lengths without a size"),
    (rle([24], size=(True, 24)), "run lengths without a size"),
    (rle([480], size=(24, 20)), r"run lengths for \[24, 20\], but its image is \[20, 24\]"),
    (rle([10]), "cover 10 pixels, of an image of 480"),
    (rle([1000]), "cover 1000 pixels, of an image of 480"),
    (rle([500, -20]), "not a number of pixels"),
    (rle(["480"]), "not a number of pixels"),
    (rle([]), "cover 0 pixels"),
    (rle("05"), "cover . pixels"),
    (rle("oo"), "end in the middle"),
    (rle("o" * 10**6), "not in COCO's compressed form"),
    (rle("🙂"), "not in COCO's compressed form"),
]
CASES = FILES.copy()
for _part, _rows in (("images", IMAGES), ("categories", CATEGORIES), ("annotations", ANNOTATIONS)):
    CASES += [(changed(_part, fields), says) for fields, says in _rows]


@pytest.mark.parametrize(("text", "says"), CASES, ids=[f"{n}: {says}" for n, (_, says) in enumerate(CASES)])
def test_annotations(text, says, place, refused):
    folder = written(place, text)
    refused(rf"train\.json.*{says}", "data", "check", folder, "train")
    with pytest.raises(UserError, match=says) as in_training:
        CocoDataset(folder, "train")
    with pytest.raises(UserError, match=says) as in_evaluation:
        read_truth(folder / "annotations" / "train.json")
    assert str(in_training.value) == str(in_evaluation.value)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda image: image.unlink(), "the image .*a.png does not exist"),
        (lambda image: Image.new("RGB", (5, 5)).save(image), "a.png is 5x5, the annotations say 20x24"),
        (lambda image: Image.new("L", (20, 24)).save(image), "a.png is 24x20, the annotations say 20x24"),
        (lambda image: image.write_bytes(image.read_bytes()[:30]), "a.png cannot be read, it may be truncated"),
    ],
)
def test_images_of_a_dataset(spoil, says, place, refused):
    folder = written(place, TEXT)
    spoil(folder / "images" / "train" / "a.png")
    refused(says, "data", "check", folder, "train")
