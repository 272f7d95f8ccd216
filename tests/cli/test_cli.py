"""The command line as a person uses it."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from golden import detector, read, state_dict
from small import FILE, overrides

from dimaskdino import load
from dimaskdino.cli import main
from dimaskdino.cli.options import settings_first

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


def here(*arguments: object, cwd: Path = Path()) -> subprocess.CompletedProcess:
    """The same command in this process, which has imported PyTorch already."""
    out, err, code = io.StringIO(), io.StringIO(), None
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["dimaskdino", *map(str, arguments)]),
        mock.patch.dict(os.environ, {"COLUMNS": "120"}),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(arguments, code or 0, out.getvalue(), err.getvalue())


COMMANDS = (
    *("new", "train", "evaluate", "predict", "run", "study", "status", "share", "export", "convert"),
    *("data import", "data shapes", "data check", "data bdd100k", "config show", "config keys", "config list"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = here(*command.split(), "--help")
    assert result.returncode == 0
    assert f"For example: dimaskdino {command}" in " ".join(result.stdout.replace("│", " ").split())


def test_help_lists_every_command():
    result = run("--help")
    assert result.returncode == 0
    assert all(command.split()[0] in result.stdout for command in COMMANDS)


def test_settings_on_either_side_of_options():
    typed = ["train", "train.seed=1", "--run", "runs/a=b", "model.classes=3", "SOLVER.IMS_PER_BATCH", "8"]
    expected = ["train", "train.seed=1", "model.classes=3", "SOLVER.IMS_PER_BATCH", "8", "--run", "runs/a=b"]
    assert settings_first(typed) == expected
    assert settings_first(["status", "runs/mine"]) == ["status", "runs/mine"]
    without_value = ["train", "SOLVER.IMS_PER_BATCH", "--run", "runs/mine"]
    assert settings_first(without_value) == without_value
    photographs = ["predict", "runs/mine", "DSC_0001.JPG", "--output", "OUT"]
    assert settings_first(photographs) == photographs


def test_mistakes_are_one_line():
    result = here("config", "show", FILE, "train.batchsize=3")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "did you mean 'train.batch_size'" in result.stderr


def test_train_evaluate_predict_and_status(shapes_data, tmp_path):
    changes = overrides(shapes_data, "train.log_every=100")  # the last step is logged all the same
    trained = here("train", "--config", FILE, "--run", "mine", *changes, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    evaluated = here("evaluate", "mine", "--stages", "decoder.1", "decoder.2", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "decoder.2" in evaluated.stdout
    assert (tmp_path / "mine" / "evaluation" / "layers.png").stat().st_size > 5000

    images = shapes_data / "images" / "val"
    predicted = here("predict", "mine", images, "--stage", "decoder.1", "--threshold", "0", cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 4
    written = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    assert len(written["images"]) == 4
    assert len(written["annotations"]) == 4 * 60  # 12 queries, 5 classes
    assert {"score", "bbox", "segmentation"} <= set(written["annotations"][0])

    status = here("status", "mine", cwd=tmp_path)
    assert "state finished" in status.stdout
    assert "decoder.2" in status.stdout

    wrong = here("predict", "mine", images, "--stage", "decoder.9", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "no stage 'decoder.9'; it has first_selection" in wrong.stderr
    assert "does not exist" in here("predict", "mine", "nowhere.jpg", cwd=tmp_path).stderr


def test_data_commands(tmp_path):
    made = here("data", "shapes", "shapes", "--train", "3", "--val", "2", "--size", "64", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "data.root=shapes" in made.stdout
    checked = here("data", "check", "shapes", "val", cwd=tmp_path)
    assert checked.returncode == 0
    assert "val: 2 images, 0 of them without objects" in checked.stdout
    assert "0 problems" in checked.stdout
    (tmp_path / "shapes" / "images" / "val" / "000001.jpg").write_bytes(b"no image")
    broken = here("data", "check", "shapes", "val", cwd=tmp_path)
    assert broken.returncode == 1
    assert "000001.jpg cannot be read" in broken.stderr
    assert here("data", "check", "shapes", "val", "--no-read", cwd=tmp_path).returncode == 0
    (tmp_path / "shapes" / "images" / "val" / "000001.jpg").unlink()
    lacking = here("data", "check", "shapes", "test", cwd=tmp_path)
    assert "shapes has no annotations of the split 'test', only of train, val" in lacking.stderr
    lacking = here("data", "check", "shapes", "val", "--no-read", cwd=tmp_path)
    assert lacking.returncode == 1
    assert "the image shapes/images/val/000001.jpg does not exist" in lacking.stderr


def test_convert_accounts_for_every_key(tmp_path):
    torch.save({"model": state_dict(read("di_small"))}, tmp_path / "published.pth")
    changes = [
        *("model.classes=7", "model.pixel_decoder.layers=2", "model.pixel_decoder.ffn_dim=128"),
        *("model.selection.k=[90,40]", "model.decoder.layers=3", "model.decoder.ffn_dim=96"),
        *("model.bato.guiding_tokens=12", "model.denoising.queries=30"),
    ]
    config = FILE.parents[1] / "coco" / "instance-segmentation" / "dimaskdino_r50_4scale_bs16_12ep.yaml"
    done = here("convert", tmp_path / "published.pth", tmp_path / "ours.safetensors", "--config-file", config, *changes)
    assert done.returncode == 0, done.stderr
    assert "ignored, not part of the model: criterion.empty_weight" in done.stdout
    ours, recorded = load(tmp_path / "ours.safetensors").detector.state_dict(), detector("di_small").state_dict()
    assert all(torch.equal(ours[key], value) for key, value in recorded.items())

    refused = here("convert", tmp_path / "published.pth", tmp_path / "other.safetensors", "--config", config)
    assert refused.returncode == 1
    assert "trained for 7 classes, the configuration says 80" in refused.stderr
    assert not (tmp_path / "other.safetensors").exists()
    told = here("convert", tmp_path / "published.pth", tmp_path / "told.safetensors")
    assert "DI-MaskDINO, resnet50, 4 levels, 3 decoder layers, 7 classes" in told.stdout
    assert "the published values are used: model.selection.k=[600, 300]" in told.stdout
    (tmp_path / "published.pth").write_bytes((tmp_path / "published.pth").read_bytes()[:1000])
    assert (
        "cannot be read as a checkpoint"
        in here("convert", tmp_path / "published.pth", tmp_path / "x.safetensors").stderr
    )


def published_for_shapes(file: Path) -> None:
    """The recorded small model with its first 5 classes, in the published form."""
    state = {
        key: value[:5] if "class_embed" in key or "label_enc" in key else value
        for key, value in state_dict(read("di_small")).items()
    }
    torch.save({"model": state}, file)


YAML = """
MODEL:
  WEIGHTS: ""
  SEM_SEG_HEAD: {NUM_CLASSES: 5, TRANSFORMER_ENC_LAYERS: 2, DIM_FEEDFORWARD: 128, IGNORE_VALUE: 255}
  MaskDINO:
    DIM_FEEDFORWARD: 96
    DEC_LAYERS: 3
    NUM_OBJECT_QUERIES: 40
    FIRST_SELECTED_QUERIES: 60
    NUM_GUIDING_TOKENS: 12
    TRAIN_NUM_POINTS: 64
SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 2, STEPS: [1], CHECKPOINT_PERIOD: 1}
INPUT: {IMAGE_SIZE: 64, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 64}
"""


@pytest.mark.slow
def test_commands_in_the_published_form(shapes_data, tmp_path):
    published_for_shapes(tmp_path / "published.pth")
    (tmp_path / "published.yaml").write_text(YAML)
    data = (f"data.root={shapes_data}", "data.train=train", "data.val=val", "data.workers=0")
    given = ("--config-file", "published.yaml", "MODEL.WEIGHTS", "published.pth", "OUTPUT_DIR", "out", *data)
    evaluated = run("evaluate", *given, cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "note: no effect on the model, in the published code either: " in evaluated.stderr
    assert "decoder.3" in evaluated.stdout
    assert (tmp_path / "out" / "layers.json").exists()
    direct = run("evaluate", "published.pth", *data, "model.selection.k=[60,40]", "--stages", "decoder.3", cwd=tmp_path)
    assert direct.returncode == 0, direct.stderr

    trained = run("train", *given, "--num-gpus", "2", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "starting from published.pth" in trained.stdout
    assert load(tmp_path / "out").step == 2
    again = run("evaluate", "out", "TEST.DETECTIONS_PER_IMAGE", "7", "--keep-detections", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert len(list((tmp_path / "out" / "evaluation" / "detections").glob("*.safetensors"))) == 4  # one per image
    nameless = run("evaluate", "data.root=x", cwd=tmp_path)
    assert (
        nameless.stderr
        == "dimaskdino: name the model: dimaskdino evaluate MODEL, or MODEL.WEIGHTS FILE among the settings\n"
    )
