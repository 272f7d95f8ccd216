"""Numbers that are not finite never reach the weights, a checkpoint, or a person who believes them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import FILE, overrides, settings
from test_trainer import assert_equal_models, run_training

from dimaskdino import UserError, load
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training import trainer as module
from dimaskdino.training.resume_points import load_resume_point, resume_points
from dimaskdino.training.trainer import NonFiniteLossError


def finite(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in state.values() if x.is_floating_point())


def breaking(what: str, at: int):
    """The criterion, but its call number `at` has a finite loss with a NaN gradient, or a NaN loss."""
    real, calls = module.criterion, []

    def criterion(*arguments):
        losses = real(*arguments)
        calls.append(1)
        if len(calls) == at:
            value = losses.terms["decoder.1/giou"]
            # the root of 0 is 0, its derivative is infinite, and infinite times 0 is NaN
            losses.terms["decoder.1/giou"] = value + (0 * value).sqrt() if what == "gradient" else value * torch.nan
        return losses

    return criterion


@pytest.fixture(scope="module")
def finished(shapes_data, tmp_path_factory) -> RunFolder:
    return run_training(tmp_path_factory.mktemp("run"), shapes_data)


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_gradient_that_is_nan_stops_before_the_step(at, finished, shapes_data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "criterion", breaking("gradient", at))
    with pytest.raises(NonFiniteLossError, match=rf"step {at - 1}: the gradient is not finite\. Images .*jpg"):
        run_training(tmp_path, shapes_data)
    run = RunFolder(tmp_path)
    assert "the gradient is not finite" in run.status()["reason"]
    state, _ = load_resume_point(run.checkpoints)
    assert state["step"] == at - 1
    assert finite(state["model"])
    assert not run.model.exists()
    # what broke is gone: the same command again ends as an undisturbed run
    monkeypatch.undo()
    assert_equal_models(run_training(tmp_path, shapes_data).model, finished.model)


def test_failing_again_at_the_same_step_keeps_both_resume_points(shapes_data, tmp_path, monkeypatch):
    for _ in range(3):
        with monkeypatch.context() as patch:
            resumed = (tmp_path / "checkpoints").exists()
            patch.setattr(module, "criterion", breaking("gradient", 1 if resumed else 4))
            with pytest.raises(NonFiniteLossError, match="step 3"):
                run_training(tmp_path, shapes_data)
    steps = [load_pt(file)["step"] for file in resume_points(tmp_path / "checkpoints")]
    assert steps == [3, 2]


def load_pt(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_weights_that_are_not_finite_are_never_saved(shapes_data, tmp_path, monkeypatch):
    real = module.Trainer._train_step

    def poison(self, parts):
        result = real(self, parts)
        if self.step == 3:
            with torch.no_grad():
                next(self.detector.parameters()).fill_(torch.nan)
        return result

    monkeypatch.setattr(module.Trainer, "_train_step", poison)
    monkeypatch.setattr(module.Trainer, "_check_finite", lambda *_: None)
    with pytest.raises(
        NonFiniteLossError, match=r"not finite, so nothing is saved. The newest resume point is that of step 2"
    ):
        run_training(tmp_path, shapes_data)
    assert [load_pt(file)["step"] for file in resume_points(tmp_path / "checkpoints")] == [2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_models_that_are_not_finite_are_refused(value, finished, tmp_path):
    state = load_pt(resume_points(finished.checkpoints)[0])
    state["model"]["heads.label.bias"][1] = value
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(UserError, match=r"broken.pt: heads.label.bias contains NaN or inf"):
        load(tmp_path / "broken.pt")


def test_integer_weights_are_refused(finished, tmp_path):
    state = load_pt(resume_points(finished.checkpoints)[0])
    state["model"]["heads.label.bias"] = state["model"]["heads.label.bias"].long()
    torch.save(state, tmp_path / "integers.pt")
    with pytest.raises(UserError, match=r"heads.label.bias has the type torch.int64, expected torch.float32"):
        load(tmp_path / "integers.pt")


SCRIPT = """
import os
import torch
from dimaskdino.training import trainer
real, calls = trainer.criterion, []
def criterion(*arguments):
    losses = real(*arguments)
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        losses.terms["decoder.1/giou"] = losses.terms["decoder.1/giou"] * torch.nan
    return losses
trainer.criterion = criterion
from dimaskdino.cli import main
main()
"""


def test_a_loss_that_is_nan_in_one_of_two_processes_stops_both_in_the_same_step(shapes_data, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--", str(tmp_path / "script.py")]
    ended = subprocess.run(
        [sys.executable, *launcher, "train", *overrides(shapes_data), "--config", str(FILE), "--run", tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert ended.returncode
    # the same reason in both, named by the process that has it
    assert ended.stderr.count("dimaskdino: step 2: the loss is not finite (decoder.1/giou)") == 2
    assert "Connection closed" not in ended.stderr
    run = RunFolder(tmp_path / "run")
    assert "step 2: the loss is not finite (decoder.1/giou)" in run.status()["reason"]
    state, _ = load_resume_point(run.checkpoints)
    assert state["step"] == 2
    assert finite(state["model"])


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.lr=1e-5",
        "train.precision=bf16",
        "train.batch_size=3",
        "schedule.steps=8",
        "data.skip_bad_images=true",
    ],
)
def test_remedies_can_be_tried_in_the_same_folder(change, shapes_data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "criterion", breaking("loss", 4))
    with pytest.raises(NonFiniteLossError):
        run_training(tmp_path, shapes_data)
    monkeypatch.undo()
    run = run_training(tmp_path, shapes_data, change)
    key, value = change.split("=")
    records = run.read_metrics()
    (noted,) = [record for record in records if "changed" in record]
    assert noted["step"] == 3
    assert str(noted["changed"][key]).lower() == value or float(noted["changed"][key]) == float(value)
    if key == "optimizer.lr":  # the new rate is in use: warmed up, and dropped at step 5
        rates = {record["step"]: record["lr"] for record in records if "loss" in record}
        assert rates[4] == pytest.approx(1e-5)
    assert run.status()["state"] == "finished"


@pytest.mark.parametrize("change", ["model.decoder.layers=3", "train.seed=5", "schedule.steps=4", "loss.points=32"])
def test_what_the_weights_mean_never_changes(change, finished, shapes_data):
    with pytest.raises(UserError, match="holds a run with other settings"):
        finished.write_config(settings(shapes_data, change))


def test_a_bad_image_saves_before_it_stops(shapes_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes_data, data)
    for image in sorted((data / "images" / "train").iterdir())[:4]:
        image.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot be read.*skip_bad_images=true"):
        run_training(tmp_path / "run", data, "train.checkpoint_every=100")
    state, _ = load_resume_point(RunFolder(tmp_path / "run").checkpoints)
    assert state is not None
    run = run_training(tmp_path / "run", data, "train.checkpoint_every=100", "data.skip_bad_images=true")
    assert run.status()["state"] == "finished"
    assert any("skipped" in record for record in run.read_metrics())


def test_settings_that_are_newer_than_the_run_are_no_change(shapes_data, tmp_path):
    run = run_training(tmp_path, shapes_data)
    newest = resume_points(run.checkpoints)[0]
    state = load_pt(newest)
    before = json.loads(state["config"])
    del before["model"]["pixel_decoder"]["finest"]  # as a run before 0.2 has it
    torch.save(state | {"config": json.dumps(before)}, newest)
    resumed = run_training(tmp_path, shapes_data, "schedule.steps=7")
    (noted,) = [record for record in resumed.read_metrics() if "changed" in record]
    assert noted["changed"] == {"schedule.steps": 7}
