"""Command lines, paths, parameters of notebooks and studies."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
import torchvision
from small import FILE, overrides

from bad_inputs.table import Place, bad


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
line(
    "data import: a module for another kind of source",
    "--register is for datasets of detectron2",
    "data import {data} {folder}/o --register mine",
)
line(
    "data import: a module that is not there",
    "--register: no_such_module cannot be imported",
    "data import detectron2:mine {folder}/o --register no_such_module",
)
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
line("share: no such run", "not a finished run", "share {folder}/gone {folder}/o")
line("share: onto an existing folder", "exists already", "share {run} {folder}")
line("share: below a file", "a file is where a folder is needed", "share {run} {model}/o")


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
line("data import: no such source", "does not exist", "data import gone {folder}/d")
line("data import: onto an existing folder", "exists already", "data import {data} {data}")
line("data import: an impossible fraction", "must be between 0 and 1, got 2", "data import {data} {folder}/d --val 2")
line("data import: nothing to import", "no export of a known layout", "data import {folder} {folder}/d")
line("new: no such dataset", "the dataset folder gone does not exist", "new gone {folder}/r")
line("new: onto an existing folder", "exists already", "new {data} {run}")
line("new: no time", "--minutes must be positive", "new {data} {folder}/r --minutes 0")
line("new: no such model", "gone.safetensors does not exist", "new {data} {folder}/r --weights gone.safetensors")
line("train: no configuration", "name the configuration: --config CONFIG", "train --run {folder}/r")
line("predict: settings and no image", "name the images", "predict {run} data.resize.shortest=64")
line("predict: an unknown setting", "unknown setting 'data.size'", "predict {run} {data} data.size=64")
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
