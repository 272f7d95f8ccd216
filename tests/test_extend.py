"""docs/extend.md: every example runs, from the command line as printed and in a training with all of them."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import overrides, settings

from dimaskdino import UserError, load
from dimaskdino.config import parse_config
from dimaskdino.data.dataloader import training_dataset
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.modeling import Detector, Stage, Targets
from dimaskdino.modeling.bato import BATO
from dimaskdino.modeling.de_imbalance import DeImbalance
from dimaskdino.runs.folder import RunFolder
from dimaskdino.studies.comparison import Quantity
from dimaskdino.studies.runs import EvaluatedRun
from dimaskdino.training.matcher import matching_costs
from dimaskdino.training.trainer import train
from dimaskdino.utils import plugins

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extend.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# my_project/(\w+)\.py\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = re.findall(r"^dimaskdino .*", PAGE, re.MULTILINE)
ALL = (
    "model.bato.type=my_project.gates:GatedBATO",
    "model.bato.options.start=2",
    "model.selection.type=my_project.selections:mask_quality",
    "model.backbone.type=my_project.backbones:PlainNet",
    "model.backbone.options.width=8",
    "loss.terms.area.type=my_project.losses:area",
    "loss.terms.area.weight=0.5",
    "loss.costs.centre.type=my_project.costs:centre",
    "data.transforms=[{type: my_project.augmentations:darken}]",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with the page's files."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_project").mkdir()
    for name, text in EXAMPLES.items():
        (folder / "my_project" / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def allowed(project, monkeypatch) -> None:
    """Allow the examples to run in this process."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("DIMASKDINO_PLUGINS", "{}")
    monkeypatch.setattr(sys, "path", [*sys.path])
    plugins.allow(["my_project"])


def dimaskdino(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", "-m", "dimaskdino", *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


def test_each_example_is_short():
    assert len(EXAMPLES) == 7
    assert max(len(text.strip().splitlines()) for text in EXAMPLES.values()) <= 25


def test_the_printed_commands_run(project, shapes_data):
    train, evaluate = (shlex.split(command)[1:] for command in COMMANDS)
    small = overrides(shapes_data, "schedule.steps=1")
    done = dimaskdino(project, *train, *small)
    assert done.returncode == 0, done.stderr
    recorded = json.loads((project / "runs" / "gated" / "versions.json").read_text())["plugins"]
    assert set(recorded) == {"my_project.gates"}
    done = dimaskdino(project, *evaluate)
    assert done.returncode == 0, done.stderr
    done = dimaskdino(project, "evaluate", "runs/gated")
    assert done.returncode == 1
    assert "add --plugin my_project.gates" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_training_with_all_of_them(project, allowed, shapes_data, tmp_path):
    config = settings(shapes_data, "schedule.steps=2", *ALL)
    run = RunFolder(tmp_path / "run")
    with run.running():
        run.write_config(config)
        train(config, run)
    assert {"decoder.2/area", "denoising.decoder.0/area"} <= run.read_metrics()[-1]["losses"].keys()
    model = load(run.path, plugins=["my_project"])
    assert type(model.detector.bato).__name__ == "GatedBATO"
    assert model.detector.bato.gate.item() != 2.0  # it was trained
    assert type(model.detector.backbone).__name__ == "PlainNet"
    assert model.predict(torch.zeros(3, 64, 64, dtype=torch.uint8), threshold=0).masks.shape[1:] == (64, 64)


def test_an_augmentation_changes_the_image(allowed, shapes_data):
    images = []
    for changes in ((), (ALL[-1],)):
        torch.manual_seed(0)
        images.append(training_dataset(settings(shapes_data, *changes))[0].image.float().mean())
    assert images[1] < images[0]


def test_a_cost_is_added_with_its_weight(allowed):
    stage = Stage("decoder.1", torch.zeros(1, 3, 2), torch.rand(1, 3, 4))
    boxes, masks = torch.rand(1, 2, 4), torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    targets = Targets(torch.zeros(1, 2, dtype=torch.long), boxes, masks, (2,))
    costs = []
    for changes in ([], ["loss.costs.centre.type=my_project.costs:centre", "loss.costs.centre.weight=3"]):
        (cost,) = matching_costs([stage], targets, parse_config({}, changes, "test").loss)
        costs.append(cost)
    distance = (stage.boxes[0, :, None, :2] - boxes[0, None, :, :2]).norm(dim=-1)
    torch.testing.assert_close(costs[1] - costs[0], 3 * distance[None])


def test_a_study_compares_a_quantity_of_the_users(allowed):
    layers = ROOT / "notebooks" / "models" / "dimaskdino" / "evaluation" / "layers.json"
    run = EvaluatedRun(LayerwiseAP.load(layers), None)
    quantity = Quantity.parse("my_project.quantities:small_objects")
    assert quantity.in_run(run) == run.result.last.box.APs
    assert quantity.label == "small objects"
    assert str(quantity) == "my_project.quantities:small_objects"


def test_modules_are_arguments():
    cfg = parse_config({}, ["model.hidden_dim=32", "model.selection.k=[20, 12]"], "test").model
    de_imbalance, bato = DeImbalance(cfg), BATO(cfg)
    model = Detector(cfg, de_imbalance=de_imbalance, bato=bato)
    assert model.de_imbalance is de_imbalance
    assert model.bato is bato


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.bato.type=os:system"], r"model\.bato\.type = os:system needs the module os, .*--plugin os"),
        (["model.bato.type=my_project.nothing:X"], "No module named 'my_project.nothing'"),
        (["model.bato.type=my_project.gates:Nothing"], "has no attribute 'Nothing'"),
        (
            ["model.bato.type=my_project.gates:GatedBATO", "model.bato.options.star=1"],
            "cannot be made with the options",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(allowed, changes, message):
    config = parse_config({}, ["model.hidden_dim=32", *changes], "test")
    with pytest.raises(UserError, match=message):
        Detector(config.model)


def test_a_changed_file_changes_the_hash_of_its_package(allowed, project):
    before = plugins.hashes()
    (project / "my_project" / "another.py").write_text("x = 1\n")
    after = plugins.hashes()
    assert before.keys() == after.keys() == {"my_project"}
    assert before != after


def test_a_type_names_a_module_and_an_object():
    with pytest.raises(UserError, match=r"model\.bato\.type"):
        parse_config({}, ["model.bato.type=GatedBATO"], "test")
    with pytest.raises(UserError, match="is not the name of a Python module"):
        plugins.allow(["my-project"])
