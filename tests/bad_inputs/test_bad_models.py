"""Model files that cannot be used, given to `dimaskdino predict` and `dimaskdino convert`."""

import math
import os
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from dimaskdino.utils.serialization import read_safetensors

BIAS = "heads.label.bias"


@pytest.fixture
def predict(place, refused):
    return lambda says, model: refused(says, "predict", model, place.photo, "--output", "out", "--device", "cpu")


@pytest.mark.parametrize("content", [b"hello, this is a text\n" * 20, b"", bytes(4096)], ids=["text", "empty", "zeros"])
@pytest.mark.parametrize(
    ("suffix", "says"),
    [
        ("safetensors", "cannot be read"),
        ("pt", "cannot be read as a checkpoint"),
        ("pth", "cannot be read as a checkpoint"),
        ("pkl", "cannot be read as a pickle"),
        ("bin", "cannot be read|not"),
        ("onnx", "cannot be read|not"),
    ],
)
def test_files_that_are_no_models(suffix, says, content, place, predict):
    predict(rf"m\.{suffix} .*{says}", place.write(f"m.{suffix}", content))


def test_a_model_that_was_cut_off(place, predict):
    cut = place.write("m.safetensors", place.model.read_bytes()[:-100])
    predict(r"m\.safetensors cannot be read, it may be truncated", cut)


def test_a_header_of_an_impossible_length(place, predict):
    predict(r"m\.safetensors cannot be read", place.write("m.safetensors", struct.pack("<Q", 2**60) + bytes(100)))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda tensors, metadata: tensors[BIAS].fill_(math.nan), "contains NaN or inf"),
        (lambda tensors, metadata: tensors.update({BIAS: tensors[BIAS].long()}), "has the type torch.int64"),
        (lambda tensors, metadata: tensors.pop(BIAS), "1 parameters missing"),
        (lambda tensors, metadata: tensors.update(extra=torch.zeros(1)), "1 parameters not in the model"),
        (
            lambda tensors, metadata: tensors.update({"heads.label.weight": torch.zeros(5, 3)}),
            "1 parameters of another shape",
        ),
        (lambda tensors, metadata: metadata.pop("config"), "no configuration of this kit"),
        (lambda tensors, metadata: metadata.update(config="{"), "configuration .* is damaged"),
        (lambda tensors, metadata: metadata.update(config="[]"), "a configuration has settings"),
        (lambda tensors, metadata: metadata.update(config='{"x": 1}'), "unknown setting 'x'"),
        (lambda tensors, metadata: metadata.update(classes="cup"), "damaged metadata"),
        (lambda tensors, metadata: metadata.update(classes="5"), "damaged metadata"),
        (lambda tensors, metadata: metadata.update(classes='["cup"]'), "classes"),
        (lambda tensors, metadata: metadata.pop("step"), "damaged metadata"),
        (lambda tensors, metadata: metadata.update(step="ten"), "damaged metadata"),
    ],
)
def test_models_with_other_tensors_or_metadata(edit, says, place, predict):
    tensors, metadata = read_safetensors(place.model)
    edit(tensors, metadata)
    save_file(tensors, "m.safetensors", metadata)
    predict(rf"(?=.*m\.safetensors).*{says}", "m.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("optimizer"), "optimizer is missing"),
        (lambda state: state.update(step="6"), "step is missing or damaged"),
        (lambda state: state.update(model=[1]), "model is missing or damaged"),
        (lambda state: state.update(model={"a": 1}), "model is missing or damaged"),
        (lambda state: state["model"].update({BIAS: torch.full((5,), math.nan)}), "contains NaN or inf"),
    ],
)
def test_resume_points(change, says, place, predict):
    state = torch.load(max((place.run / "checkpoints").glob("step_*.pt")), weights_only=True)
    change(state)
    torch.save(state, "m.pt")
    predict(rf"m\.pt.*{says}", "m.pt")


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2]], ids=["a tensor", "a list"])
def test_checkpoints_of_something_else(content, predict):
    torch.save(content, "m.pt")
    predict(r"m\.pt.*is not a checkpoint of this kit", "m.pt")


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


class Pointers:
    """An array of pointers to nowhere."""

    def __reduce__(self):
        return np.ndarray, ((2,), np.dtype("O"), bytes(16))


def pickled(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (pickled(Evil()), "refers to .*system, which arrays do not need"),
        (pickled({"a": Pointers()}), "calls numpy.ndarray|not numbers|expected numbers"),
        (pickled({"a": "b"}), "holds no state dict"),
        (pickled({"a": np.zeros(9)})[:30], "cannot be read as a pickle"),
        (pickled({"layer.weight": np.zeros((3, 3), np.float32)}), "m.pkl"),
        (pickled({}), "m.pkl"),
    ],
    ids=["a command", "pointers", "text", "cut off", "another network", "nothing"],
)
def test_pickles(content, says, place, refused):
    refused(says, "convert", place.write("m.pkl", content), "o.safetensors")


def test_a_checkpoint_that_runs_a_command(refused):
    torch.save({"model": Evil()}, "m.pth")
    refused("more than tensors and plain values, whose code is not run", "convert", "m.pth", "o.safetensors")


@pytest.mark.parametrize(("name", "says"), [("gone.pth", "gone.pth does not exist"), (".", "cannot be read")])
def test_checkpoints_that_are_no_files(name, says, place, refused):
    refused(says, "convert", place.folder / name, "o.safetensors")


def test_a_folder_instead_of_the_output(place, refused):
    with torch.device("meta"):
        weights = torchvision.models.resnet18().state_dict()
    torch.save({name: torch.zeros(weight.shape) for name, weight in weights.items()}, "r18.pth")
    refused("a folder is where a file is needed", "convert", "r18.pth", place.folder)
