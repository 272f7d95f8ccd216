"""Validation during a training: its numbers, the best weights, patience, the average, and resuming with all of it."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from small import FILE, overrides, settings
from torch import nn

from dimaskdino.checkpoints import TrainedModel, load_checkpoint
from dimaskdino.cli.training import train as command
from dimaskdino.data.painting import GAP
from dimaskdino.data.shapes import CLASSES
from dimaskdino.evaluation.layerwise_ap import evaluate_layers
from dimaskdino.modeling import Detector
from dimaskdino.runs import trackers
from dimaskdino.runs.folder import RunFolder
from dimaskdino.studies.runs import EvaluatedRun
from dimaskdino.training.trainer import Trainer, train
from dimaskdino.training.validation import PICTURE_WIDTH, Best, Validator, averaged
from dimaskdino.utils.distributed import DistributedContext
from dimaskdino.utils.errors import Stopped, UserError

ALONE = DistributedContext(0, 1, torch.device("cpu"))
VALIDATED = ("train.validation.every=2", "schedule.steps=6", "train.average=0.5")


def resized(image: torch.Tensor, side: int) -> np.ndarray:
    """(3, h, w) uint8 as (side, side, 3), by Pillow."""
    return np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side))).astype(int)


def validations(folder: RunFolder) -> list[dict]:
    return [record for record in folder.read_metrics() if "validation" in record]


@pytest.fixture(scope="module")
def validated(shapes_data, tmp_path_factory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    train(settings(shapes_data, *VALIDATED), folder)
    return folder


def test_validation_gives_the_numbers_of_an_evaluation(shapes_data):
    config = settings(shapes_data, "evaluation.batch_size=1")
    torch.manual_seed(3)
    detector = Detector(config.model).train()
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    found = Validator(config, ALONE, CLASSES).score(detector)
    assert detector.training
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())
    assert found["images"] == 4
    model = TrainedModel(detector.eval(), config, list(CLASSES), 0)
    last = f"decoder.{config.model.decoder.layers}"
    stage = evaluate_layers(model, stages=[last]).stages[last]
    assert (found["box_AP"], found["mask_AP"]) == (stage.box.AP, stage.mask.AP)


def test_chosen_stages_are_scored_beside_the_last(shapes_data, tmp_path):
    names = ["token_interaction.0", "decoder.1"]
    changes = (*VALIDATED, f"train.validation.stages={json.dumps(names)}", "train.average=null")
    folder = RunFolder(tmp_path / "run")
    train(settings(shapes_data, *changes), folder)
    found = validations(folder)[-1]["validation"]
    expected = evaluate_layers(load_checkpoint(folder.path))
    assert found["stages"] == {
        name: {"box": stage.box.AP, "mask": stage.mask and stage.mask.AP}
        for name, stage in expected.stages.items()
        if name in names
    }
    assert found["stages"]["token_interaction.0"]["mask"] is None
    expected.save(folder.path / "evaluation" / "layers.json")
    scored = EvaluatedRun.load(folder.path).validations
    assert len(scored) == 3
    last = next(reversed(expected.stages))
    assert scored[-1] == found["stages"] | {last: {"box": found["box_AP"], "mask": found["mask_AP"]}}
    with pytest.raises(UserError, match=r"no stage 'decoder\.9'; it has first_selection"):
        train(settings(shapes_data, *VALIDATED, "train.validation.stages=[decoder.9]"), RunFolder(tmp_path / "other"))


def test_the_number_of_images_is_bounded_and_spread_over_the_split(shapes_data):
    validator = Validator(settings(shapes_data, "train.validation.images=2"), ALONE, CLASSES)
    assert validator.positions == [0, 2]
    assert len(validator.truth.dataset["images"]) == 2
    chosen = {validator.data.images[p]["id"] for p in validator.positions}
    assert {a["image_id"] for a in validator.truth.dataset["annotations"]} <= chosen
    assert validator.score(Detector(validator.config.model))["images"] == 2


def test_a_run_validates_and_keeps_the_best_weights(validated):
    records = validations(validated)
    assert [record["step"] for record in records] == [2, 4, 6]
    scores = [(r["validation"]["box_AP"] + r["validation"]["mask_AP"]) / 2 for r in records]
    best = records[int(np.argmax(scores))]["step"]
    assert records[-1]["best_step"] == best
    kept = load_checkpoint(validated.best)
    assert kept.step == best
    assert load_checkpoint(validated.path).step == 6


def test_each_validation_gives_a_picture_of_objects_beside_detections(validated, shapes_data):
    assert [path.name for path in sorted(validated.samples.iterdir())] == [f"step_{step:06d}.png" for step in (2, 4, 6)]
    config = settings(shapes_data)
    validator = Validator(config, ALONE, CLASSES)
    detector = load_checkpoint(validated.path).detector
    picture = validator.picture(detector)
    assert np.array_equal(picture, np.asarray(Image.open(validated.samples / "step_000006.png")))
    side = (PICTURE_WIDTH - GAP) // 2
    assert picture.shape == (4 * round(64 * PICTURE_WIDTH / (2 * 64 + GAP)) + 3 * GAP, PICTURE_WIDTH, 3)
    sample = validator.plain[0]
    drawn = np.abs(picture[: side - 8, : side - 8].astype(int) - resized(sample.image, side)[: side - 8, : side - 8])
    inside = resized(sample.masks.amax(0, keepdim=True).expand(3, -1, -1) * 255, side)[: side - 8, : side - 8] > 128
    assert drawn[inside].mean() > 3 * drawn[~inside].mean()


def test_trackers_receive_numbers_and_pictures_and_may_fail(shapes_data, tmp_path, monkeypatch, capsys):
    received = []

    class Recorder:
        def __init__(self, folder, settings, step):
            received.append(("opened", settings["schedule"]["steps"], step))

        def numbers(self, values, step):
            received.append((step, dict(values)))

        def picture(self, name, pixels, step):
            received.append((step, name, pixels.shape[-1]))

        def close(self):
            received.append("closed")

    class Failing(Recorder):
        def numbers(self, values, step):
            raise RuntimeError("the server is gone")

    monkeypatch.setitem(trackers.TRACKERS, "mine", Recorder)
    config = settings(shapes_data, "train.trackers=[mine]", "train.log_every=1", *VALIDATED)
    train(config, RunFolder(tmp_path / "a"))
    assert (received[0], received[-1]) == (("opened", 6, 0), "closed")
    assert {r[0] for r in received[1:-1]} == {1, 2, 3, 4, 5, 6}
    assert [r[0] for r in received[1:-1] if r[1:] == ("samples", 3)] == [2, 4, 6]
    numbers = [r[1] for r in received[1:-1] if isinstance(r[1], dict)]
    assert {"loss", "lr", "validation/box_AP"} <= set().union(*numbers)
    assert not (tmp_path / "a" / "tensorboard").exists()

    monkeypatch.setitem(trackers.TRACKERS, "mine", Failing)
    train(config, RunFolder(tmp_path / "b"))
    assert load_checkpoint(tmp_path / "b").step == 6
    assert capsys.readouterr().err.count("mine fails (the server is gone)") == 1


def test_a_tracker_that_is_missing_is_named(shapes_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        train(settings(shapes_data, "train.trackers=[wandb]"), RunFolder(tmp_path))
    with pytest.raises(UserError, match="no tracker 'mlflow', only tensorboard, wandb"):  # as in runs of version 0.2
        train(settings(shapes_data, "train.trackers=[mlflow]"), RunFolder(tmp_path))


def test_a_run_is_recorded_by_weights_and_biases(shapes_data, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = RunFolder(tmp_path / "run")
    train(settings(shapes_data, "train.trackers=[wandb]", *VALIDATED), folder)
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"validation/box_AP" in record.read_bytes()


def test_a_stopped_run_with_validation_and_average_resumes_as_an_undisturbed_one(validated, shapes_data, tmp_path):
    folder = RunFolder(tmp_path)
    trainer = Trainer(settings(shapes_data, *VALIDATED), folder, ALONE)
    original = trainer._train_step

    def stopping(parts):
        if trainer.step == 2:  # in the third step, after the first validation
            trainer._stop.received = "SIGTERM"
        return original(parts)

    trainer._train_step = stopping
    with pytest.raises(Stopped):
        trainer.run()
    assert [record["step"] for record in validations(folder)] == [2]
    train(settings(shapes_data, *VALIDATED), folder)
    assert [(r["step"], r["validation"], r["best_step"]) for r in validations(folder)] == [
        (r["step"], r["validation"], r["best_step"]) for r in validations(validated)
    ]
    for ours, theirs in ((folder.model, validated.model), (folder.best, validated.best)):
        found, wanted = load_checkpoint(ours).detector.state_dict(), load_checkpoint(theirs).detector.state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in found.items())


def test_patience_ends_a_training_that_gets_no_better(shapes_data, tmp_path):
    folder = RunFolder(tmp_path)
    changes = ("schedule.steps=20", "train.validation.every=1", "train.validation.patience=2", "optimizer.lr=1e-30")
    command(overrides(shapes_data, *changes), str(FILE), str(tmp_path))
    last = validations(folder)[-1]
    assert last["step"] == last["best_step"] + 2 < 20
    assert folder.status()["state"] == "finished"
    assert load_checkpoint(folder.path).step == last["step"]
    steps = [record["step"] for record in folder.read_metrics()]
    command(overrides(shapes_data, *changes), str(FILE), str(tmp_path))
    assert [record["step"] for record in folder.read_metrics()] == steps


def test_the_best_of_a_sequence():
    best = Best()
    results = [(1, 3), (2, 2), (2, 3), (0, 0), (1, 1)]
    better = [best.update({"box_AP": box, "mask_AP": mask}, step) for step, (box, mask) in enumerate(results, start=1)]
    assert better == [True, False, True, False, False]
    assert best == Best(2.5, 3, 2)
    assert Best(**json.loads(json.dumps(asdict(best)))) == best


def test_the_average_of_the_weights_by_hand():
    model = nn.Linear(1, 1, bias=False)
    mean = averaged(model, 0.2)
    values, expected = [3.0, 5.0, -1.0, 4.0], None
    for t, value in enumerate(values):
        nn.init.constant_(model.weight, value)
        mean.update_parameters(model)
        decay = min(0.2, (1 + t) / (10 + t))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert float(mean.module.weight.detach()) == pytest.approx(expected)


def test_a_run_gives_the_average_of_its_weights(shapes_data, tmp_path):
    config = settings(shapes_data, "train.average=0.9", "schedule.steps=3")
    trainer = Trainer(config, RunFolder(tmp_path), ALONE)
    seen, original = [], trainer._train_step

    def watched(parts):
        result = original(parts)
        seen.append(trainer.detector.heads.label.weight.detach().clone())
        return result

    trainer._train_step = watched
    trainer.run()
    mean = seen[0]
    for t, value in enumerate(seen[1:], start=1):
        mean = torch.lerp(mean, value, 1 - min(0.9, (1 + t) / (10 + t)))
    saved = load_checkpoint(tmp_path).detector.heads.label.weight
    torch.testing.assert_close(saved, mean)
    assert not torch.equal(saved, seen[-1])
