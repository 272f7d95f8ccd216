"""Training: resuming exactly, accumulating, several processes, and everything that can go wrong on the way."""

import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from scene import assert_equal_models, finish, process, wait_for_step
from small import FILE, overrides, settings, trained_file

from dimaskdino import cli, load
from dimaskdino.cli.training import share
from dimaskdino.config import shared_config
from dimaskdino.data.dataloader import training_dataset, training_loader
from dimaskdino.modeling import Detector
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training import trainer as training_loop
from dimaskdino.training.optimizer import build_optimizer, learning_rate_factor
from dimaskdino.training.resume_points import load_resume_point
from dimaskdino.training.trainer import NonFiniteLossError, Trainer, train
from dimaskdino.utils.distributed import DistributedContext
from dimaskdino.utils.errors import UserError


def run_training(folder: Path, data: Path, *changes: str) -> RunFolder:
    run = RunFolder(folder)
    config = settings(data, *changes)
    run.write_config(config)
    with run.running():
        train(config, run)
    return run


@pytest.fixture(scope="module")
def finished(shapes_data, tmp_path_factory) -> RunFolder:
    return run_training(tmp_path_factory.mktemp("run"), shapes_data, "train.trackers=[tensorboard]")


def test_a_run_leaves_its_records(finished):
    assert finished.status()["state"] == "finished"
    records = finished.read_metrics()
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    total = sum(records[-1]["losses"].values())
    assert records[-1]["loss"] == pytest.approx(total, rel=1e-4)
    assert {"decoder.2/giou", "token_interaction.1/l1", "denoising.decoder.0/dice"} <= set(records[-1]["losses"])
    assert json.loads((finished.path / "versions.json").read_text())["packages"]["torch"] == torch.__version__
    assert list((finished.path / "tensorboard").iterdir())
    model = load(finished.path)
    assert model.step == 6
    assert model.classes == ["disk", "rectangle", "triangle", "star", "ring"]


def one_step_gradients(data: Path, folder: Path, *changes: str) -> dict[str, torch.Tensor]:
    trainer = Trainer(settings(data, *changes), RunFolder(folder), DistributedContext(0, 1, torch.device("cpu")))
    gradients: dict[str, torch.Tensor] = {}

    def remember(*_: object) -> None:
        gradients.update({n: p.grad.clone() for n, p in trainer.detector.named_parameters() if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(remember)
    loader = iter(training_loader(trainer.data, trainer.config, 0, 0, 1))
    trainer._train_step([next(loader) for _ in range(trainer.config.train.accumulate)])
    return gradients


UNCLIPPED = ("optimizer.clip_norm=1e9", "model.backbone.norm=frozen")


def test_accumulation_has_the_gradient_of_the_whole_batch(shapes_data, tmp_path):
    # without what is drawn at random anew for each part: mask points and denoising
    fixed = ("model.denoising.queries=0", "loss.weights.mask=0", "loss.weights.dice=0", "train.batch_size=5")
    fixed += ("loss.cost.mask=0", "loss.cost.dice=0", *UNCLIPPED)
    # with 8 channels, 5 images, 2 threads and AVX-512, oneDNN 3.12 (PyTorch 2.14) writes past the gradient of a 1x1
    # kernel with stride 2
    fixed += ("model.backbone.width=16",)
    whole = one_step_gradients(shapes_data, tmp_path / "a", *fixed)
    parts = one_step_gradients(shapes_data, tmp_path / "b", *fixed, "train.accumulate=2")
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-3, rtol=1e-3, msg=name)


def test_recomputed_activations_change_nothing(shapes_data, tmp_path):
    plain = one_step_gradients(shapes_data, tmp_path / "a", *UNCLIPPED)
    saving = one_step_gradients(shapes_data, tmp_path / "b", *UNCLIPPED, "train.checkpoint_activations=true")
    saving = {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in saving.items()}
    assert plain.keys() == saving.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient, msg=name)
    run = run_training(tmp_path / "c", shapes_data, "train.checkpoint_activations=true")
    assert load(run.path).step == 6


ONE_STEP = ("schedule.steps=1", "schedule.drops=[1]", "schedule.warmup=0", "optimizer.weight_decay=0", *UNCLIPPED)


def assert_gradients_of_a_run(folder: Path, wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare the gradient of a run's only step, from AdamW's first moment, which is a tenth of it."""
    resume_point, _ = load_resume_point(folder / "checkpoints")
    assert len(wanted) > 100
    for name, gradient in wanted.items():
        found = resume_point["optimizer"][name]["exp_avg"] * 10
        torch.testing.assert_close(found, gradient, atol=tolerance, rtol=10 * tolerance, msg=name)


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradients_and_can_be_read_back(shapes_data, tmp_path):
    plain = one_step_gradients(shapes_data, tmp_path / "a", *ONE_STEP)
    finish(process(tmp_path / "b", shapes_data, *ONE_STEP, "train.compile=true"))
    assert_gradients_of_a_run(tmp_path / "b", plain, 1e-3)
    assert load(tmp_path / "b").step == 1


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [4, 5])
def test_two_processes_have_the_gradients_of_one(batch_size, shapes_data, tmp_path):
    """Everything random included; with 5 images the processes have 2 and 3 of them, and other numbers of objects."""
    changes = (*ONE_STEP, f"train.batch_size={batch_size}")
    finish(process(tmp_path / "two", shapes_data, *changes, processes=2))
    one = one_step_gradients(shapes_data, tmp_path / "one", *changes, "train.accumulate=2")
    assert_gradients_of_a_run(tmp_path / "two", one, 1e-4)


@pytest.mark.slow
def test_two_processes_train_together(shapes_data, tmp_path):
    trainer = process(tmp_path, shapes_data, processes=2)
    output, _ = trainer.communicate(timeout=300)
    assert trainer.returncode == 0, output
    assert RunFolder(tmp_path).status()["state"] == "finished"
    assert load(tmp_path).step == 6


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(shapes_data, tmp_path):
    changes = ("schedule.steps=5000", "train.checkpoint_every=5000")
    trainer = process(tmp_path, shapes_data, *changes, processes=2)
    wait_for_step(RunFolder(tmp_path), 2)
    started = time.monotonic()
    trainer.send_signal(signal.SIGTERM)
    trainer.communicate(timeout=120)
    assert time.monotonic() - started < 25  # torchrun kills after 30
    assert "SIGTERM" in RunFolder(tmp_path).status()["reason"]
    assert load_resume_point(tmp_path / "checkpoints")[0]["step"] >= 2


def test_a_batch_that_cannot_be_split(shapes_data):
    config = settings(shapes_data, "train.batch_size=6", "train.accumulate=2")
    with pytest.raises(UserError, match="batch_size = 6 is less than one image per part: 4 processes x 2 parts"):
        training_loader(training_dataset(config), config, 0, 0, 4)


def test_missing_images_are_noticed_before_the_first_step(shapes_data, tmp_path):
    data = Path(shutil.copytree(shapes_data, tmp_path / "data"))
    gone = sorted((data / "images" / "train").iterdir())[3]
    gone.unlink()
    with pytest.raises(UserError, match=rf"1 images of 'train' are missing, the first .*{gone.name} .*skip_bad_images"):
        run_training(tmp_path / "run", data)
    assert RunFolder(tmp_path / "run").read_metrics() == []
    records = run_training(tmp_path / "other", data, "data.skip_bad_images=true").read_metrics()
    assert any(gone.name in record.get("skipped", "") for record in records)


def test_bf16_starts_where_fp32_does(finished, shapes_data, tmp_path):
    records = run_training(tmp_path, shapes_data, "train.precision=bf16").read_metrics()
    assert records[0]["loss"] == pytest.approx(finished.read_metrics()[0]["loss"], rel=0.02)
    assert records[0]["loss"] != finished.read_metrics()[0]["loss"]  # it really ran in another precision


@pytest.mark.slow
def test_fp16_finds_a_loss_scale_and_trains(shapes_data, tmp_path):
    changes = ("train.precision=fp16", "schedule.steps=20", "schedule.drops=[19]", "train.checkpoint_every=20")
    records = run_training(tmp_path, shapes_data, *changes).read_metrics()
    scale = load_resume_point(tmp_path / "checkpoints")[0]["scaler"]["scale"]
    assert 1 <= scale < 65536  # it starts too high for these gradients, and steps that overflow are left out
    assert not math.isfinite(records[0]["grad_norm"])
    # a step that overflows now and then belongs to the method
    assert sum(math.isfinite(record["grad_norm"]) for record in records[10:]) >= 5
    assert all(math.isfinite(record["loss"]) for record in records)


def test_loss_goes_down(shapes_data, tmp_path):
    changes = ("schedule.steps=40", "schedule.drops=[39]", "train.checkpoint_every=100", "optimizer.lr=1e-3")
    records = run_training(tmp_path, shapes_data, *changes).read_metrics()
    first, last = (sum(r["loss"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert last < 0.7 * first


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_weights(finished, shapes_data, tmp_path, monkeypatch):
    from dimaskdino.training import trainer as module

    real, calls = module.criterion, []

    def break_third(*arguments):
        losses = real(*arguments)
        calls.append(1)
        if len(calls) == 3:
            losses.terms["decoder.1/giou"] = losses.terms["decoder.1/giou"] * torch.nan
        return losses

    monkeypatch.setattr(module, "criterion", break_third)
    with pytest.raises(NonFiniteLossError, match=r"step 2: .*decoder.1/giou.*images/train/.*jpg"):
        run_training(tmp_path, shapes_data)
    assert "not finite" in RunFolder(tmp_path).status()["reason"]
    state, _ = load_resume_point(RunFolder(tmp_path).checkpoints)
    assert state["step"] == 2
    monkeypatch.undo()
    assert_equal_models(run_training(tmp_path, shapes_data).model, finished.model)


def test_a_disk_that_fills_up_in_between(shapes_data, tmp_path, monkeypatch, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr(training_loop, "train", lambda config, folder: Path("/dev/full").write_text("metrics"))
    arguments = ["train", *overrides(shapes_data), "--config", str(FILE), "--run", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["dimaskdino", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert "the disk is full" in capsys.readouterr().err
    assert "No space left" in RunFolder(tmp_path).status()["reason"]


def test_loading_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"model": Evil(), "step": 1}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="more than tensors"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_models_that_cannot_be_used(finished, tmp_path):
    with pytest.raises(UserError, match="holds no trained model"):
        load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(finished.model.read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated"):
        load(cut)
    with pytest.raises(UserError, match=r"another architecture.*parameters"):
        load(finished.path, overrides=["model.decoder.layers=3"])
    with pytest.raises(UserError, match="trained for 5 classes, the configuration says 7"):
        load(finished.path, overrides=["model.classes=7"])


def test_data_with_another_number_of_classes(shapes_data, tmp_path):
    with pytest.raises(UserError, match=r"the model has 7 classes, but .*train.json has 5 categories"):
        run_training(tmp_path, shapes_data, "model.classes=7")


def test_parameter_groups_and_rates(shapes_data):
    config = settings(shapes_data, "optimizer.backbone_lr_factor=0.1", "optimizer.lr=1e-4")
    from dimaskdino.modeling import Detector

    detector = Detector(config.model)
    optimizer = build_optimizer(detector, config.optimizer)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(group_of) == len(list(detector.parameters()))
    expected = {
        "backbone.stages.0.0.conv1.weight": (1e-5, 0.05),
        "decoder.layers.0.ffn.linear1.weight": (1e-4, 0.05),
        "decoder.layers.0.ffn.norm.weight": (1e-4, 0.0),
        "denoising.labels.weight": (1e-4, 0.0),
        "pixel_decoder.level_embedding": (1e-4, 0.0),
    }
    parameters = dict(detector.named_parameters())
    for name, (lr, decay) in expected.items():
        group = group_of[id(parameters[name])]
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(lr), decay), name
    changes = ("schedule.steps=100", "schedule.drops=[50, 80]", "schedule.drop_factor=0.1", "schedule.warmup=4")
    schedule = settings(shapes_data, *changes).schedule
    factors = [learning_rate_factor(step, schedule) for step in (0, 3, 49, 50, 79, 80)]
    assert factors == pytest.approx([0.25, 1, 1, 0.1, 0.1, 0.01])


def test_fine_tuning_starts_from_a_trained_model(finished, shapes_data, tmp_path, capsys):
    same = settings(shapes_data, f"train.weights={finished.path}")
    trained = load(finished.path).detector.state_dict()
    trainer = Trainer(same, RunFolder(tmp_path / "same"), DistributedContext(0, 1, torch.device("cpu")))
    started = trainer.detector.state_dict()
    assert all(torch.equal(started[key], value) for key, value in trained.items())

    data = two_classes(shapes_data, tmp_path / "data")
    other = settings(data, f"train.weights={finished.path}", "model.classes=2")
    started = Trainer(
        other, RunFolder(tmp_path / "other"), DistributedContext(0, 1, torch.device("cpu"))
    ).detector.state_dict()
    left = {"heads.label.weight", "heads.label.bias", "denoising.labels.weight"}
    assert all(torch.equal(started[key], value) for key, value in trained.items() if key not in left)
    assert all(len(started[key]) == 2 for key in left)
    assert "re-initialised for these classes or this backbone: denoising.labels.weight" in capsys.readouterr().out

    for weights, change, words in (
        (finished.path, "model.hidden_dim=64", "has another architecture"),
        (tmp_path / "none.pt", "train.seed=0", "does not exist"),
        (finished.path, "train.weights_of=[neck]", "the model has no module 'neck', only backbone, pixel_decoder"),
    ):
        wrong = settings(shapes_data, f"train.weights={weights}", change)
        with pytest.raises(UserError, match=words):
            Trainer(wrong, RunFolder(tmp_path / "wrong"), DistributedContext(0, 1, torch.device("cpu")))


def test_a_run_says_what_it_does_at_its_start(shapes_data, tmp_path, capsys):
    config = settings(shapes_data, "schedule.steps=2", "schedule.drops=[1, 2, 50]")
    train(config, RunFolder(tmp_path))
    assert "note: schedule.drops=[2, 50] have no effect: the training ends at step 2" in capsys.readouterr().out
    train(config.model_copy(update={"schedule": config.schedule.model_copy(update={"steps": 3})}), RunFolder(tmp_path))
    assert "resuming at step 2 of 3" in capsys.readouterr().out


def test_weights_that_are_replaced_are_not_downloaded(shapes_data, tmp_path):
    """A name of weights that nobody has would be refused."""
    usual = "model.backbone.width=64"
    trained = trained_file(tmp_path / "trained.safetensors", shapes_data, usual)
    other = (usual, "model.backbone.weights=NONE_SUCH", f"train.weights={trained}")
    Trainer(settings(shapes_data, *other), RunFolder(tmp_path), DistributedContext(0, 1, torch.device("cpu")))
    partly = settings(shapes_data, *other, "train.weights_of=[decoder]")
    with pytest.raises(UserError, match="NONE_SUCH"):
        Trainer(partly, RunFolder(tmp_path / "b"), DistributedContext(0, 1, torch.device("cpu")))


def test_a_model_can_start_from_some_modules_of_another(finished, shapes_data, tmp_path, capsys):
    """Here from a model with another number of classes, and with De-Imbalance and BATO, which the new one lacks."""
    chosen = ("train.weights_of=[backbone, pixel_decoder]", "model.bato.enabled=false", "model.selection.k=[12]")
    changed = settings(shapes_data, f"train.weights={finished.path}", *chosen)
    trained = load(finished.path).detector.state_dict()
    torch.manual_seed(changed.train.seed)
    fresh = Detector(changed.model).state_dict()
    trainer = Trainer(changed, RunFolder(tmp_path / "run"), DistributedContext(0, 1, torch.device("cpu")))
    for key, value in trainer.detector.state_dict().items():
        taken = key.partition(".")[0] in ("backbone", "pixel_decoder")
        assert torch.equal(value, trained[key] if taken else fresh[key]), key
    assert f"starting from {finished.path} for backbone, pixel_decoder" in capsys.readouterr().out


def test_all_but_the_backbone_can_start_from_a_model_with_another_one(finished, shapes_data, tmp_path, capsys):
    """What reads the backbone's channels is re-initialised, and so is what depends on the classes."""
    trained = load(finished.path).detector
    others = ", ".join(name for name, _ in trained.named_children() if name != "backbone")
    chosen = (f"train.weights_of=[{others}]", "model.backbone.width=32", "model.classes=2")
    data = two_classes(shapes_data, tmp_path / "data")
    changed = settings(data, f"train.weights={finished.path}", *chosen)
    torch.manual_seed(changed.train.seed)
    fresh = Detector(changed.model).state_dict()
    trainer = Trainer(changed, RunFolder(tmp_path / "run"), DistributedContext(0, 1, torch.device("cpu")))
    started, taken = trainer.detector.state_dict(), trained.state_dict()
    left = {key for key, value in started.items() if key in taken and value.shape != taken[key].shape}
    for key, value in started.items():
        own = key.startswith("backbone") or key in left
        assert torch.equal(value, fresh[key] if own else taken[key]), key
    reported = capsys.readouterr().out
    assert {key for key in left if not key.startswith("backbone")} == {
        *("heads.label.weight", "heads.label.bias", "denoising.labels.weight", "pixel_decoder.lateral.0.weight"),
        *(f"pixel_decoder.projections.{level}.0.weight" for level in range(4)),
    }
    assert all(key in reported for key in left if not key.startswith("backbone"))


def two_classes(shapes_data: Path, folder: Path) -> Path:
    """The shapes data with two categories instead of five."""
    shutil.copytree(shapes_data, folder)
    for file in (folder / "annotations").glob("*.json"):
        content = json.loads(file.read_text())
        content["categories"] = content["categories"][:2]
        for annotation in content["annotations"]:
            annotation["category_id"] = min(annotation["category_id"], 2)
        file.write_text(json.dumps(content))
    return folder


def test_an_exported_run_is_a_run_of_half_the_size(finished, tmp_path):
    target = RunFolder(tmp_path / "shared")
    share(finished.path, target.path)
    assert target.model.stat().st_size < 0.6 * finished.model.stat().st_size
    before, after = (load(run.path) for run in (finished, target))
    assert (after.config, after.classes, after.step) == (shared_config(before.config), before.classes, before.step)
    for key, value in before.detector.state_dict().items():
        rounded = value.half().float() if value.ndim > 1 else value
        assert torch.equal(after.detector.state_dict()[key], rounded)
    assert target.status()["state"] == "finished"
    assert [r["step"] for r in target.read_metrics()] == [r["step"] for r in finished.read_metrics()]
    command = json.loads((target.path / "versions.json").read_text())["command"]
    assert not any(word.startswith("/") for word in command)
    with pytest.raises(UserError, match="exists already"):
        share(finished.path, target.path)
    with pytest.raises(UserError, match="is not a finished run"):
        share(tmp_path / "none", tmp_path / "other")


def test_a_damaged_newer_resume_point_does_not_outlive_the_good_ones(shapes_data, tmp_path):
    run = RunFolder(tmp_path)
    config = settings(shapes_data, "train.keep=1", "schedule.steps=2", "train.checkpoint_every=1")
    train(config, run)
    (run.checkpoints / "step_0000005.pt").write_bytes(b"damaged")
    run.model.unlink()
    train(settings(shapes_data, "train.keep=1", "schedule.steps=3", "train.checkpoint_every=1"), run)
    assert sorted(path.name for path in run.checkpoints.glob("step*")) == ["step_0000003.pt", "step_0000005.pt.damaged"]


def test_a_run_without_patience_left_says_so_and_goes_on_when_asked(shapes_data, tmp_path, capsys):
    run = RunFolder(tmp_path)
    validated = ("train.validation.every=1", "train.validation.images=1", "schedule.steps=6", "optimizer.lr=1e-12")
    train(settings(shapes_data, *validated, "train.validation.patience=1"), run)
    ended = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert ended < 6
    capsys.readouterr()
    train(settings(shapes_data, *validated, "train.validation.patience=1"), run)
    assert f"the training ended at step {ended}, since it ran out" in capsys.readouterr().out
    train(settings(shapes_data, *validated), run)
    assert load(run.path).step == 6
