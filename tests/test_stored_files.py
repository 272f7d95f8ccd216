"""Files of version 0.2 (tests/fixtures/version_0_2): they resume, load, share and evaluate as they did."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small import settings, shapes_folder

from dimaskdino.checkpoints import load_checkpoint
from dimaskdino.checkpoints.model_files import current_name, read_resume_point
from dimaskdino.config import Config, Optimizer, load_config
from dimaskdino.evaluation.layerwise_ap import evaluate_layers
from dimaskdino.modeling import Detector
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training.optimizer import build_optimizer, load_moments, moments_by_name
from dimaskdino.training.trainer import train
from dimaskdino.utils.errors import UserError

FOLDER = Path(__file__).parent / "fixtures" / "version_0_2"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def sum_and_norm(tensor: torch.Tensor) -> list[float]:
    return [float(tensor.double().sum()), float(tensor.double().norm())]


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, list[float]]) -> None:
    """Compare by name; the expected names are those of version 0.2.

    The order of sums may differ, which AdamW's first steps turn into changes of single weights: sums of weights are
    compared at the scale of the tensor.
    """
    renamed = {current_name(name): numbers for name, numbers in expected.items()}
    assert found.keys() == renamed.keys()
    for name, numbers in renamed.items():
        total, norm = sum_and_norm(found[name])
        assert total == pytest.approx(numbers[0], rel=1e-4, abs=1e-3 * numbers[1] + 1e-5), name
        assert norm == pytest.approx(numbers[1], rel=1e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> RunFolder:
    """The stored run, resumed from step 4 to step 6."""
    place = tmp_path_factory.mktemp("version_0_2")
    data = shapes_folder(place / "data")
    shutil.copytree(FOLDER / "run", place / "run")
    run = RunFolder(place / "run")
    config = load_config(run.path, [f"data.root={data}", "schedule.steps=6"])
    with run.running():
        run.write_config(config)
        train(config, run)
    return run


def test_a_run_resumes_with_the_weights_of_an_undisturbed_training(resumed):
    state = read_resume_point(resumed.checkpoints / "step_0000006.pt")
    assert_same_tensors(state["model"], EXPECTED["resumed"])
    average = {name.removeprefix("module."): value for name, value in state["average"].items()}
    expected = {name.removeprefix("module."): numbers for name, numbers in EXPECTED["average"].items()}
    assert_same_tensors(average, expected)
    for record in resumed.read_metrics():
        if "losses" in record and record["step"] > 4:
            assert record["losses"] == pytest.approx(EXPECTED["losses"][str(record["step"])], rel=1e-4)


def test_every_parameter_gets_its_own_moments():
    state = read_resume_point(FOLDER / "run" / "checkpoints" / "step_0000004.pt")
    config = Config.model_validate_json(state["config"])
    model = Detector(config.model)
    optimizer = build_optimizer(model, config.optimizer)
    load_moments(optimizer, state["optimizer"], state["model"])
    loaded = moments_by_name(optimizer)
    expected = {current_name(name): norms for name, norms in EXPECTED["moments_before"].items()}
    assert loaded.keys() == expected.keys()
    for name, (first, second) in expected.items():
        assert float(loaded[name]["exp_avg"].double().norm()) == pytest.approx(first, rel=1e-6), name
        assert float(loaded[name]["exp_avg_sq"].double().norm()) == pytest.approx(second, rel=1e-6), name


def test_moments_follow_their_names_when_the_order_of_parameters_changes():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    first = build_optimizer(torch.nn.ModuleDict({"a": a, "b": b}), Optimizer())
    (a(torch.ones(2)).sum() + 3 * b(torch.ones(2)).sum()).backward()
    first.step()
    stored = moments_by_name(first)
    second = build_optimizer(torch.nn.ModuleDict({"b": torch.nn.Linear(2, 2), "a": torch.nn.Linear(2, 2)}), Optimizer())
    load_moments(second, stored, [])
    found = moments_by_name(second)
    assert found.keys() == stored.keys() == {"a.weight", "a.bias", "b.weight", "b.bias"}
    for name, values in stored.items():
        assert torch.equal(found[name]["exp_avg"], values["exp_avg"])
    with pytest.raises(UserError, match=r"states of other parameters, the first c\.weight"):
        load_moments(second, {"c.weight": stored["a.weight"]}, [])


@pytest.mark.parametrize("name", ["run", "shared"])
def test_a_stored_folder_evaluates(name, shapes_data):
    found = evaluate_layers(load_checkpoint(FOLDER / name, overrides=[f"data.root={shapes_data}"]))
    expected = EXPECTED["layers"][name]
    assert list(found.stages) == list(expected)
    for stage, (box, mask) in expected.items():
        assert pytest.approx(box, abs=1e-6) == found.stages[stage].box.AP
        assert (found.stages[stage].mask and found.stages[stage].mask.AP) == pytest.approx(mask, abs=1e-6)


@pytest.mark.parametrize("case", EXPECTED["initial"])
def test_a_seed_has_the_same_initial_weights(case):
    recorded = EXPECTED["initial"][case]
    config = load_config(case.split(" seed ")[0], recorded["changes"])
    torch.manual_seed(recorded["seed"])
    assert_same_tensors(Detector(config.model).state_dict(), recorded["weights"])


def test_stored_names_of_modules_are_understood():
    names = ["backbone", "first_selection", "token_optimization"]
    config = load_config("shapes/dimaskdino_r18", [f"train.weights_of=[{', '.join(names)}]"])
    assert config.train.weights_of == ("backbone", "de_imbalance.first_selection", "bato")
    both = load_config("shapes/dimaskdino_r18", ["train.weights_of=[first_selection, de_imbalance]"])
    assert both.train.weights_of == ("de_imbalance",)


@pytest.mark.parametrize("changes", [(), ("train.checkpoint_activations=true",)])
def test_a_resumed_training_has_the_moments_of_every_parameter(shapes_data, tmp_path, changes):
    run = RunFolder(tmp_path)
    for steps in (2, 4):
        config = settings(shapes_data, f"schedule.steps={steps}", *changes)
        run.write_config(config)
        with run.running():
            train(config, run)
    whole = RunFolder(tmp_path / "whole")
    with whole.running():
        train(config, whole)
    found = read_resume_point(run.checkpoints / "step_0000004.pt")
    expected = read_resume_point(whole.checkpoints / "step_0000004.pt")
    assert found["optimizer"].keys() == expected["optimizer"].keys()
    for name, moments in expected["optimizer"].items():
        assert torch.equal(found["optimizer"][name]["exp_avg_sq"], moments["exp_avg_sq"]), name
    assert set(found["optimizer"]) <= set(found["model"])
