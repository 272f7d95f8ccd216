"""The command line as a person uses it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import detector, read, state_dict
from small import FILE, overrides

from dimaskdino.training.checkpoint import load_model

COMMAND = [sys.executable, "-m", "dimaskdino"]


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"MPLBACKEND": "agg", "COLUMNS": "120"},
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["evaluate"],
        ["predict"],
        ["run"],
        ["study"],
        ["status"],
        ["export"],
        ["convert"],
        ["data", "shapes"],
        ["data", "check"],
        ["config", "show"],
    ],
    ids=" ".join,
)
def test_help_explains_every_option(command):
    result = run(*command, "--help")
    assert result.returncode == 0
    assert len(result.stdout) > 300


def test_mistakes_are_one_line():
    result = run("config", "show", FILE, "train.batchsize=3")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "did you mean 'train.batch_size'" in result.stderr


def test_train_evaluate_predict_and_status(shapes_data, tmp_path):
    changes = overrides(shapes_data, "train.log_every=100")  # the last step is logged all the same
    assert "stopped" not in run("train", "--config", FILE, "--run", "mine", *changes, cwd=tmp_path).stderr
    evaluated = run("evaluate", "mine", "--stages", "decoder.1", "decoder.2", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "decoder.2" in evaluated.stdout
    assert (tmp_path / "mine" / "evaluation" / "layers.png").stat().st_size > 5000

    images = shapes_data / "images" / "val"
    predicted = run("predict", "mine", images, "--stage", "decoder.1", "--threshold", "0", cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 4
    records = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    assert len(records) == 4 * 60  # 12 queries, 5 classes
    assert set(records[0]) == {"image", "class", "score", "box_xyxy"}

    status = run("status", "mine", cwd=tmp_path)
    assert "state finished" in status.stdout
    assert "decoder.2" in status.stdout

    wrong = run("predict", "mine", images, "--stage", "decoder.9", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "no stage 'decoder.9'; it has first_selection" in wrong.stderr
    assert "does not exist" in run("predict", "mine", "nowhere.jpg", cwd=tmp_path).stderr


def test_data_commands(tmp_path):
    made = run("data", "shapes", "shapes", "--train", "3", "--val", "2", "--size", "64", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "data.root=shapes" in made.stdout
    checked = run("data", "check", "shapes", "val", cwd=tmp_path)
    assert checked.returncode == 0
    assert "2 images, 0 with problems" in checked.stdout
    (tmp_path / "shapes" / "images" / "val" / "000001.jpg").write_bytes(b"no image")
    broken = run("data", "check", "shapes", "val", cwd=tmp_path)
    assert broken.returncode == 1
    assert "000001.jpg cannot be read" in broken.stderr


def test_convert_accounts_for_every_key(tmp_path):
    torch.save({"model": state_dict(read("di_small"))}, tmp_path / "published.pth")
    changes = [
        *("model.classes=7", "model.pixel_decoder.layers=2", "model.pixel_decoder.ffn_dim=128"),
        *("model.selection.k=[90,40]", "model.decoder.layers=3", "model.decoder.ffn_dim=96"),
        *("model.bato.guiding_tokens=12", "model.denoising.queries=30"),
    ]
    config = FILE.parents[1] / "coco" / "instance-segmentation" / "dimaskdino_r50_4scale_bs16_12ep.yaml"
    done = run("convert", tmp_path / "published.pth", tmp_path / "ours.safetensors", "--config", config, *changes)
    assert done.returncode == 0, done.stderr
    assert "no part of the model: criterion.empty_weight" in done.stdout
    ours, recorded = load_model(tmp_path / "ours.safetensors").detector.state_dict(), detector("di_small").state_dict()
    assert all(torch.equal(ours[key], value) for key, value in recorded.items())

    refused = run("convert", tmp_path / "published.pth", tmp_path / "other.safetensors", "--config", config)
    assert refused.returncode == 1
    assert "trained for 7 classes, the configuration says 80" in refused.stderr
    assert not (tmp_path / "other.safetensors").exists()
    (tmp_path / "published.pth").write_bytes((tmp_path / "published.pth").read_bytes()[:1000])
    assert (
        "cannot be read as a checkpoint"
        in run("convert", tmp_path / "published.pth", tmp_path / "x.safetensors").stderr
    )
