"""Validation during a training: its numbers, the best weights, patience, the average, and resuming with all of it."""

import json

import numpy as np
import pytest
import torch
from small import FILE, overrides, settings
from torch import nn

from dimaskdino.checkpoints import TrainedModel, load_checkpoint
from dimaskdino.distributed import DistributedContext
from dimaskdino.errors import Stopped
from dimaskdino.evaluation.layerwise_ap import evaluate_layers
from dimaskdino.modeling import Detector
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training.launch import main as launch
from dimaskdino.training.trainer import Trainer, train
from dimaskdino.training.validation import Best, Validator, averaged

ALONE = DistributedContext(0, 1, torch.device("cpu"))
VALIDATED = ("train.validation.every=2", "schedule.steps=6", "train.average=0.5")


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
    found = Validator(config, ALONE).score(detector)
    assert detector.training
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())
    assert found["images"] == 4
    model = TrainedModel(detector.eval(), config, [str(i) for i in range(config.model.classes)], 0)
    last = f"decoder.{config.model.decoder.layers}"
    stage = evaluate_layers(model, stages=[last]).stages[last]
    assert (found["box_AP"], found["mask_AP"]) == (stage.box.AP, stage.mask.AP)


def test_the_number_of_images_is_bounded_and_spread_over_the_split(shapes_data):
    validator = Validator(settings(shapes_data, "train.validation.images=2"), ALONE)
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
    assert launch(str(FILE), str(tmp_path), overrides(shapes_data, *changes)) == 0
    last = validations(folder)[-1]
    assert last["step"] == last["best_step"] + 2 < 20
    assert folder.status()["state"] == "finished"
    assert load_checkpoint(folder.path).step == last["step"]
    steps = [record["step"] for record in folder.read_metrics()]
    assert launch(str(FILE), str(tmp_path), overrides(shapes_data, *changes)) == 0
    assert [record["step"] for record in folder.read_metrics()] == steps


def test_the_best_of_a_sequence():
    best = Best()
    results = [(1, 3), (2, 2), (2, 3), (0, 0), (1, 1)]
    better = [best.update({"box_AP": box, "mask_AP": mask}, step) for step, (box, mask) in enumerate(results, start=1)]
    assert better == [True, False, True, False, False]
    assert best == Best(2.5, 3, 2)
    assert Best(**json.loads(json.dumps(best.state()))) == best


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
