"""Bad inputs, each given to the command line: one clear line, no traceback, nothing lost.

`test_bad_inputs.py` runs them all. An input is a function of a `Place`, which makes files in an empty folder and
returns the arguments of a command; with it goes what the line must say.
"""

import json
import math
import os
import pickle
import shlex
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from small import FILE, overrides


@dataclass(frozen=True)
class Place:
    """Where an input is made.

    Attributes:
        folder: an empty folder.
        data: the small shapes data; not to be changed.
        run: a finished run; not to be changed.
    """

    folder: Path
    data: Path
    run: Path

    @property
    def model(self) -> Path:
        return self.run / "checkpoints" / "model.safetensors"

    @property
    def photo(self) -> Path:
        return next((self.data / "images" / "val").iterdir())

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


@dataclass(frozen=True)
class BadInput:
    """An input.

    Attributes:
        make: makes it and returns the arguments of the command.
        says: pattern of the line that the command must write.
        code: exit status.
    """

    make: Callable[[Place], list[Any]]
    says: str
    code: int = 1


BAD_INPUTS: dict[str, BadInput] = {}


def bad(title: str, says: str, make: Callable[[Place], list[Any]], code: int = 1) -> None:
    assert title not in BAD_INPUTS, title
    BAD_INPUTS[title] = BadInput(make, says, code)


# ---------------------------------------------------------------- annotations: `dimaskdino data check`

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

# ---------------------------------------------------------------- images: `dimaskdino predict`, `dimaskdino data check`


def predict(place: Place, *images: Path) -> list[Any]:
    return ["predict", place.model, *images, "--output", place.folder / "out", "--device", "cpu"]


def picture(title: str, says: str, name: str, content: Callable[[Place], bytes]) -> None:
    bad(f"image: {title}", rf"skipped: .*{says}", lambda place: predict(place, place.write(name, content(place))))


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


UNREADABLE = "cannot be read, it may be truncated or no image"
picture("an empty file", UNREADABLE, "a.jpg", lambda place: b"")
picture("a text", UNREADABLE, "a.jpg", lambda place: b"hello")
picture("a web page", UNREADABLE, "a.png", lambda place: b"<html><img src=x onerror=alert(1)></html>")
picture("an archive", UNREADABLE, "a.png", lambda place: b"PK\x03\x04" + bytes(100))
picture("zeros", UNREADABLE, "a.webp", lambda place: bytes(1000))
picture("a cut-off JPEG", UNREADABLE, "a.jpg", lambda place: place.photo.read_bytes()[:600])
picture("only the start of a JPEG", UNREADABLE, "a.jpg", lambda place: place.photo.read_bytes()[:20])
picture("a PNG without pixels", UNREADABLE, "a.png", lambda place: png(10, 10))
picture("a PNG with a broken checksum", UNREADABLE, "a.png", lambda place: png(4, 4, bytes(52))[:-20] + bytes(20))
picture("a PNG that claims 50,000 x 50,000 pixels", UNREADABLE, "a.png", lambda place: png(50_000, 50_000))
picture("a TIFF that is only a header", UNREADABLE, "a.tif", lambda place: b"II*\0\x08\0\0\0")
picture("a BMP that is only a header", UNREADABLE, "a.bmp", lambda place: b"BM" + bytes(20))
bad("image: does not exist", "nothing.jpg does not exist", lambda place: predict(place, place.folder / "nothing.jpg"))
bad(
    "image: a folder without images",
    "no file of the types .jpg",
    lambda place: predict(place, place.data / "annotations"),
)
bad(
    "image: a file of no known type",
    r"skipped: .*notes\.txt",
    lambda place: predict(place, place.write("notes.txt", "x")),
)


def folder_named_like_an_image(place: Place) -> list[Any]:
    (place.folder / "in" / "x.jpg").mkdir(parents=True)
    return predict(place, place.folder / "in")


def broken_link(place: Place) -> list[Any]:
    (place.folder / "in").mkdir()
    (place.folder / "in" / "a.jpg").symlink_to(place.folder / "gone.jpg")
    return predict(place, place.folder / "in")


bad("image: a folder named x.jpg", "no file of the types", folder_named_like_an_image)
bad("image: a broken link", r"skipped: .*a\.jpg does not exist", broken_link)


def checked_image(title: str, says: str, write: Callable[[Path], None]) -> None:
    def make(place: Place) -> list[Any]:
        arguments = check(place, json.dumps(CONTENT))
        write(place.folder / "images" / "train" / "a.png")
        return arguments

    bad(f"image of a dataset: {title}", says, make)


checked_image("missing", "1 images are missing, the first .*a.png", Path.unlink)
checked_image("of another size", r"a.png is 5x5, the annotations say 20x24", lambda p: Image.new("RGB", (5, 5)).save(p))
checked_image(
    "turned on its side", "a.png is 24x20, the annotations say 20x24", lambda p: Image.new("L", (20, 24)).save(p)
)
checked_image("cut off", f"a.png {UNREADABLE}", lambda p: p.write_bytes(p.read_bytes()[:30]))

# ---------------------------------------------------------------- configuration: `dimaskdino config show`


def setting(assignment: str, says: str) -> None:
    bad(f"setting: {assignment[:60]}", says, lambda place: ["config", "show", FILE, assignment])


def config_file(title: str, says: str, text: str | bytes) -> None:
    bad(f"configuration: {title}", rf"c\.yaml.*{says}", lambda place: ["config", "show", place.write("c.yaml", text)])


setting("train.batchsize=3", "unknown setting 'train.batchsize'; did you mean 'train.batch_size'")
setting("train.batch_size=0", "train.batch_size: input should be greater than 0")
setting("train.batch_size=-3", "train.batch_size: input should be greater than 0")
setting("train.batch_size=two", "train.batch_size: input should be a valid integer.*got 'two'")
setting("train.batch_size=1.5", "train.batch_size: input should be a valid integer")
setting("train.batch_size=", "train.batch_size: input should be a valid integer")
setting("train.seed=-1", "train.seed: input should be greater than or equal to 0")
setting("train.keep=0", "train.keep: input should be greater than 0")
setting("train.precision=fp8", "train.precision: input should be 'fp32'")
setting("optimizer.lr=.nan", "optimizer.lr: input should be a finite number")
setting("optimizer.lr=.inf", "optimizer.lr: input should be a finite number")
setting("optimizer.lr=-1", "optimizer.lr: input should be greater than")
setting("loss.cost.mask=.nan", "loss.cost.mask: input should be a finite number")
setting("schedule.steps=0", "schedule.steps: input should be greater than 0")
setting("model.selection.k=[300, 600]", "cannot keep more tokens than the previous one")
setting("model.selection.k=[]", "one, two or three selections")
setting("model.selection.k=many", "model.selection.k: input should be a valid tuple")
setting("model.pixel_decoder.levels=7", "model.pixel_decoder.levels")
setting("model=5", "model: input should be a valid")
setting("data.workers=-1", "data.workers: input should be greater than or equal to 0")
setting("=5", "unknown setting ''")
setting("train.batch_size=[1", "the value of train.batch_size is not valid YAML")
setting("train.batch_size={a: &x [*x]}", "the value of train.batch_size")
config_file("empty text", "must hold settings|", "hello")
config_file("a list", r"must hold settings \(key: value\), got list", "[1, 2]")
config_file("broken YAML", "is not valid YAML", "model: {")
config_file("a tab", "is not valid YAML", "model:\n\thidden_dim: 4")
config_file("UTF-16", "not in UTF-8", "model: {}".encode("utf-16"))
config_file("binary", "not in UTF-8", bytes(range(128, 256)))
config_file("an object of Python", "is not valid YAML", "model: !!python/object/apply:os.system ['true']")
config_file("extends a number", "extends must be the path", "extends: 5")
config_file("extends itself", "extends itself", "extends: c.yaml")
config_file("an impossible date", "is not valid YAML", "model: 2024-13-45")
config_file(
    "aliases that grow without bound",
    "holds more than 100,000 values",
    "\n".join(
        [
            "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]",
            *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
        ]
    ),
)
config_file(
    "published form, aliases that grow without bound",
    "holds more than 100,000 values",
    "\n".join(
        [
            "A0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]",
            *(f"A{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
        ]
    ),
)
config_file("an alias to itself", "refers to itself", "model: &m {backbone: *m}")
config_file("nested ten thousand deep", "nested too deeply|not valid YAML", "model: " + "[" * 10_000)
bad(
    "configuration: extends nothing",
    r"cannot read the configuration .*gone\.yaml",
    lambda place: ["config", "show", place.write("c.yaml", "extends: gone.yaml")],
)
bad(
    "configuration: extends a folder",
    "cannot read the configuration",
    lambda place: ["config", "show", place.write("c.yaml", "extends: .")],
)
bad("configuration: does not exist", "gone.yaml", lambda place: ["config", "show", "gone.yaml"])
bad("configuration: unknown name", "did you mean", lambda place: ["config", "show", "shapes/dimaskdino_r81"])
bad(
    "configuration: a folder",
    "no configuration .*give a YAML file",
    lambda place: ["config", "show", f"{place.folder}/"],
)
bad("configuration: neither form", "neither key=value", lambda place: ["config", "show", FILE, "batch_size"])
bad(
    "configuration: a published key without value",
    "needs a value",
    lambda place: ["config", "show", FILE, "SOLVER.BASE_LR"],
)
bad(
    "configuration: a published value out of range",
    "SOLVER.BASE_LR|optimizer.lr",
    lambda place: ["config", "show", FILE, "SOLVER.BASE_LR", "-1"],
)

# ---------------------------------------------------------------- models


def with_model(place: Place, file: Path | str) -> list[Any]:
    return ["predict", file, place.photo, "--output", place.folder / "out", "--device", "cpu"]


def model_file(title: str, says: str, name: str, content: Callable[[Place], bytes]) -> None:
    bad(f"model: {title}", says, lambda place: with_model(place, place.write(name, content(place))))


def edited(title: str, says: str, edit: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """The finished run's model file with other tensors or metadata."""

    def make(place: Place) -> list[Any]:
        from dimaskdino.serialization import read_safetensors

        tensors, metadata = read_safetensors(place.model)
        edit(tensors, metadata)
        save_file(tensors, place.folder / "m.safetensors", metadata)
        return with_model(place, place.folder / "m.safetensors")

    bad(f"model: {title}", rf"(?=.*m\.safetensors).*{says}", make)


def resume_point(title: str, says: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    def make(place: Place) -> list[Any]:
        newest = sorted((place.run / "checkpoints").glob("step_*.pt"))[-1]
        state = torch.load(newest, weights_only=True)
        edited_state = edit(state)
        torch.save(state if edited_state is None else edited_state, place.folder / "m.pt")
        return with_model(place, place.folder / "m.pt")

    bad(f"model: {title}", rf"m\.pt.*{says}", make)


for _suffix, _words in (
    ("safetensors", "cannot be read"), ("pt", "cannot be read as a checkpoint"),
    ("pth", "cannot be read as a checkpoint"), ("pkl", "cannot be read as a pickle"),
    ("bin", "cannot be read|not"), ("onnx", "cannot be read|not"),
):  # fmt: skip
    for _title, _bytes in (("a text", b"hello, this is a text\n" * 20), ("empty", b""), ("zeros", bytes(4096))):
        model_file(f"{_title} as .{_suffix}", rf"m\.{_suffix} .*{_words}", f"m.{_suffix}", lambda place, b=_bytes: b)
model_file(
    "a cut-off model",
    r"m\.safetensors cannot be read, it may be truncated",
    "m.safetensors",
    lambda place: place.model.read_bytes()[:-100],
)
model_file(
    "a model with a header of 2^60 bytes",
    r"m\.safetensors cannot be read",
    "m.safetensors",
    lambda place: struct.pack("<Q", 2**60) + bytes(100),
)
edited("weights that are NaN", "is not finite", lambda t, m: t["heads.label.bias"].fill_(math.nan))
edited(
    "integer weights",
    "has the type torch.int64",
    lambda t, m: t.update({"heads.label.bias": t["heads.label.bias"].long()}),
)
edited("a missing weight", "1 parameters missing", lambda t, m: t.pop("heads.label.bias"))
edited("a weight too many", "1 parameters not in the model", lambda t, m: t.update(extra=torch.zeros(1)))
edited(
    "a weight of another shape",
    "1 parameters of another shape",
    lambda t, m: t.update({"heads.label.weight": torch.zeros(5, 3)}),
)
edited("no configuration", "no configuration of this kit", lambda t, m: m.pop("config") and None)
edited("a configuration that is no json", "configuration .* is damaged", lambda t, m: m.update(config="{"))
edited("a configuration that is a list", "a configuration has settings", lambda t, m: m.update(config="[]"))
edited("a configuration with unknown keys", "unknown setting 'x'", lambda t, m: m.update(config='{"x": 1}'))
edited("classes that are no json", "damaged metadata", lambda t, m: m.update(classes="cup"))
edited("classes that are a number", "damaged metadata", lambda t, m: m.update(classes="5"))
edited("too few classes", "classes", lambda t, m: m.update(classes='["cup"]'))
edited("no step", "damaged metadata", lambda t, m: m.pop("step") and None)
edited("a step that is a word", "damaged metadata", lambda t, m: m.update(step="ten"))
resume_point("a resume point without optimizer", "optimizer is missing", lambda s: s.pop("optimizer") and None)
resume_point("a resume point whose step is a text", "step is missing or damaged", lambda s: s.update(step="6"))
resume_point("a resume point whose model is a list", "model is missing or damaged", lambda s: s.update(model=[1]))
resume_point(
    "a resume point whose weights are numbers", "model is missing or damaged", lambda s: s.update(model={"a": 1})
)
resume_point("a tensor alone", "is not a checkpoint of this kit", lambda s: torch.zeros(3))
resume_point("a list", "is not a checkpoint of this kit", lambda s: [1, 2])
resume_point(
    "a resume point with weights that are NaN",
    "is not finite",
    lambda s: s["model"].update({"heads.label.bias": torch.full((5,), math.nan)}),
)


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch pwned",)


def pickled(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)


class ArrayOfObjects:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return np.ndarray, ((2,), np.dtype("O"), bytes(16))


def convert(title: str, says: str, name: str, content: Callable[[Place], bytes]) -> None:
    bad(
        f"convert: {title}",
        says,
        lambda place: ["convert", place.write(name, content(place)), place.folder / "o.safetensors"],
    )


convert(
    "a pickle that runs a command",
    "refers to .*system, which arrays do not need",
    "m.pkl",
    lambda place: pickled(Evil()),
)
convert(
    "a pickle of pointers",
    "calls numpy.ndarray|not numbers|expected numbers",
    "m.pkl",
    lambda place: pickled({"a": ArrayOfObjects()}),
)
convert("a pickle of text", "holds no state dict", "m.pkl", lambda place: pickled({"a": "b"}))
convert(
    "a pickle that is cut off", "cannot be read as a pickle", "m.pkl", lambda place: pickled({"a": np.zeros(9)})[:30]
)
convert(
    "a state dict of another network",
    "m.pkl",
    "m.pkl",
    lambda place: pickled({"layer.weight": np.zeros((3, 3), np.float32)}),
)
convert("an empty state dict", "m.pkl", "m.pkl", lambda place: pickled({}))


def evil_checkpoint(place: Place) -> list[Any]:
    torch.save({"model": Evil()}, place.folder / "m.pth")
    return ["convert", place.folder / "m.pth", place.folder / "o.safetensors"]


bad(
    "convert: a checkpoint that runs a command",
    "more than tensors and plain values, whose code is not run",
    evil_checkpoint,
)
bad(
    "convert: does not exist",
    "gone.pth does not exist",
    lambda place: ["convert", "gone.pth", place.folder / "o.safetensors"],
)
bad("convert: a folder", "cannot be read", lambda place: ["convert", place.folder, place.folder / "o.safetensors"])

# ---------------------------------------------------------------- command line and paths


def line(title: str, says: str, command: str) -> None:
    """A command line, in which `{run}`, `{model}`, `{photo}`, `{data}` and `{folder}` stand for those of the place.

    `{config}` is a configuration; `{small}` are settings for a small model on the data, `{small_gone}` on no data.
    """

    def make(place: Place) -> list[Any]:
        names = {name: str(getattr(place, name)) for name in ("run", "model", "photo", "data", "folder")}
        small = {"small": shlex.join(overrides(place.data)), "small_gone": shlex.join(overrides(Path("gone")))}
        return shlex.split(command.format(config=FILE, long="b" * 300, **names, **small))

    bad(title, says, make)


line("predict: no such model", "gone.safetensors", "predict gone.safetensors {photo}")
line("predict: a folder without a model", "holds no trained model", "predict {data} {photo} --output {folder}/o")
line(
    "predict: unknown stage",
    "the model has no stage 'decoder.9'; it has",
    "predict {model} {photo} --stage decoder.9 --output {folder}/o",
)
line("predict: threshold 30", "threshold", "predict {model} {photo} --threshold 30 --output {folder}/o")
line("predict: batch of 0", "batch_size", "predict {model} {photo} --batch-size 0 --output {folder}/o")
line("predict: unknown device", "device", "predict {model} {photo} --device gpu --output {folder}/o")
line("predict: a GPU that is not there", "cuda:77", "predict {model} {photo} --device cuda:77 --output {folder}/o")
line("predict: unknown precision", "precision", "predict {model} {photo} --precision fp4 --output {folder}/o")
line(
    "predict: onto its own input",
    "is an input and would be overwritten",
    "predict {model} {folder}/p/a.png --output {folder}/p",
)
line("predict: output is a file", "a file is where a folder is needed", "predict {model} {photo} --output {model}")
line("predict: output below a file", "a file is where a folder is needed", "predict {model} {photo} --output {model}/o")
line("predict: output of 300 letters", "the name is too long", "predict {model} {photo} --output {folder}/{long}")
line("evaluate: no model", "name the model", "evaluate")
line("evaluate: no such model", "gone", "evaluate gone.pt")
line(
    "evaluate: no such split", "no annotations of the split 'test'", "evaluate {model} --split test --output {folder}/o"
)
line("evaluate: no such stage", "has no stage 'last'", "evaluate {model} --stages last --output {folder}/o")
line(
    "evaluate: no such data",
    "dataset folder gone does not exist",
    "evaluate {model} data.root=gone --output {folder}/o",
)
line("evaluate: unknown setting", "did you mean", "evaluate {model} data.rot=x --output {folder}/o")
line("evaluate: other classes", "classes", "evaluate {model} model.classes=9 --output {folder}/o")
line("evaluate: processes 0", "--processes must be at least 1", "evaluate {model} --processes 0")
line("evaluate: negative bootstrap", "bootstrap", "evaluate {model} --bootstrap -5 --output {folder}/o")
line("evaluate: output is a file", "a file is where a folder is needed", "evaluate {model} --output {model}")
line("train: no run folder", "name the run folder", "train --config {config}")
line("train: empty run folder", "name the run folder", "train --config {config} --run ''")
line("train: run folder is a file", "a file is where a folder is needed", "train --config {config} --run {model}")
line("train: unknown configuration", "did you mean|does not exist", "train --config shapes/none --run {folder}/r")
line(
    "train: processes -3",
    "--processes must be at least 1, got -3",
    "train --config {config} --run {folder}/r --processes -3",
)
line(
    "train: no such data", "dataset folder gone does not exist", "train --config {config} --run {folder}/r {small_gone}"
)
line(
    "train: other classes than the data",
    "the model has 9 classes, but .* has 5 categories",
    "train --config {config} --run {folder}/r {small} model.classes=9",
)
line(
    "train: weights that do not exist",
    "gone.pt does not exist",
    "train --config {config} --run {folder}/r {small} train.weights=gone.pt",
)
line(
    "train: weights of another architecture",
    "another architecture",
    "train --config {config} --run {folder}/r {small} train.weights={model} model.hidden_dim=64",
)
line(
    "train: a batch smaller than its parts",
    "less than one image per part",
    "train --config {config} --run {folder}/r {small} train.accumulate=5",
)
line(
    "train: another seed in the same folder",
    "holds a run with other settings",
    "train --config {config} --run {run} {small} train.seed=5",
)
line(
    "train: fewer steps in the same folder",
    "holds a run with other settings",
    "train --config {config} --run {run} {small} schedule.steps=3",
)
line("status: no such run", "holds no run", "status {folder}/gone")
line("status: a file", "holds no run", "status {model}")
line("export: no such run", "not a finished run", "export {folder}/gone {folder}/o")
line("export: onto an existing folder", "exists already", "export {run} {folder}")
line("export: below a file", "a file is where a folder is needed", "export {run} {model}/o")


def converted_onto_a_folder(place: Place) -> list[Any]:
    torch.save(torchvision.models.resnet18().state_dict(), place.folder / "r18.pth")
    return ["convert", place.folder / "r18.pth", place.folder]


bad("convert: output is a folder", "a folder is where a file is needed", converted_onto_a_folder)
line("run: no such notebook", "no notebook .gone.: give a path, or one of", "run gone {folder}/o")
line("run: a notebook that does not exist", "gone.ipynb", "run gone.ipynb {folder}/o")
line("run: a file that is no notebook", "notebook", "run {folder}/bad.ipynb {folder}/o")
line("run: unknown parameter", "no parameter 'confg'; did you mean 'config'", "run train {folder}/o confg=x")
line("run: parameter without value", "not of the form name=value", "run train {folder}/o config")
line(
    "run: parameter of another type", "'processes' must be of type int, got 'two'", "run train {folder}/o processes=two"
)
line("run: list parameter that is a text", "'overrides' must be of type list", "run train {folder}/o overrides=a")
line("run: parameter that is no YAML", "the value of overrides is not valid YAML", "run train {folder}/o overrides=[a")
line(
    "run: parameter that is an object of Python",
    "not valid YAML",
    "run train {folder}/o config=!!python/name:os.system",
)
line("run: folder is a file", "a file is where a folder is needed", "run train {model} config={config}")
line("study: unknown", "no study 'table_33'; did you mean 'table_3'", "study table_33")
line("study: unknown scale", "no scale 'huge'", "study table_3 {folder} --scale huge --plan")
line("study: parallel 0", "parallel must be at least 1", "study table_3 {folder} --parallel 0 --plan")
line(
    "study: negative seed",
    "train.seed: input should be greater than or equal to 0",
    "study table_3 {folder} --seeds -4 --plan",
)
line("study: unknown setting", "did you mean", "study table_3 {folder} train.batchsize=3 --plan")
line("study: a file that is none", "is not a study", "study {folder}/study.yaml {folder}/o --plan")
line("data check: no such folder", "does not exist; set data.root", "data check gone")
line("data check: no such split", "has no annotations of the split 'test'", "data check {data} test")
line("data shapes: folder exists", "exists already", "data shapes {data}")
line("data shapes: below a file", "a file is where a folder is needed", "data shapes {model}/o --train 2 --val 2")
line("data shapes: no images", "greater than 0", "data shapes {folder}/o --train 0")
line("data shapes: images of 0 pixels", "size", "data shapes {folder}/o --size 0")
line(
    "data shapes: negative seed", "seed: input should be greater than or equal to 0", "data shapes {folder}/o --seed -1"
)
line("data bdd100k: no such folder", "does not exist; BDD100K", "data bdd100k gone")


def prepare(place: Place) -> None:
    """Files that some command lines name."""
    place.write("p/a.png", b"")
    shutil.copyfile(place.photo, place.folder / "p" / "a.png")
    place.write("bad.ipynb", "{}")
    place.write("study.yaml", "title: 5")


def row_names(name: str) -> None:
    text = (
        f"title: t\nreport: [last.box]\nseeds: [0]\nscales: {{shapes: {FILE}}}\nrows: [{{name: '{name}', label: l}}]\n"
    )
    bad(
        f"study: a row named {name}",
        "name: string should match pattern",
        lambda place: ["study", place.write("s.yaml", text), place.folder / "o", "--plan"],
    )


for _name in ("../../evil", "/etc/evil", "a/b", "", "..", ".hidden", "a b", "a\\b"):
    row_names(_name)


KINDS = {
    "json": "annotation files",
    "image": "images",
    "image of a dataset": "images",
    "setting": "configurations",
    "configuration": "configurations",
    "model": "checkpoint files",
    "convert": "checkpoint files",
    "run": "parameters of notebooks",
}


def counts() -> dict[str, int]:
    """Number of inputs of each kind."""
    kinds = Counter(KINDS.get(title.partition(":")[0], "command lines and paths") for title in BAD_INPUTS)
    return dict(kinds.most_common())


if __name__ == "__main__":
    file = Path(__file__).parent.parent / "docs" / "measurements" / "bad_inputs.json"
    file.write_text(json.dumps(counts(), indent=1) + "\n")
