"""Model files, given to `dimaskdino predict` and `dimaskdino convert`."""

import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bad_inputs.table import Place, bad


def with_model(place: Place, file: Path | str) -> list[Any]:
    return ["predict", file, place.photo, "--output", place.folder / "out", "--device", "cpu"]


def model_file(title: str, says: str, name: str, content: Callable[[Place], bytes]) -> None:
    bad(f"model: {title}", says, lambda place: with_model(place, place.write(name, content(place))))


def edited(title: str, says: str, edit: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """The finished run's model file with other tensors or metadata."""

    def make(place: Place) -> list[Any]:
        from dimaskdino.utils.serialization import read_safetensors

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
