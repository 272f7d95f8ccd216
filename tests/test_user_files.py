"""Files of a user: no command removes or replaces what it did not make, be it through a link."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from small import settings, trained_file

import dimaskdino
from dimaskdino import UserError
from dimaskdino.cli.data import bdd100k, check, import_
from dimaskdino.cli.models import convert, evaluate, export, predict
from dimaskdino.cli.training import share
from dimaskdino.evaluation.detections import DetectionStore
from dimaskdino.runs.folder import RunFolder
from dimaskdino.runs.notebooks import run_notebook
from dimaskdino.training.trainer import train
from dimaskdino.utils.files import new_folder, write_atomically, write_text


def content(folder: Path) -> dict[str, str]:
    """Digests of all files below a folder; links are read through."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def model(tmp_path_factory, shapes_data):
    return trained_file(tmp_path_factory.mktemp("model") / "model.safetensors", shapes_data)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two photographs, one of them a PNG."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in (("cat.jpg", "red"), ("dog.png", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / name)
    return folder


def finished_run(folder: Path, data: Path, *changes: str) -> RunFolder:
    run, config = RunFolder(folder), settings(data, *changes)
    with run.running():
        run.write_config(config)
        train(config, run)
    return run


# the two ways to write


def test_a_file_replaces_a_link_and_keeps_what_it_points_to(tmp_path):
    (tmp_path / "photo").write_text("photograph")
    os.link(tmp_path / "photo", tmp_path / "hard")
    (tmp_path / "symbolic").symlink_to(tmp_path / "photo")
    for name in ("hard", "symbolic"):
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "photo").read_text() == "photograph"
    assert len(content(tmp_path)) == 3  # no temporary file is left


def test_files_that_look_temporary_are_kept(tmp_path):
    for name in ("x.partial", "x.partial.txt", ".x.txt.partial"):
        (tmp_path / name).write_text("mine")
    write_text(tmp_path / "x.txt", "new")
    with new_folder(tmp_path / "x"):
        pass
    assert {path.read_text() for path in tmp_path.iterdir() if "partial" in path.name} == {"mine"}


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "no regular file"),
        (tmp_path, "a folder is where"),
        (Path(), "a folder is"),
    ):
        with pytest.raises(UserError, match=message):
            write_atomically(path, lambda partial: partial.write_text("new"))


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write_atomically(tmp_path / "x.txt", fail)
    with pytest.raises(ValueError, match="no"), new_folder(tmp_path / "x") as folder:
        fail(folder / "y")
    assert not list(tmp_path.iterdir())


# imports


def test_an_import_of_a_folder_called_partial(tmp_path, shapes_data):
    source = tmp_path / "animals.partial"
    shutil.copytree(shapes_data, source)
    before = content(source)
    import_(source, tmp_path / "animals")
    assert content(source) == before


def test_an_import_copies_unless_asked_to_link(tmp_path, shapes_data):
    import_(shapes_data, tmp_path / "copied")
    import_(shapes_data, tmp_path / "linked", link=True)
    names = {path.name for path in (tmp_path / "copied").rglob("*.jpg")}
    assert len(names) == 12
    assert {path.stat().st_nlink for path in (tmp_path / "copied").rglob("*.jpg")} == {1}
    assert min(path.stat().st_nlink for path in (tmp_path / "linked").rglob("*.jpg")) > 1


# share


def test_share_beside_a_folder_called_partial(tmp_path, shapes_data):
    run = finished_run(tmp_path / "shared.partial", shapes_data, "schedule.steps=1")
    before = content(run.path)
    share(run.path, tmp_path / "shared")
    assert content(run.path) == before


# predict


def test_predictions_never_replace_photographs(model, photos, tmp_path):
    before = content(photos)
    Image.new("RGB", (64, 64), "green").save(photos / "cat.png")
    before = content(photos)
    for sources in ([photos / "cat.jpg"], [photos]):
        with pytest.raises(UserError, match=r"would be (replaced|overwritten)"):
            predict(str(model), tuple(map(str, sources)), photos)
    with pytest.raises(UserError, match="is an input and would be overwritten"):
        predict(str(model), (str(photos / "dog.png"),), photos, overwrite=True)
    assert content(photos) == before


def test_predictions_go_through_no_link(model, photos, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    os.link(photos / "dog.png", output / "dog.png")
    (output / "cat.png").symlink_to(photos / "cat.jpg")
    before = content(photos)
    with pytest.raises(UserError, match=r"would be replaced.*add --overwrite"):
        predict(str(model), (str(photos),), output)
    assert content(photos) == before
    predict(str(model), (str(photos),), output, overwrite=True)
    assert content(photos) == before
    assert not (output / "cat.png").is_symlink()


def test_a_second_prediction_replaces_the_first_and_nothing_else(model, photos, tmp_path):
    output = tmp_path / "output"
    predict(str(model), (str(photos / "cat.jpg"),), output)
    predict(str(model), (str(photos / "dog.png"),), output)
    predict(str(model), (str(photos),), output)
    Image.new("RGB", (64, 64)).save(photos / "bird.jpg")
    (output / "bird.png").write_text("mine")
    with pytest.raises(UserError, match=r"bird\.png would be replaced"):
        predict(str(model), (str(photos),), output)
    assert (output / "bird.png").read_text() == "mine"


# single files


def test_commands_refuse_to_replace_a_file(model, photos, tmp_path, shapes_data):
    file = photos / "cat.jpg"
    commands = (
        lambda **insist: check(shapes_data, show=file, **insist),
        lambda **insist: export(str(model), photos / "model.pt2", **insist),
    )
    (photos / "model.pt2").write_text("mine")
    before = content(photos)
    for command in commands:
        with pytest.raises(UserError, match="would be replaced; choose another name, or add --overwrite"):
            command()
    assert content(photos) == before
    assert check(shapes_data, show=file, overwrite=True) == 0
    assert file.stat().st_size > 10_000


def test_convert_never_replaces_its_input(tmp_path):
    file = tmp_path / "m.pth"
    torch.save({"x": torch.zeros(1)}, file)
    before = content(tmp_path)
    for insist in (False, True):
        with pytest.raises(UserError, match="would be replaced"):
            convert(file, file, overwrite=insist)
    assert content(tmp_path) == before


def test_bdd100k_keeps_annotations_that_exist(tmp_path):
    file = tmp_path / "annotations" / "instances_val.json"
    write_text(file, "{}")
    with pytest.raises(UserError, match=r"instances_val\.json would be replaced"):
        bdd100k(tmp_path)
    assert file.read_text() == "{}"


def test_an_evaluation_replaces_only_an_evaluation(model, tmp_path, shapes_data):
    (tmp_path / "layers.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"layers\.json would be replaced"):
        evaluate((str(model),), output=tmp_path)
    (tmp_path / "layers.json").unlink()
    for _ in range(2):
        assert evaluate((str(model),), stages=("decoder.2",), output=tmp_path) == 0


def test_kept_detections_replace_no_foreign_files(tmp_path):
    (tmp_path / "000000.safetensors").write_text("mine")
    with pytest.raises(UserError, match="would be replaced"):
        DetectionStore(tmp_path, {"model": {}}, images=3)
    assert (tmp_path / "000000.safetensors").read_text() == "mine"


def test_saving_a_model_into_a_project(model, tmp_path):
    (tmp_path / "README.md").write_text("my project")
    loaded = dimaskdino.load(model, device="cpu")
    with pytest.raises(UserError, match=r"README\.md would be replaced; .* add overwrite=True"):
        loaded.save(tmp_path)
    assert content(tmp_path).keys() == {"README.md"}
    loaded.save(tmp_path, overwrite=True)
    assert "library_name: dimaskdino" in (tmp_path / "README.md").read_text()


def test_a_notebook_is_not_its_own_result(tmp_path):
    notebook = tmp_path / "train.ipynb"
    shutil.copy(Path(__file__).parent.parent / "notebooks" / "runs" / "train.ipynb", notebook)
    before = content(tmp_path)
    with pytest.raises(UserError, match="no result of an earlier run"):
        run_notebook(notebook, tmp_path, {})
    assert content(tmp_path) == before


# trained models


def test_a_shared_run_is_not_trained_again(tmp_path, shapes_data):
    run = finished_run(tmp_path / "run", shapes_data, "schedule.steps=1")
    share(run.path, tmp_path / "shared")
    shutil.rmtree(run.checkpoints / "step_0000001.pt", ignore_errors=True)
    (run.checkpoints / "step_0000001.pt").unlink()
    for path in (run.path, tmp_path / "shared"):
        before = content(path / "checkpoints")
        for call in (RunFolder(path).write_config, lambda config, path=path: train(config, RunFolder(path))):
            with pytest.raises(UserError, match="a trained model without a resume point"):
                call(settings(shapes_data, "schedule.steps=1"))
        assert content(path / "checkpoints") == before


def test_an_average_that_is_asked_for_late_starts_from_the_trained_weights(tmp_path, shapes_data):
    run = finished_run(tmp_path / "run", shapes_data, "schedule.steps=1")
    before = dimaskdino.load(run.path, device="cpu").detector.state_dict()
    finished_run(run.path, shapes_data, "schedule.steps=1", "train.average=0.9")
    after = dimaskdino.load(run.path, device="cpu").detector.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_changed_file_of_settings_is_as_a_changed_setting(tmp_path, shapes_data):
    run = finished_run(tmp_path / "run", shapes_data, "schedule.steps=2")
    text = (run.path / "config.yaml").read_text()
    for old, new in (("seed: 0", "seed: 7"), ("dice: 5.0", "dice: 1.0"), ("steps: 2", "steps: 1")):
        assert old in text
        (run.path / "config.yaml").write_text(text.replace(old, new))
        changed = dimaskdino.load_config(run.path)
        with pytest.raises(UserError, match="holds a run with other settings"):
            train(changed, run)


def test_a_lock_that_was_deleted_stops_the_writing(tmp_path, shapes_data):
    run, config = RunFolder(tmp_path / "run"), settings(shapes_data, "schedule.steps=1")
    for replace in (lambda file: file.unlink(), lambda file: (file.unlink(), file.with_name("x").touch())):
        with pytest.raises(UserError, match="lock was deleted"), run.running():  # noqa: PT012
            replace(run.path / "lock")
            train(config, run)
    assert not run.model.exists()
    assert not list(run.path.rglob("*.pt"))
