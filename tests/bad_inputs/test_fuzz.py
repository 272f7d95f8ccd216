"""Files that are changed at random: every reader succeeds or answers in one clear line, in bounded time and memory.

A case is a function of its number: `FUZZ_CASES=1234` runs that case of every reader, `FUZZ_CASES=0-9999` a range.
"""

import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from child import answer
from exported import coco_beside, cvat, labelme, mask_folders, voc, voc_of_roboflow, yolo
from safetensors.torch import save_file
from small import FILE, MODEL, RUN

from dimaskdino.checkpoints.published_settings import known_keys
from dimaskdino.config import dump_config, load_config
from dimaskdino.utils.serialization import read_safetensors

PER_FORK = 25
VALUES = [
    *(b"NaN", b"Infinity", b"-Infinity", b"1e300", b"-3e8", b"0", b"-1", b"1e-320", b"9" * 400, b"4294967296"),
    *(b"null", b"true", b"[]", b"{}", b"[[]]", b'""', b'"\\ud800"', b'"\\u0000"', b'"/dev/zero"', b"'", b"x"),
    *(b"[" * 2000, b"{a: " * 2000, b"<a>" * 2000, b"a" * 5000, b"\xff\xfe", "é".encode("latin-1"), b"*a", b"&a"),
]
PYTHON = [None, True, -1, 2**70, 10**400, float("nan"), "", "\ud800", b"x", [], {}, [[]], {1: 2}, (), 1e300]
TENSORS = [torch.zeros(0), torch.tensor(float("nan")), torch.zeros(2, 3), torch.zeros(1).expand(2**18, 2**18)]
TENSORS += [torch.zeros(3, dtype=torch.int64), torch.zeros(3).to_sparse(), torch.zeros(2, dtype=torch.complex64)]


def changed(content: bytes, rng: random.Random) -> bytes:
    """A content with a few changes of values, of bytes, or of the order of its parts."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 2, 8, 50, 400)))
        kind = rng.randrange(9)
        if kind < 5:  # a value in the place of another
            words = list(re.finditer(rb'-?\d+(\.\d+)?|"[^"]{0,50}"|[\w.]+', content))
            start, end = rng.choice(words).span() if words else (start, end)
            content = content[:start] + rng.choice(VALUES) + content[end:]
        elif kind == 5:
            content = content[:start] + content[end:]
        elif kind == 6:
            content = content[:start] + content[start:end] * rng.choice((2, 100)) + content[end:]
        elif kind == 7:
            content = content[:start] + rng.randbytes(end - start) + content[end:]
        else:
            content = rng.choice((content[:start], content.decode("latin-1").encode("utf-16")))
    return content


def change_tree(tree: Any, rng: random.Random) -> Any:
    """A value of nested dictionaries and lists with another value, or none, somewhere."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.85:
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        copied = tree.copy()
        if rng.random() < 0.15:
            del copied[key]
        elif rng.random() < 0.05 and isinstance(tree, dict):
            copied[rng.choice((1, "x", "é"))] = copied.pop(key)
        else:
            copied[key] = change_tree(tree[key], rng)
        return copied
    return rng.choice(TENSORS if rng.random() < 0.4 else PYTHON)


def change_a_file(folder: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    file.write_bytes(changed(file.read_bytes(), rng))


def export(write: Callable[[Path, range], Path]):
    def make(folder: Path, rng: random.Random, place) -> list[str]:
        source = write(folder / "export", range(1, 4))
        change_a_file(folder / "export", rng)
        return ["data", "import", str(source), str(folder / "made")]

    return make


def checked(folder: Path, rng: random.Random, place) -> list[str]:
    (folder / "data" / "annotations").mkdir(parents=True)
    (folder / "data" / "images").symlink_to(place.data / "images")
    text = (place.data / "annotations" / "val.json").read_bytes()
    (folder / "data" / "annotations" / "val.json").write_bytes(changed(text, rng))
    return ["data", "check", str(folder / "data")]


def settings(folder: Path, rng: random.Random, place) -> list[str]:
    text = dump_config(load_config(FILE, MODEL)).encode()
    (folder / "a.yaml").write_bytes(changed(text, rng))
    return ["config", "show", str(folder / "a.yaml")]


def published(folder: Path, rng: random.Random, place) -> list[str]:
    tree: dict = {"MODEL": {"WEIGHTS": "", "RESNETS": {"DEPTH": 50, "NORM": "FrozenBN"}, "BACKBONE": {"FREEZE_AT": 0}}}
    tree |= {"SEED": 1, "DATASETS": {"TRAIN": ["coco_2017_train"]}}
    for key, value in known_keys().items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    (folder / "a.yaml").write_bytes(changed(yaml.safe_dump(tree).encode(), rng))
    return ["config", "show", str(folder / "a.yaml")]


def model(folder: Path, rng: random.Random, place) -> list[str]:
    file = folder / "m.safetensors"
    if rng.random() < 0.3:
        file.write_bytes(changed(place.model.read_bytes(), rng))
    else:
        tensors, metadata = read_safetensors(place.model)
        key = rng.choice(sorted(metadata))
        if rng.random() < 0.6:
            metadata[key] = changed(metadata[key].encode(), rng).decode(errors="ignore")
        else:
            tensors[rng.choice(sorted(tensors))] = rng.choice(TENSORS[:3] + TENSORS[4:5]).clone()
        save_file(tensors, file, metadata)
    return ["predict", str(file), str(place.photo), "--output", str(folder / "out"), "--device", "cpu"]


def published_model(folder: Path, rng: random.Random, place) -> list[str]:
    state = {
        "sem_seg_head.predictor.class_embed.weight": torch.zeros(2, 3),
        "backbone.res2.0.conv1.weight": torch.ones(2),
    }
    file = folder / rng.choice(("m.pth", "m.pkl"))
    content: Any = {"model": {name: x if file.suffix == ".pth" else x.numpy() for name, x in state.items()}}
    buffer = io.BytesIO()
    (torch.save if file.suffix == ".pth" else pickle_dump)(change_tree(content, rng), buffer)
    file.write_bytes(changed(buffer.getvalue(), rng) if rng.random() < 0.5 else buffer.getvalue())
    return ["convert", str(file), str(folder / "out.safetensors")]


def pickle_dump(value: Any, stream: io.BytesIO) -> None:
    import pickle

    pickle.dump(value, stream, protocol=2)


def resume_point(folder: Path, rng: random.Random, place) -> list[str]:
    shutil.copytree(place.run, folder / "run")
    first, *others = sorted((folder / "run" / "checkpoints").glob("step_*.pt"))
    for path in others:
        path.unlink()
    if rng.random() < 0.3:
        first.write_bytes(changed(first.read_bytes(), rng))
    else:
        torch.save(change_tree(torch.load(first, weights_only=True), rng), first)
    data = [f"data.root={place.data}", "data.shapes=null"]
    return ["train", *MODEL, *RUN, *data, "schedule.steps=5", "--config", str(FILE), "--run", str(folder / "run")]


def run_folder(folder: Path, rng: random.Random, place) -> list[str]:
    (folder / "run").mkdir()
    for name in ("metrics.jsonl", "status.json", "config.yaml"):
        shutil.copy(place.run / name, folder / "run")
    with open(folder / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 6, "validation": {"box_AP": 1.0, "mask_AP": 2.0}, "best_step": 6}) + "\n")
    change_a_file(folder / "run", rng)
    return ["status", str(folder / "run")]


EXPORTS = (coco_beside, yolo, cvat, voc, voc_of_roboflow, labelme, mask_folders)
OTHERS = (checked, settings, published, run_folder, model, published_model, resume_point)
READERS = {write.__name__: export(write) for write in EXPORTS} | {make.__name__: make for make in OTHERS}


def cases(default: range) -> range:
    first, _, last = os.environ.get("FUZZ_CASES", "").partition("-")
    return range(int(first), int(last or first) + 1) if first else default


def fuzz(reader: str, numbers: range, place, children) -> None:
    for start in range(0, len(numbers), PER_FORK):
        chosen = numbers[start : start + PER_FORK]
        commands = []
        for number in chosen:
            folder = place.folder / str(number)
            folder.mkdir()
            commands.append(READERS[reader](folder, random.Random(f"{reader} {number}"), place))
        results = children(place.folder, commands)
        for number, result in zip(chosen, results, strict=False):
            try:
                answer(*result)
            except AssertionError as error:
                pytest.fail(f"{reader}, FUZZ_CASES={number}: {error}")
        assert len(results) == len(chosen)
        for number in chosen:
            shutil.rmtree(place.folder / str(number))


@pytest.mark.parametrize("reader", READERS)
def test_changed_files_are_read_or_refused_in_one_line(reader, place, children):
    slow_ones = ("model", "resume_point")  # they start PyTorch
    fuzz(reader, cases(range(6 if reader in slow_ones else 20)), place, children)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_ten_thousand_changed_files_are_read_or_refused_in_one_line(reader, place, children):
    fuzz(reader, cases(range(10_000)), place, children)
