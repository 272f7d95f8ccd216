"""What somebody else made: files that could run code, names that could steer a terminal, and paths that are private."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ms_deform_attn
import pytest
import torch
from ms_deform_attn.build import problem
from ms_deform_attn.functional import available
from PIL import Image
from small import settings, trained_file
from torch.utils.data import DataLoader
from torchvision import models

from dimaskdino import UserError, config, load
from dimaskdino.cli.data import import_
from dimaskdino.cli.training import share, status
from dimaskdino.config import shared_config, without_folders
from dimaskdino.data.dataloader import without_worker_traceback
from dimaskdino.modeling.backbone_weights import torchvision_weights
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training.trainer import train
from dimaskdino.utils.terminal import printable

needs_kernels = pytest.mark.skipif(not available("cpu"), reason="CPU kernels are not built (no compiler here)")


def python(*arguments: object, **environment: str | None) -> subprocess.CompletedProcess:
    """Run Python with a changed environment; None removes a variable."""
    merged = {key: value for key, value in (os.environ | environment).items() if value is not None}
    command = [sys.executable, "-P", *map(str, arguments)]
    return subprocess.run(command, env=merged, capture_output=True, text=True, encoding="utf-8", timeout=300)


# weights of backbones


class Harmful:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def cached_weights(tmp_path, monkeypatch) -> Path:
    """The file in torch's cache from which the weights of a ResNet-18 are read; it does not exist yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / Path(models.ResNet18_Weights.IMAGENET1K_V1.url).name
    file.parent.mkdir(parents=True)
    return file


RESNET = config.Backbone(name="resnet18", weights="IMAGENET1K_V1")


def test_code_in_torchs_cache_of_weights_does_not_run(cached_weights, tmp_path):
    torch.save({"conv1.weight": Harmful(tmp_path / "ran")}, cached_weights)
    with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth is not the file of https://.*; delete it"):
        torchvision_weights(RESNET)
    assert not (tmp_path / "ran").exists()


def test_code_in_weights_with_the_right_hash_does_not_run_either(cached_weights, tmp_path, monkeypatch):
    torch.save({"conv1.weight": Harmful(tmp_path / "ran")}, cached_weights)
    digits = hashlib.sha256(cached_weights.read_bytes()).hexdigest()[:8]
    cached_weights.rename(cached_weights.with_name(f"resnet18-{digits}.pth"))
    weights = models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(weights), "url", f"https://localhost/resnet18-{digits}.pth")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        torchvision_weights(RESNET)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_in_the_cache_are_downloaded_once(cached_weights, tmp_path, monkeypatch):
    original = tmp_path / "original.pth"
    state = models.resnet18().state_dict()
    torch.save(state, original)
    digits = hashlib.sha256(original.read_bytes()).hexdigest()[:8]
    served = original.rename(tmp_path / f"resnet18-{digits}.pth")
    monkeypatch.setattr(type(models.ResNet18_Weights.IMAGENET1K_V1), "url", served.as_uri())
    first = torchvision_weights(RESNET)
    served.unlink()
    again = torchvision_weights(RESNET)
    assert torch.equal(first["conv1.weight"], state["conv1.weight"])
    assert torch.equal(again["conv1.weight"], state["conv1.weight"])


# the compiled operator

SAY = "import ms_deform_attn; print(ms_deform_attn.status('cpu')); print(ms_deform_attn.library_path('cpu'))"


@pytest.fixture
def built(tmp_path) -> Path:
    """A library in a cache of its own."""
    source = ms_deform_attn.library_path("cpu")
    target = tmp_path / "cache" / source.parent.name / source.name
    target.parent.mkdir(parents=True)
    shutil.copy(source, target)
    for path in (target.parent.parent, target.parent, target):
        path.chmod(0o755)
    return target


def operator(built: Path, **environment: str | None) -> subprocess.CompletedProcess:
    done = python("-c", SAY, MS_DEFORM_ATTN_CACHE=str(built.parent.parent), **environment)
    assert done.returncode == 0, done.stderr
    return done


@needs_kernels
def test_a_private_build_is_loaded_without_a_home(built):
    done = operator(built, HOME=None, XDG_CACHE_HOME=None)
    assert done.stdout.startswith("ms_deform_attn: compiled CPU kernels\n")
    assert done.stderr == ""


@needs_kernels
@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_library_that_others_can_write_to_is_not_loaded(built, mode):
    for path in (built, built.parent, built.parent.parent):
        path.chmod(mode)
        assert problem(built) == f"another user owns {path} or can write to it"
        path.chmod(0o755)
    assert problem(built) is None


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_a_library_of_another_user_is_not_loaded_by_root_either(built):
    for path in (built, built.parent):
        os.chown(path, 12345, 12345)
        assert problem(built) == f"another user owns {path} or can write to it"
        os.chown(path, 0, 0)
    assert problem(built) is None


@needs_kernels
def test_a_cache_that_others_can_write_to_gets_a_folder_of_this_users_own(built, monkeypatch):
    cache = built.parent.parent
    monkeypatch.setenv("MS_DEFORM_ATTN_CACHE", str(cache))
    assert ms_deform_attn.library_path("cpu") == built
    cache.chmod(0o777)
    assert ms_deform_attn.library_path("cpu") == cache / f"user-{os.geteuid()}" / built.parent.name / built.name


@needs_kernels
@pytest.mark.parametrize("has_digest", [True, False])
def test_a_damaged_library_falls_back_to_the_pytorch_version(built, has_digest):
    content = built.read_bytes()
    if has_digest:  # a library that is cut here ends a process that loads it
        built.with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest())
    built.write_bytes(content[: 5000 if has_digest else 100])
    done = operator(built)
    assert done.stdout.startswith("ms_deform_attn: PyTorch reference")
    assert ("is damaged; run" if has_digest else "cannot be loaded") in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@needs_kernels
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_builds_replace_what_may_not_be_loaded_and_are_private(built):
    cache = built.parent.parent
    cache.chmod(0o777)
    script = "import os; os.umask(0); from ms_deform_attn import build; print(build('cpu'))"
    done = python("-c", script, MS_DEFORM_ATTN_CACHE=str(cache))
    rebuilt = cache / f"user-{os.geteuid()}" / built.parent.name / built.name
    assert done.stdout == f"{rebuilt}\n", done.stderr
    assert operator(built).stdout.startswith("ms_deform_attn: compiled CPU kernels")
    assert rebuilt.with_suffix(".sha256").exists()


# names on a terminal

NAME = "cat\n0 problems\x1b[2J\u202eć"
SHOWN = r"cat\n0 problems\x1b[2J\u202eć"
OUTLINE = {"bbox": [1, 1, 10, 10], "segmentation": [[1, 1, 11, 1, 11, 11]], "area": 50, "iscrowd": 0}


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A dataset of one image and one class of a harmful name; a second image of such a name is missing."""
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    (root / "images" / "train").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(root / "images" / "train" / "a.png")
    images = [{"id": i, "file_name": name, "width": 64, "height": 64} for i, name in ((1, "a.png"), (2, f"{NAME}.png"))]
    content = {"images": images, "categories": [{"id": 1, "name": NAME}]}
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, **OUTLINE}]
    (root / "annotations" / "train.json").write_text(json.dumps(content))
    return root


def test_names_can_neither_forge_a_line_nor_steer_the_terminal(dataset):
    done = python("-m", "dimaskdino", "data", "check", dataset, PYTHONIOENCODING="ascii")
    shown = SHOWN.replace("ć", r"\u0107")  # which the pipe cannot take
    assert done.returncode == 1
    assert f"\n  {shown} " in done.stdout
    assert f"note: with fewer than 10 objects: {shown}\n" in done.stdout
    assert f"{shown}.png does not exist\n" in done.stderr
    assert done.stdout.endswith("\n1 problem\n")
    assert not any(sign in done.stdout + done.stderr for sign in ("\x1b", "\u202e", "\n0 problems"))


def test_errors_are_lines_whatever_they_name():
    assert str(UserError(f"{NAME} is missing", "see above")) == f"{SHOWN} is missing\nsee above"
    assert str(UserError(str(UserError(NAME)))) == SHOWN
    assert printable("größer, 日本語 \u3000, 👩\u200d🔬") == "größer, 日本語 \u3000, 👩\u200d🔬"
    assert printable(os.fsdecode(b"\xff.png")) == r"\udcff.png"


def test_an_error_of_a_loader_process_is_one_line():
    def load(index: int):
        raise UserError(f"{NAME} is missing")

    with pytest.raises(UserError) as raised, without_worker_traceback():
        list(DataLoader([0], collate_fn=load, num_workers=1))
    assert str(raised.value) == f"{SHOWN} is missing"


def test_the_status_of_a_foreign_run_is_shown_as_text(tmp_path, capsys):
    (tmp_path / "status.json").write_text(json.dumps({"state": "failed", "reason": NAME}))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / f"{NAME}.png").touch()
    assert status(tmp_path) == 1
    shown = capsys.readouterr().out
    assert f"reason {SHOWN}\n" in shown
    assert f"{SHOWN}.png\n" in shown


# encodings

PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": None}


@pytest.mark.parametrize("command", ["--help", "config keys"])
def test_a_pipe_in_ascii_receives_escapes(command):
    done = python("-m", "dimaskdino", *command.split(), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert len(done.stdout) > 100


@pytest.mark.parametrize("command", ["import", pytest.param("predict", marks=pytest.mark.slow)])
def test_files_of_any_name_are_found_in_a_locale_of_ascii(tmp_path, command):
    source, target = tmp_path / "größen", tmp_path / "neu"
    source.mkdir()
    images = []
    for number in range(2):
        pixels = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(number)).mul(255).byte()
        images.append({"id": number, "file_name": f"größe_{number}.png", "width": 64, "height": 64})
        Image.fromarray(pixels.numpy()).save(source / images[-1]["file_name"])
    annotations = [OUTLINE | {"id": i + 1, "image_id": i, "category_id": 1} for i in range(2)]
    content = {"images": images, "categories": [{"id": 1, "name": "größe"}], "annotations": annotations}
    (source / "all.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    arguments = ["data", "import", source, target]
    if command == "predict":
        arguments = ["predict", "dimaskdino-shapes", source, "--output", target]
    done = python("-m", "dimaskdino", *arguments, **PLAIN)
    assert done.returncode == 0, done.stderr
    assert len(list(target.rglob("größe_*.png"))) == 2


# private paths


def test_a_shared_run_names_no_folders(tmp_path, shapes_data, capsys):
    home = tmp_path / "somebody"
    shutil.copytree(shapes_data, home / "photos")
    run = RunFolder(home / "run")
    config = settings(home / "photos", "schedule.steps=1")
    with run.running():
        run.write_config(config)
        train(config, run)
    versions = json.loads((run.path / "versions.json").read_text())
    words = ["train", f"data.root={home}/photos", f"--run={home}/run", f"data.transforms=[{{file: '{home}/a.py'}}]"]
    (run.path / "versions.json").write_text(json.dumps(versions | {"command": [f"{home}/bin/dimaskdino", *words]}))
    target = tmp_path / "shared"
    share(run.path, target)
    for file in target.rglob("*"):
        assert not file.is_file() or b"somebody" not in file.read_bytes(), file
    command = json.loads((target / "versions.json").read_text())["command"]
    assert command == ["dimaskdino", "train", "data.root=photos", "--run=run", "data.transforms=[{file: 'a.py'}]"]
    assert f"next: dimaskdino evaluate {target} data.root={home / 'photos'}" in capsys.readouterr().out
    assert load(target, device="cpu").config == shared_config(config)


def test_an_uploaded_model_names_no_folders(tmp_path, shapes_data, monkeypatch):
    model = load(trained_file(tmp_path / "somebody.safetensors", shapes_data), device="cpu")
    uploaded = {}

    def keep(folder: Path, hub_id: str, private: bool) -> str:
        uploaded.update((file.name, file.read_bytes()) for file in folder.iterdir())
        return hub_id

    monkeypatch.setattr("dimaskdino.interop.hub.upload", keep)
    model.push_to_hub("owner/name")
    assert uploaded.keys() >= {"model.safetensors", "config.json", "README.md"}
    assert not any(str(shapes_data.parent).encode() in content for content in uploaded.values())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("data/coco", "data/coco"),
        ("/home/somebody/my data", "my data"),
        ("~somebody/data/", "data"),
        ("../somebody/data", "data"),
        ("C:\\Users\\somebody\\data", "data"),
        ("a=/home/x,b='/home/y'", "a=x,b='y'"),
        ("https://example.org/a", "https://example.org/a"),
        ("module:Name", "module:Name"),
        ("1 / 2", "1 / 2"),
    ],
)
def test_paths_are_shortened_and_other_text_stays(text, shown):
    assert without_folders({"a": [text, 1, None]}) == {"a": [shown, 1, None]}


# modules of the current folder


def test_a_module_that_registers_datasets_is_found_after_installed_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_registration.py").write_text("import safetensors")
    (tmp_path / "safetensors.py").write_text("raise ImportError('of the folder')")
    monkeypatch.delitem(sys.modules, "safetensors")
    with pytest.raises(UserError, match="detectron2"):  # the dataset is unknown, or detectron2 is missing
        import_("detectron2:unknown", tmp_path / "out", register="own_registration")
    assert "own_registration" in sys.modules
