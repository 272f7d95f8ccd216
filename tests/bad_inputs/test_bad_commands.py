"""Command lines that cannot be carried out. The current folder has a few files that some of them name."""

import shlex
import shutil
from pathlib import Path

import pytest
from small import FILE, overrides

WHERE_A_FOLDER = "a file is where a folder is needed"
PREDICT = [
    ("predict gone.safetensors {photo}", "gone.safetensors"),
    ("predict {data} {photo} --output o", "holds no trained model"),
    ("predict {model} {photo} --stage decoder.9 --output o", "the model has no stage 'decoder.9'; it has"),
    ("predict {model} {photo} --threshold 30 --output o", "threshold"),
    ("predict {model} {photo} --batch-size 0 --output o", "batch_size"),
    ("predict {model} {photo} --device gpu --output o", "device"),
    ("predict {model} {photo} --device cuda:77 --output o", "cuda:77"),
    ("predict {model} {photo} --precision fp4 --output o", "precision"),
    ("predict {model} p/a.png --output p", "is an input and would be overwritten"),
    ("predict {model} {photo} --output {model}", WHERE_A_FOLDER),
    ("predict {model} {photo} --output {model}/o", WHERE_A_FOLDER),
    ("predict {model} {photo} --output {long}", "the name is too long"),
    ("predict {run} data.resize.shortest=64", "name the images"),
    ("predict {run} {data} data.size=64", "unknown setting 'data.size'"),
]
EVALUATE = [
    ("evaluate", "name the model"),
    ("evaluate gone.pt", "gone"),
    ("evaluate {model} --split test --output o", "no annotations of the split 'test'"),
    ("evaluate {model} --stages last --output o", "has no stage 'last'"),
    ("evaluate {model} data.root=gone --output o", "dataset folder gone does not exist"),
    ("evaluate {model} data.rot=x --output o", "did you mean"),
    ("evaluate {model} model.classes=9 --output o", "classes"),
    ("evaluate {model} --processes 0", "--processes must be at least 1"),
    ("evaluate {model} --bootstrap -5 --output o", "bootstrap"),
    ("evaluate {model} --output {model}", WHERE_A_FOLDER),
]
TRAIN = [
    ("train --run r", "name the configuration: --config CONFIG"),
    ("train --config {config}", "name the run folder"),
    ("train --config {config} --run ''", "name the run folder"),
    ("train --config {config} --run {model}", WHERE_A_FOLDER),
    ("train --config shapes/none --run r", "did you mean|does not exist"),
    ("train --config {config} --run r --processes -3", "--processes must be at least 1, got -3"),
    ("train --config {config} --run r {gone}", "dataset folder gone does not exist"),
    ("train --config {config} --run r {small} model.classes=9", "the model has 9 classes, but .* has 5 categories"),
    ("train --config {config} --run r {small} train.weights=gone.pt", "gone.pt does not exist"),
    ("train --config {config} --run r {small} train.weights={model} model.hidden_dim=64", "another architecture"),
    ("train --config {config} --run r {small} train.accumulate=5", "less than one image per part"),
    ("train --config {config} --run {run} {small} train.seed=5", "holds a run with other settings"),
    ("train --config {config} --run {run} {small} schedule.steps=3", "holds a run with other settings"),
    ("new gone r", "the dataset folder gone does not exist"),
    ("new {data} {run}", "exists already"),
    ("new {data} r --minutes 0", "--minutes must be positive"),
    ("new {data} r --weights gone.safetensors", "gone.safetensors does not exist"),
    ("status gone", "holds no run"),
    ("status {model}", "holds no run"),
    ("share gone o", "not a finished run"),
    ("share {run} .", "exists already"),
    ("share {run} {model}/o", WHERE_A_FOLDER),
]
NOTEBOOKS = [
    ("run gone o", "no notebook .gone.: give a path that ends in .ipynb, or one of"),
    ("run gone.ipynb o", "gone.ipynb"),
    ("run bad.ipynb o", "notebook"),
    ("run train o confg=x", "no parameter 'confg'; it has config"),
    ("run train o config", "not of the form name=value"),
    ("run train o processes=two", "'processes' must be of type int, got 'two'"),
    ("run train o overrides=a", "'overrides' must be of type list"),
    ("run train o overrides=[a", "the value of overrides is not valid YAML"),
    ("run train o config=!!python/name:os.system", "not valid YAML"),
    ("run train {model} config={config}", WHERE_A_FOLDER),
]
STUDIES = [
    ("study table_33", "no study 'table_33': give a YAML file, or one of "),
    ("study table_3 . --scale huge --plan", "no scale 'huge'"),
    ("study table_3 . --parallel 0 --plan", "parallel must be at least 1"),
    ("study table_3 . --seeds -4 --plan", "train.seed: input should be greater than or equal to 0"),
    ("study table_3 . train.batchsize=3 --plan", "did you mean"),
    ("study study.yaml o --plan", "is not a study"),
]
DATA = [
    ("data check gone", "does not exist; set data.root"),
    ("data check {data} test", "has no annotations of the split 'test'"),
    ("data import gone d", "does not exist"),
    ("data import {data} {data}", "exists already"),
    ("data import {data} d --val 2", "must be between 0 and 1, got 2"),
    ("data import . d", "no export of a known layout"),
    ("data import {data} o --register mine", "--register is for datasets of detectron2"),
    ("data import detectron2:mine o --register no_such_module", "--register: no_such_module cannot be imported"),
    ("data shapes {data}", "exists already"),
    ("data shapes {model}/o --train 2 --val 2", WHERE_A_FOLDER),
    ("data shapes o --train 0", "greater than 0"),
    ("data shapes o --size 0", "size"),
    ("data shapes o --seed -1", "seed: input should be greater than or equal to 0"),
    ("data bdd100k gone", "does not exist; BDD100K"),
]


@pytest.mark.parametrize(("command", "says"), PREDICT + EVALUATE + TRAIN + NOTEBOOKS + STUDIES + DATA)
def test_command_lines(command, says, place, refused):
    place.write("p/a.png", b"")
    shutil.copyfile(place.photo, "p/a.png")
    place.write("bad.ipynb", "{}")
    place.write("study.yaml", "title: 5")
    names = {name: getattr(place, name) for name in ("run", "model", "photo", "data")}
    small, gone = (shlex.join(overrides(folder)) for folder in (place.data, Path("gone")))
    refused(says, *shlex.split(command.format(config=FILE, long="b" * 300, small=small, gone=gone, **names)))


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a/b", "", "..", ".hidden", "a b", "a\\b"])
def test_names_of_variants(name, place, refused):
    study = place.write(
        "s.yaml",
        f"title: t\nreport: [last.box]\nseeds: [0]\nscales: {{shapes: {FILE}}}\nrows: [{{name: '{name}', label: l}}]\n",
    )
    refused("name: string should match pattern", "study", study, "o", "--plan")
