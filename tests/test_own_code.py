"""A user's own code: only what is allowed runs, and what it does wrong is said with the setting that names it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from small import FILE, overrides, settings
from torch import nn

from dimaskdino import UserError, load
from dimaskdino.checkpoints.catalogue import find_model
from dimaskdino.config import load_config, parse_config
from dimaskdino.data.dataloader import training_dataset
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.modeling import Detector, Stage, Targets
from dimaskdino.runs.folder import RunFolder, changed_settings
from dimaskdino.runs.notebooks import run_notebook
from dimaskdino.runs.processes import launch_command
from dimaskdino.studies.comparison import Quantity
from dimaskdino.studies.runner import plan_study
from dimaskdino.studies.runs import EvaluatedRun
from dimaskdino.studies.study import find_study, load_study
from dimaskdino.training.matcher import match
from dimaskdino.training.optimizer import build_optimizer
from dimaskdino.utils import plugins
from dimaskdino.utils.resources import find_data, find_notebook, shipped_models

ROOT = Path(__file__).parent.parent
OWN = """
import torch
from torch import nn
from dataclasses import replace
from dimaskdino.modeling.bato import BATO

class Shared(BATO):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.again = self.attention

def nothing(cfg): pass
def number(*arguments): return 3.0
def vector(stage, *arguments): return stage.boxes.sum((0, 1))
def bright(sample): return replace(sample, image=sample.image / 255)
def smaller(sample): return replace(sample, masks=sample.masks[:, ::2])
def text(result): return "high"
def undefined(result): return float("nan")
"""
TINY = ("model.hidden_dim=32", "model.backbone.width=8", "model.pixel_decoder.layers=1")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a module `own_code`, in which commands run; nothing is allowed yet."""
    (tmp_path / "own_code.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIMASKDINO_PLUGINS", "{}")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("own_code", None)


@pytest.fixture
def allowed(folder) -> Path:
    plugins.allow(["own_code"])
    return folder


def dimaskdino(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-m", "dimaskdino", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)


# what runs


def test_the_kits_names_come_before_files_of_the_folder(folder):
    for name in ("demo", "train", "table_4"):
        (folder / name).write_text("not a notebook")
    for name in ("studies/shapes", "maskdino-shapes"):
        (folder / name).mkdir(parents=True)
    assert find_notebook("demo").parent.name == "runs"
    assert find_study("table_4").parent.name == "ablations"
    assert find_data("studies/shapes").is_absolute()
    assert find_model("maskdino-shapes") == shipped_models()["maskdino-shapes"]
    assert find_model("./maskdino-shapes") == Path("./maskdino-shapes")
    with pytest.raises(UserError, match="holds no trained model"):
        load("./maskdino-shapes")


def test_only_objects_of_allowed_modules_can_be_named(allowed):
    with pytest.raises(UserError, match=r"torch\.save is not defined in own_code"):
        plugins.resolve("own_code:torch.save", "model.bato.type")
    assert plugins.resolve("own_code:Shared", "model.bato.type").__name__ == "Shared"


@pytest.mark.parametrize("variable", ["[1]", "{", '{"own_code": 3}', ""])
def test_a_damaged_environment_variable_allows_nothing(folder, monkeypatch, variable):
    monkeypatch.setenv("DIMASKDINO_PLUGINS", variable)
    with pytest.raises(UserError, match="may not run yet"):
        plugins.resolve("own_code:Shared", "model.bato.type")


def test_one_name_may_be_given_as_text(folder):
    plugins.allow("own_code")
    assert plugins.hashes().keys() == {"own_code"}


def test_built_in_modules_have_no_hash_of_a_file(folder):
    plugins.allow(["builtins", "sys"])
    plugins.hashes()


def test_processes_import_nothing_from_the_current_folder(folder):
    (folder / "yaml.py").write_text("raise SystemExit('yaml.py of the folder')")
    command, environment = launch_command(["config", "list"], 2)
    assert command[1] == "-m"
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert "yaml.py of the folder" not in done.stderr
    assert done.returncode == 0


def notebook(path: Path, source: str) -> Path:
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    parameters = nbformat.v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]})
    cells = [parameters, nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def test_the_kits_notebooks_import_nothing_from_the_folder_a_users_notebook_does(folder, monkeypatch):
    run_notebook(notebook(folder / "mine.ipynb", "import own_code"), folder / "a", {})
    monkeypatch.setattr("dimaskdino.runs.notebooks.is_kit_notebook", lambda path: True)
    with pytest.raises(UserError, match="No module named 'own_code'"):
        run_notebook(folder / "mine.ipynb", folder / "b", {})


def test_a_users_notebook_imports_installed_modules_before_those_of_the_folder(folder):
    for name in ("safetensors", "ipykernel_launcher"):  # the second is what starts the kernel
        (folder / f"{name}.py").write_text("raise ImportError('of the folder')")
    source = "import os, own_code, safetensors, sys; assert sys.path[-1] == '' and not os.environ['PYTHONSAFEPATH']"
    run_notebook(notebook(folder / "mine.ipynb", source), folder / "a", {})


@pytest.mark.parametrize("module", ["papermill", "ipykernel"])
def test_a_missing_package_of_notebooks_names_the_extra(folder, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"need {module}: pip install 'dimaskdino\[notebooks\]'"):
        run_notebook(notebook(folder / "mine.ipynb", ""), folder / "a", {})


# what a module does at its import


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1 / 0", r"ZeroDivisionError: division by zero \(.*broken_code\.py, line 1\)"),
        ("import sys\nsys.exit(0)", r"SystemExit: 0 \(.*broken_code\.py, line 2\)"),
        ("def f(:", r"SyntaxError: .*broken_code\.py, line 1"),
    ],
)
def test_a_module_that_cannot_be_imported(folder, text, message):
    (folder / "broken_code.py").write_text(text)
    plugins.allow(["broken_code"])
    with pytest.raises(UserError, match=f"model.bato.type = broken_code:X: the module cannot be imported: {message}"):
        plugins.resolve("broken_code:X", "model.bato.type")


def test_the_option_is_repeated_and_takes_one_value(folder, shapes_data):
    (folder / "second.py").write_text("def area(stage, matches, targets): return stage.boxes.sum() * 0")
    own = ("model.bato.type=own_code:Shared", "loss.terms.area.type=second:area", "schedule.steps=1")
    flags = ("--plugin", "own_code", "--plugin", "second")
    done = dimaskdino("train", *overrides(shapes_data, *own), "--config", FILE, "--run", "run", *flags)
    assert done.returncode == 0, done.stderr  # the shared weights were written, too
    done = dimaskdino("evaluate", *flags, "run")
    assert done.returncode == 0, done.stderr


# what objects return


@pytest.mark.parametrize("key", ["bato", "selection", "backbone"])
def test_a_factory_that_returns_no_module_is_refused(allowed, key):
    cfg = parse_config({}, [*TINY, f"model.{key}.type=own_code:nothing"], "test").model
    with pytest.raises(UserError, match=rf"model\.{key}: own_code:nothing returned NoneType"):
        Detector(cfg)


def test_a_backbone_names_its_channels(allowed):
    backbone = nn.Conv2d(3, 8, 1)
    backbone.channels = {4: 8, 8: 8, 16: 8}
    with pytest.raises(UserError, match=r"each of the strides \(4, 8, 16, 32\), got \{4: 8"):
        Detector(parse_config({}, TINY, "test").model, backbone=backbone)


def test_an_empty_container_is_used(allowed):
    cfg = parse_config({}, TINY, "test").model
    empty = nn.ModuleList()
    assert Detector(cfg, bato=empty).bato is empty


def test_terms_costs_and_transforms_must_have_the_right_shape(allowed, shapes_data):
    stage = Stage("decoder.1", torch.zeros(1, 3, 2), torch.rand(1, 3, 4))
    masks = torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    targets = Targets(torch.zeros(1, 2, dtype=torch.long), torch.rand(1, 2, 4), masks, (2,))
    for value in ("number", "vector"):
        cfg = parse_config({}, [f"loss.costs.own.type=own_code:{value}"], "test").loss
        with pytest.raises(UserError, match=r"loss\.costs\.own returned .*, expected a tensor of shape \(1, 3, 2\)"):
            match([stage], targets, cfg)
    for value, message in (("bright", "dtype uint8"), ("smaller", r"the masks of own_code:smaller returned the shape")):
        data = settings(shapes_data, f"data.transforms=[{{type: own_code:{value}}}]")
        with pytest.raises(UserError, match=f"data.transforms: .*{message}"):
            training_dataset(data)[0]


def test_a_loss_term_returns_one_number(allowed):
    from dimaskdino.training.criterion import stage_losses

    stage = Stage("decoder.1", torch.zeros(1, 3, 2), torch.rand(1, 3, 4))
    masks = torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    targets = Targets(torch.zeros(1, 2, dtype=torch.long), torch.rand(1, 2, 4), masks, (2,))
    cfg = parse_config({}, ["loss.terms.own.type=own_code:vector"], "test").loss
    (matches,) = match([stage], targets, cfg)
    with pytest.raises(UserError, match=r"loss\.terms\.own returned the shape \(4,\), expected a tensor of shape \(\)"):
        stage_losses([(stage, matches)], targets, cfg)


@pytest.mark.parametrize(("name", "shown"), [("text", "'high'"), ("undefined", "nan")])
def test_a_quantity_returns_a_finite_number(allowed, name, shown):
    layers = ROOT / "notebooks" / "models" / "dimaskdino" / "evaluation" / "layers.json"
    with pytest.raises(UserError, match=rf"report: own_code:{name} returned {shown}, expected a finite number"):
        Quantity.parse(f"own_code:{name}").in_run(EvaluatedRun(LayerwiseAP.load(layers), None))


def test_a_quantity_that_does_not_exist_stops_a_study_before_its_runs(allowed):
    study = load_study(find_study("table_4")).model_copy(update={"report": ("own_code:unknown",)})
    with pytest.raises(UserError, match=r"report = own_code:unknown: .* has no attribute 'unknown'"):
        plan_study(study, "shapes", [], Path("runs"))


# settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss.terms.giou.type=own_code:number", "'giou' is a built-in term"),
        ("loss.costs.label.type=own_code:number", "'label' is a built-in term"),
        ("loss.terms={a/b: {type: 'own_code:number'}}", r"loss\.terms\.a/b: expected a name of letters"),
        ("loss.terms={'': {type: 'own_code:number'}}", "expected a name of letters"),
        ("model.bato.type=own_code:B:c", "model.bato.type: expected MODULE:NAME.*'own_code:B:c'"),
        ("model.bato.options.start=1", "model.bato: options are for a module of your own"),
        ("optimizer.lr_factors={bato: -1}", r"optimizer\.lr_factors\.bato"),
    ],
)
def test_settings_that_cannot_be_meant(change, message):
    with pytest.raises(UserError, match=message):
        parse_config({}, [change], "test")


def test_the_factor_of_an_inner_module_wins_in_any_order():
    model = Detector(parse_config({}, TINY, "test").model)
    for text in ("{decoder: 2, decoder.layers: 3}", "{decoder.layers: 3, decoder: 2}"):
        cfg = parse_config({}, [f"optimizer.lr_factors={text}", "optimizer.lr=1"], "test").optimizer
        groups = build_optimizer(model, cfg).param_groups
        lr = {name: group["lr"] for group in groups for name in group["param_names"]}
        assert {value for name, value in lr.items() if name.startswith("decoder.layers.")} == {3}
        assert {value for name, value in lr.items() if name.startswith("decoder.position_head.")} == {2}
    with pytest.raises(UserError, match="the model has no module ''"):
        build_optimizer(model, parse_config({}, ["optimizer.lr_factors={'': 2}"], "test").optimizer)


# resuming


def test_a_removed_setting_is_a_change(allowed, shapes_data):
    before = settings(shapes_data, "loss.terms.own.type=own_code:number", "optimizer.lr_factors={bato: 5}")
    after = settings(shapes_data)
    plain = before.model_dump(mode="json"), after.model_dump(mode="json")
    assert changed_settings(*plain) == {"loss.terms.own": None, "optimizer.lr_factors.bato": None}
    run = RunFolder(allowed / "run")
    run.write_config(before)
    with pytest.raises(UserError, match=r"other settings \(loss\.terms\.own, optimizer\.lr_factors\.bato\)"):
        run.check_config(after)


def test_the_hashes_of_the_first_start_are_kept(allowed, shapes_data, capsys):
    run = RunFolder(allowed / "run")
    run.write_config(settings(shapes_data))
    first = plugins.hashes()
    (allowed / "own_code.py").write_text(OWN + "# changed\n")
    for _ in range(2):
        run.write_config(settings(shapes_data))
        assert "own_code has changed since this run started" in capsys.readouterr().out
    assert json.loads((run.path / "versions.json").read_text())["plugins"] == first


def test_a_model_names_its_own_backbone(tmp_path):
    from dimaskdino.model import Model

    config = load_config(FILE, [*TINY, "model.backbone.type=own_code:Net"])
    described = repr(Model(Detector(load_config(FILE, TINY).model), config, list("abcde"), 0))
    assert "own_code:Net" in described
    assert "resnet" not in described
