"""Files that once crashed or hung the process, or ended it with a traceback: one line tells what is wrong."""

import contextlib
import json
import math
import os
import pickle
import re
import shutil
import struct
import zlib
from base64 import b64encode
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from child import answer
from exported import coco_beside, cvat, labelme, voc_of_roboflow, yolo
from safetensors.torch import save_file
from small import FILE, MODEL, RUN

from dimaskdino.checkpoints.published_keys import ALWAYS, NAMES, NO_EFFECT, SAME
from dimaskdino.checkpoints.published_settings import _LEVELS, _SPECIAL, _TOGETHER, load_settings
from dimaskdino.config import dump_config, keys_of, load_config
from dimaskdino.runs.folder import RunFolder
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.serialization import read_safetensors

LONG = "9" * 400
NUMBERS = ["nan", "3e8", LONG, *(pytest.param(text, marks=pytest.mark.slow) for text in ("inf", "-3e8", "1e300"))]


def says(found: tuple[int, str], pattern: str) -> None:
    said = answer(*found)
    assert re.search(pattern, said), said or "success"


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


# ---- annotations


@pytest.fixture
def importing(child, tmp_path):
    """Change a file of an export, and import it."""

    def check(write, file: str, edit, pattern: str) -> None:
        export = tmp_path / "export"
        write(export, range(1, 5))
        edit(export / file)
        says(child(tmp_path, "data", "import", export, "made"), pattern)
        assert not (tmp_path / "made").exists()

    return check


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    ("write", "file", "old", "new"),
    [
        (voc_of_roboflow, "train/photo1.xml", "<x1>5.0<", "<x1>{}<"),
        (cvat, "annotations.xml", 'points="5.0,', 'points="{},'),
        (labelme, "photo1.json", '"points": [[5.0,', '"points": [[{},'),
        (yolo, "labels/train/photo1.txt", "0 0.078125 ", "0 {} "),
        (coco_beside, "labels.json", "[[5.0,", "[[{},"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_coordinate_that_no_image_has_is_refused(write, file, old, new, number, importing):
    if file.endswith(".json"):
        number = {"nan": "NaN", "inf": "Infinity"}.get(number, number)
    importing(write, file, lambda f: change(f, old, new.format(number)), "coordinate|not a number|CVAT|not valid")


def zigzag(count: int, reach: float) -> list[float]:
    return [x for i in range(count) for x in ((-1) ** i * reach, (-1) ** (i // 2) * reach)]


@pytest.mark.parametrize("write", [coco_beside, labelme, voc_of_roboflow, cvat], ids=lambda x: x.__name__)
def test_an_outline_longer_than_any_image_explains_is_refused(write, importing):
    long = zigzag(20_000, 131_000)
    pairs = list(zip(long[::2], long[1::2], strict=True))

    def edit(file: Path) -> None:
        if write is coco_beside:
            content = json.loads(file.read_text())
            content["annotations"][0]["segmentation"] = [long]
            file.write_text(json.dumps(content))
        elif write is labelme:
            content = json.loads(file.read_text())
            content["shapes"][0]["points"] = pairs
            file.write_text(json.dumps(content))
        elif write is cvat:
            text = ";".join(f"{x},{y}" for x, y in pairs)
            file.write_text(re.sub('points="[^"]*"', f'points="{text}"', file.read_text(), count=1))
        else:
            text = "".join(f"<x{i}>{x}</x{i}><y{i}>{y}</y{i}>" for i, (x, y) in enumerate(pairs, 1))
            file.write_text(re.sub("<polygon>.*?</polygon>", f"<polygon>{text}</polygon>", file.read_text(), count=1))

    files = {coco_beside: "labels.json", labelme: "photo1.json", cvat: "annotations.xml"}
    importing(write, files.get(write, "train/photo1.xml"), edit, "outline|longer")


def training(place, child, *changes: object):
    settings = [*MODEL, *RUN, f"data.root={place.data}", "data.shapes=null", "model.backbone.weights=null", *changes]
    return child(place.folder, "train", *settings, "--config", FILE, "--run", "run")


def test_a_training_refuses_an_endless_outline(place, child):
    content = json.loads((place.data / "annotations" / "train.json").read_text())
    content["annotations"][0]["segmentation"] = [zigzag(20_000, 131_000)]
    place.write("data/annotations/train.json", json.dumps(content))
    (place.folder / "data" / "images").symlink_to(place.data / "images")
    says(training(place, child, f"data.root={place.folder / 'data'}"), "outline")


def labelme_with(fields: dict, shape: dict | None = None):
    def edit(file: Path) -> None:
        content = json.loads(file.read_text()) | fields
        content["shapes"][0] |= shape or {}
        file.write_text(json.dumps(content))

    return edit


def png(height: int, width: int) -> str:
    """A PNG of these sides without pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b64encode(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")).decode()


@pytest.mark.parametrize(
    ("file", "fields", "shape", "pattern"),
    [
        ("photo2.json", {}, {"points": []}, "points"),
        ("photo2.json", {}, {"points": [[math.nan, 1]]}, "coordinate"),
        ("photo2.json", {}, {"points": [[1e300, 1]]}, "coordinate"),
        ("photo2.json", {}, {"mask": png(60_000, 60_000)}, "mask of a shape cannot be read"),
        ("photo2.json", {}, {"mask": [1]}, "mask of a shape cannot be read"),
        ("photo2.json", {"imageHeight": 60_000, "imageWidth": 60_000}, {}, "60000x60000"),
        ("photo1.json", {"imageHeight": 10**9}, {}, "1000000000"),
        ("photo1.json", {"imageHeight": int(LONG)}, {}, "image"),
        ("photo1.json", {}, {"label": "\ud800"}, "class name"),
        ("photo1.json", {}, {"points": 5}, "points"),
    ],
)
def test_labelme_files_that_claim_the_impossible(file, fields, shape, pattern, importing):
    importing(labelme, file, labelme_with(fields, shape), pattern)


@pytest.mark.parametrize("side", ["1000000000", LONG, "-5", "0", "nan"])
def test_cvat_images_of_an_impossible_size(side, importing):
    importing(cvat, "annotations.xml", lambda f: change(f, 'height="48"', f'height="{side}"'), "height|size|CVAT")


@pytest.mark.parametrize("fields", [{"group_id": [1]}, {"shape_type": [["polygon"]]}])
def test_lists_where_labelme_has_a_text_or_a_number(fields, child, tmp_path):
    labelme(tmp_path / "export", range(1, 5))
    labelme_with({}, fields)(tmp_path / "export" / "photo1.json")
    assert answer(*child(tmp_path, "data", "import", "export", "made")) == ""


def test_deep_nesting_in_xml(child, tmp_path):
    cvat(tmp_path / "export", range(1, 5))
    deep = "<a>" * 200_000 + "</a>" * 200_000
    change(tmp_path / "export" / "annotations.xml", "<meta>", f"<meta>{deep}")
    answer(*child(tmp_path, "data", "import", "export", "made"))


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("file", "content", "pattern"),
    [
        ("data.yaml", ALIASES + "names: *a11\ntrain: images/train\n", "aliases"),
        ("data.yaml", "names: {? [1] : cat}\ntrain: images/train\n", "YAML|names"),
        ("data.yaml", 'names: ["\\uD800", dog]\ntrain: images/train\nval: images/val', "name"),
        ("data.yaml", "names: " + "[" * 5000, "YAML|nested"),
        ("data.yaml", "names: [cat, dog]\ntrain: images/train\n".encode("utf-16"), "UTF-8"),
        ("data.yaml", "names: [a, a]\ntrain: images/train\n", "two classes"),
        ("labels/train/photo1.txt", "0 0.1 0.1 0.5 0.5 0.9 0.1".encode("utf-16"), "photo1.txt.*UTF-8"),
        ("labels/train/photo1.txt", "0 0.1 0.1 0.5 0.5 0.9 0.1 # \u00e9".encode("latin-1"), "photo1.txt.*UTF-8"),
    ],
)
def test_yolo_files_that_cannot_be_read(file, content, pattern, child, tmp_path):
    yolo(tmp_path / "export", range(1, 5))
    (tmp_path / "export" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    says(child(tmp_path, "data", "import", tmp_path / "export" / "data.yaml", "made"), pattern)


def test_an_image_that_is_a_pipe(place, child):
    coco_beside(place.folder / "export", range(1, 5))
    (place.folder / "export" / "photo1.png").unlink()
    os.mkfifo(place.folder / "export" / "photo1.png")
    says(child(place.folder, "data", "import", "export", "made"), "photo1.png.*regular file")
    says(child(place.folder, "predict", place.model, "export/photo1.png", "--output", "out"), "regular file")


# ---- settings


@pytest.fixture
def shown(child, tmp_path):
    """Give a setting in a file and on the command line; both must be refused in the same words."""

    def check(key: str, value: str, pattern: str) -> None:
        *sections, name = key.split(".")
        text = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections))
        (tmp_path / "settings.yaml").write_text(f"{text}{'  ' * len(sections)}{name}: {value}\n")
        says(child(tmp_path, "config", "show", "settings.yaml"), pattern)
        says(child(tmp_path, "config", "show", FILE, f"{key}={value}"), pattern)

    return check


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.decoder.layers", "1000000"),
        ("model.pixel_decoder.layers", "1000000"),
        ("model.selection.token_interaction_layers", "1000000"),
        ("model.hidden_dim", "32000000"),
        ("model.hidden_dim", "65536"),
        ("model.decoder.ffn_dim", "1000000000000"),
        ("model.backbone.width", "60000"),
        ("model.classes", LONG),
        ("data.jitter.size", "1000000000"),
        ("data.workers", "1000000"),
        ("train.seed", str(2**64)),
        ("schedule.steps", LONG),
        ("optimizer.lr", LONG),
        ("optimizer.lr", ".inf"),
        ("loss.weights.dice", LONG),
    ],
)
def test_settings_that_no_memory_holds(key, value, shown):
    shown(key, value, key.split(".")[-1] + "|parameters")


@pytest.mark.parametrize("value", [LONG, "[[[1]]]", "{a: b}", "null", "'x'", "[]"])
def test_any_setting_of_any_type_is_taken_or_refused_in_one_line(value):
    for key in keys_of():
        with contextlib.suppress(UserError):
            load_config(FILE, [f"{key}={value}"])


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("extends: /dev/zero", "/dev/zero is no regular file"),
        ("extends: pipe", "pipe is no regular file"),
        ("extends: [a]", "extends must be the path"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: " + "{a: " * 3000, "nested too deeply"),
        ("a: &a [*a]", "nested too deeply|refers to itself"),
        (ALIASES, "aliases"),
        ("? [a, b]\n: 1", "unknown setting|not valid YAML"),
        ("train: {seed: !!python/object/apply:os.system [touch pwned]}", "not valid YAML"),
        ("data: {root: 2020-99-99}", "not valid YAML|root"),
        (f"1: {LONG}", "keys should be strings"),
        ('"\\uD800": 1', "valid string"),
    ],
)
def test_configurations_that_cannot_be_read(text, pattern, child, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "settings.yaml").write_text(text)
    says(child(tmp_path, "config", "show", "settings.yaml"), pattern)


def test_a_training_that_no_memory_holds_is_refused_in_one_line(place, child):
    says(training(place, child, "loss.points=1000000000000"), "memory does not suffice")


@pytest.mark.parametrize("value", [int(LONG), [[1]], {"a": 1}, "(" * 300, None, math.nan])
def test_published_keys_with_values_of_another_type(value, tmp_path):
    file = tmp_path / "published.yaml"
    for key in (*SAME, *ALWAYS, *_SPECIAL, *NO_EFFECT, *NAMES, *_TOGETHER, *_LEVELS):
        tree: Any = value
        for name in reversed(key.split(".")):
            tree = {name: tree}
        file.write_text(yaml.safe_dump(tree))
        with contextlib.suppress(UserError):
            dump_config(load_settings(file).config)


@pytest.mark.parametrize("key", ["MODEL.BACKBONE.FREEZE_AT", "SEED", "DATASETS.TRAIN", "MODEL.MaskDINO.DN_NOISE_SCALE"])
def test_a_published_key_of_another_type_is_named(key, child, tmp_path):
    says(child(tmp_path, "config", "show", FILE, key, "{1: 2}"), f"{key} = .*: expected ")


# ---- models, resume points, metrics


def lists_of_lists(depth: int) -> bytes:
    """A pickle of a list that holds the same list twice, and so on."""
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return pickle.dumps({"model": {"a": value}}, protocol=2)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (lists_of_lists(40), "holds no state dict"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "numbers more objects"),
        (pickle.dumps({"a": [[[]]]}).replace(b"]", b"]" * 5000), "pickle|state dict"),
        (pickle.dumps({"a": np.zeros(2, ">f4")}, protocol=2), "numbers that PyTorch does not know|a ResNet"),
        (pickle.dumps({1: np.zeros(2, "f4")}, protocol=2), "holds no state dict"),
    ],
)
def test_pickles_that_would_take_all_time_or_memory(content, pattern, child, tmp_path):
    (tmp_path / "m.pkl").write_bytes(content)
    says(child(tmp_path, "convert", "m.pkl", "out.safetensors"), pattern)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(2**20, 2**20),
        torch.zeros(3, 3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.zeros(3).to(torch.float8_e4m3fn),
    ],
    ids=["expanded", "sparse", "meta", "8 bits"],
)
def test_tensors_of_other_kinds(tensor, place, child):
    torch.save({"sem_seg_head.x": tensor}, "m.pth")
    says(child(place.folder, "convert", "m.pth", "out.safetensors"), "holds no state dict")


@pytest.mark.parametrize(
    ("edit", "pattern"),
    [
        (lambda m: m.update(config="[" * 100_000), "configuration in .* is damaged"),
        (lambda m: m.update(classes="[" * 100_000), "damaged metadata"),
        (lambda m: m.update(classes='["\\ud800", "b", "c", "d", "e"]'), "damaged metadata"),
        (lambda m: m.update(step="9" * 5000), "damaged metadata"),
        (lambda m: m.update(config=re.sub('"layers":\\d+', '"layers":1000000', m["config"])), "layers"),
        (lambda m: m.update(config=re.sub('"classes":\\d+', f'"classes":{LONG}', m["config"])), "classes"),
    ],
)
def test_models_whose_metadata_ask_for_the_impossible(edit, pattern, place, child):
    tensors, metadata = read_safetensors(place.model)
    edit(metadata)
    save_file(tensors, "m.safetensors", metadata)
    says(child(place.folder, "predict", "m.safetensors", place.photo, "--output", "out", "--device", "cpu"), pattern)


def wrong_moment(state: dict, value: Any) -> None:
    name = next(iter(state["optimizer"]))
    state["optimizer"][name] = state["optimizer"][name] | {"exp_avg": value}


@pytest.mark.parametrize(
    ("edit", "pattern"),
    [
        (lambda s: wrong_moment(s, torch.zeros(1)), "damaged optimizer state"),
        pytest.param(lambda s: wrong_moment(s, torch.zeros(0)), "damaged optimizer state", marks=pytest.mark.slow),
        pytest.param(lambda s: wrong_moment(s, None), "damaged optimizer state", marks=pytest.mark.slow),
        (lambda s: s["optimizer"].update({1: {}}), "optimizer states of other parameters"),
        (lambda s: s["optimizer"].update({next(iter(s["optimizer"])): 5}), "damaged optimizer state"),
        (lambda s: s["optimizer"].update({"param_groups": 5, "state": {10**6: {}}}), "parts of another training"),
        pytest.param(
            lambda s: s["optimizer"].update({"param_groups": 5}), "parts of another training", marks=pytest.mark.slow
        ),
        pytest.param(lambda s: s.pop("optimizer"), "no resume point: optimizer", marks=pytest.mark.slow),
        (lambda s: s.update(step=-5), "no resume point: step"),
        pytest.param(lambda s: s.update(step=10**400), "no resume point: step", marks=pytest.mark.slow),
        pytest.param(lambda s: s.update(config="{}"), "other settings", marks=pytest.mark.slow),
        (lambda s: s.update(config="["), "configuration in .* is damaged"),
        (lambda s: s.update(config='{"x": 1}'), "unknown setting 'x'"),
        (lambda s: s.update(validation={"score": "x"}), "no resume point: validation"),
        (lambda s: s.update(validation={"other": 1}), "parts of another training"),
        pytest.param(lambda s: s.update(validation=[1]), "no resume point: validation", marks=pytest.mark.slow),
        (lambda s: s.update(average={"module.x": torch.zeros(1)}), "parts of another training"),
        pytest.param(lambda s: s.update(average={"n_averaged": 5}), "no resume point: average", marks=pytest.mark.slow),
        (lambda s: s["model"].update({1: torch.zeros(1)}), "no resume point: model"),
        (lambda s: s["model"].update({"heads.label.bias": torch.tensor(1.0)}), "trained for 1 classes"),
    ],
)
def test_resume_points_with_foreign_or_missing_parts(edit, pattern, place, child):
    shutil.copytree(place.run, "run")
    points = sorted(Path("run/checkpoints").glob("step_*.pt"))
    state = torch.load(points[-1], weights_only=True)
    edit(state)
    for point in points:
        torch.save(state, point)
    average = ["train.average=0.9"] if state.get("average") else []
    says(training(place, child, "schedule.steps=8", *average), pattern)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 7, "loss": null}',
        '{"step": 7, "loss": "x"}',
        '{"step": 7, "validation": null}',
        '{"step": 7, "validation": {"box_AP": "1", "mask_AP": 1}}',
        '{"step": 7, "validation": {"box_AP": 1}}',
        f'{{"step": {LONG}, "loss": 1}}',
        f'{{"step": 7, "loss": {LONG}}}',
        '{"step": true, "loss": 1}',
        '{"step": 7, "losses": {"a": []}}',
        '{"step": 7, "loss": ' + "[" * 100_000,
    ],
)
def test_damaged_records_of_metrics_are_left_out(line, place, child):
    shutil.copytree(place.run, "run")
    before = RunFolder("run").read_metrics()
    with open("run/metrics.jsonl", "a") as file:
        file.write(line + "\n")
    assert RunFolder("run").read_metrics() == before
    assert answer(*child(place.folder, "status", "run")) == ""


STAGES = '{"stages": {"a": {"box": {"AP": "x"}, "mask": null}}, "images": 1, "source": ""}'


@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json", "evaluation/layers.json", "config.yaml"])
def test_a_run_with_a_pipe_or_with_something_else_in_it(name, place, child):
    texts = ["[" * 100_000, '{"stages": []}\n', STAGES]
    for make in (os.mkfifo, *(partial(Path.write_text, data=text) for text in texts)):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(place.run, "run")
        file = Path("run") / name
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        make(file)
        answer(*child(place.folder, "status", "run"))
