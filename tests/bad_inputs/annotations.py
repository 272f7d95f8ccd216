"""Annotation files, given to `dimaskdino data check`."""

import json
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from PIL import Image

from bad_inputs.table import Place, bad

SQUARE = [4, 3, 12, 3, 12, 9, 4, 9]
CONTENT: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 24}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "segmentation": [SQUARE], "bbox": [4, 3, 8, 6], "area": 48}
    ],
    "categories": [{"id": 3, "name": "cup"}],
}


def check(place: Place, text: str | bytes) -> list[Any]:
    place.write("annotations/train.json", text)
    (place.folder / "images" / "train").mkdir(parents=True)
    Image.new("RGB", (24, 20)).save(place.folder / "images" / "train" / "a.png")
    return ["data", "check", place.folder, "train"]


def json_text(title: str, says: str, text: str | bytes) -> None:
    bad(f"json: {title}", rf"train\.json.*{says}", lambda place: check(place, text))


def json_with(title: str, says: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = deepcopy(CONTENT)
    content = change(content) or content
    json_text(title, says, json.dumps(content))


def annotation(title: str, says: str, **fields: Any) -> None:
    removed = [name for name, value in fields.items() if value is ...]
    kept = {name: value for name, value in fields.items() if value is not ...}

    def change(content: dict[str, Any]) -> None:
        content["annotations"][0] |= kept
        for name in removed:
            del content["annotations"][0][name]

    json_with(title, says, change)


def image(title: str, says: str, **fields: Any) -> None:
    json_with(title, says, lambda content: content["images"][0].update(fields))


json_text("empty file", "not valid json.*copied completely", "")
json_text("cut off", "not valid json", json.dumps(CONTENT)[:100])
json_text("XML", "not valid json", "<annotation></annotation>")
json_text("UTF-16", "not in UTF-8", json.dumps(CONTENT).encode("utf-16"))
json_text("binary", "not in UTF-8", bytes(range(256)))
json_text("a list", "not in COCO format: it holds a list", "[]")
json_text("a text", "not in COCO format: it holds a str", '"images"')
json_text("null", "not in COCO format", "null")
json_text("nested a million deep", "not valid json", "[" * 1_000_000)
for _part in ("images", "annotations", "categories"):
    json_with(f"no {_part}", f"no list '{_part}'", lambda content, part=_part: content.pop(part) and None)
    json_with(f"{_part} is an object", f"no list '{_part}'", lambda content, part=_part: content | {part: {}})
    json_with(f"{_part} holds a number", "number 1 is 5, expected an object", lambda c, part=_part: c | {part: [5]})
json_with("empty images", "lists no images", lambda content: content | {"images": []})
json_with("empty categories", "lists no categories", lambda content: content | {"categories": []})
image("image without a file name", "image 7: 'file_name' must be the path", file_name=None)
image("image with an empty file name", "image 7: 'file_name' must be the path", file_name="  ")
image("image whose file name is a number", "'file_name' must be the path", file_name=12)
image("image whose file name holds a zero byte", "'file_name' must be the path", file_name="a\0.png")
image("image with a negative id", "image -7: 'id' must be an integer", id=-7)
image("image id with a fraction", r"image 7\.5: 'id' must be an integer", id=7.5)
image("image id that is a word", "image 'seven': 'id' must be an integer", id="seven")
image("image id that is true", "image True: 'id' must be an integer", id=True)
image("image id beyond 64 bits", "'id' must be an integer from 0 to", id=2**64)
image("image of no height", "'height' must be the image's size in pixels", height=0)
image("image of negative width", "'width' must be the image's size in pixels", width=-24)
image("image whose width is a word", "'width' must be the image's size", width="wide")
image("image of unknown width", "'width' must be the image's size", width=None)
image("image of endless width", "'width' must be the image's size", width=math.inf)
image("image of 10^9 pixels height", "'height' must be the image's size", height=10**9)
json_with("image without id", "image number 1 has no 'id'", lambda c: c["images"][0].pop("id") and None)
json_with("image without height", "image 7 has no 'height'", lambda c: c["images"][0].pop("height") and None)
json_with("two images with one id", "image id 7 occurs 2 times", lambda c: c["images"].append(dict(c["images"][0])))
json_with("category without id", "category number 1 has no 'id'", lambda c: c["categories"][0].pop("id") and None)
json_with("category with a negative id", "category -3: 'id' must be", lambda c: c["categories"][0].update(id=-3))
json_with("category id that is a word", "category 'cup': 'id' must be", lambda c: c["categories"][0].update(id="cup"))
json_with("category id that is a list", "category list: 'id' must be", lambda c: c["categories"][0].update(id=[3]))
json_with(
    "two categories with one id", "category id 3 occurs 2", lambda c: c["categories"].append({"id": 3, "name": "b"})
)
annotation("annotation without image", "annotation 1 has no 'image_id'", image_id=...)
annotation("annotation without category", "annotation 1 of image 7 has no 'category_id'", category_id=...)
annotation("annotation of an unknown image", "annotation 1 of image 9 belongs to an unknown image", image_id=9)
annotation("annotation of an unknown category", "annotation 1 of image 7 has the unknown category 4", category_id=4)
annotation("annotation of a category by its name", "'category_id' must be an integer", category_id="cup")
annotation("annotation of category null", "'category_id' must be an integer", category_id=None)
annotation("annotation of category NaN", "'category_id' must be an integer", category_id=math.nan)
annotation("crowd 2", "'iscrowd' must be 0", iscrowd=2)
annotation("crowd 'no'", "'iscrowd' must be 0", iscrowd="no")
annotation("crowd that is a list", "'iscrowd' must be 0", iscrowd=[0])
annotation("no segmentation", "has no segmentation; the model needs masks", segmentation=...)
annotation("segmentation null", "has no segmentation; the model needs masks", segmentation=None)
annotation("segmentation is a text", "'segmentation' must be a list of outlines", segmentation="x")
annotation("segmentation is a number", "'segmentation' must be a list of outlines", segmentation=4.0)
annotation("outline is no list", "an outline that is not a list of pairs", segmentation=SQUARE)
annotation(
    "outline of an odd number of values", "an outline that is not a list of pairs", segmentation=[[1, 2, 3, 4, 5, 6, 7]]
)
annotation("outline with words", "something that is not a number", segmentation=[["1", "2", "3", "4", "5", "6"]])
annotation("outline with null", "something that is not a number", segmentation=[[1, 2, None, 4, 5, 6]])
annotation(
    "outline of points",
    "something that is not a number",
    segmentation=[[[1, 2], [3, 4], [5, 6], [7, 8], [9, 1], [2, 2]]],
)
annotation("outline with NaN", "not finite or beyond", segmentation=[[1, 2, math.nan, 4, 5, 6]])
annotation("outline with infinity", "not finite or beyond", segmentation=[[1, 2, math.inf, 4, 5, 6]])
annotation("outline with both infinities", "not finite or beyond", segmentation=[[1, 2, math.inf, -math.inf, 5, 6]])
annotation("outline with 1e7", "not finite or beyond", segmentation=[[1, 2, 1e7, 4, 5, 6]])
annotation("outline with -1e30", "not finite or beyond", segmentation=[[1, 2, -1e30, 4, 5, 6]])
annotation("run lengths without counts", "run lengths without counts", segmentation={"size": [20, 24]})
annotation("run lengths without size", "run lengths without a size", segmentation={"counts": [480]})
annotation(
    "run lengths of another size",
    r"run lengths for \[24, 20\], but its image is \[20, 24\]",
    segmentation={"size": [24, 20], "counts": [480]},
)
annotation(
    "run lengths that are too short",
    "cover 10 pixels, of an image of 480",
    segmentation={"size": [20, 24], "counts": [10]},
)
annotation(
    "run lengths that are too long",
    "cover 1000 pixels, of an image of 480",
    segmentation={"size": [20, 24], "counts": [1000]},
)
annotation("negative run lengths", "not a number of pixels", segmentation={"size": [20, 24], "counts": [500, -20]})
annotation("run lengths with words", "not a number of pixels", segmentation={"size": [20, 24], "counts": ["480"]})
annotation("empty run lengths", "cover 0 pixels", segmentation={"size": [20, 24], "counts": []})
annotation(
    "compressed run lengths that are too short", "cover . pixels", segmentation={"size": [20, 24], "counts": "05"}
)
annotation(
    "compressed run lengths that break off", "end in the middle", segmentation={"size": [20, 24], "counts": "oo"}
)
annotation(
    "compressed run lengths of a million marks",
    "not in COCO's compressed form",
    segmentation={"size": [20, 24], "counts": "o" * 10**6},
)
annotation(
    "compressed run lengths with emoji",
    "not in COCO's compressed form",
    segmentation={"size": [20, 24], "counts": "🙂"},
)
annotation("run lengths of size true", "run lengths without a size", segmentation={"size": [True, 24], "counts": [24]})
