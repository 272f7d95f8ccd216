"""Resume points: written whole or not at all, the newest ones kept, damaged ones passed over."""

import os
import stat
from pathlib import Path

import pytest
import torch
from test_trainer import run_training

from dimaskdino.training.resume_points import load_resume_point, resume_points, save_resume_point
from dimaskdino.utils.errors import UserError


def state_of(step: int) -> dict:
    model = {"x": torch.full((100,), float(step))}
    return {"model": model, "optimizer": {}, "scaler": {}, "step": step, "config": "{}", "classes": ["a"]}


def steps_in(folder: Path) -> list[int]:
    return [torch.load(file, weights_only=True)["step"] for file in resume_points(folder)]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    for step in (2, 4, 10, 100, 12_000_000):
        save_resume_point(tmp_path, state_of(step), keep)
    assert steps_in(tmp_path) == [12_000_000, 100, 10][:keep]
    assert len(list(tmp_path.iterdir())) == keep


def test_a_training_keeps_as_many_as_it_is_told(shapes_data, tmp_path):
    run = run_training(tmp_path, shapes_data, "train.checkpoint_every=1", "train.keep=4")
    assert steps_in(run.checkpoints) == [6, 5, 4, 3]


def test_resume_points_of_earlier_versions_are_read_and_replaced(tmp_path):
    for name, step in (("last.pt", 4), ("previous.pt", 2)):
        torch.save(state_of(step), tmp_path / name)
    assert load_resume_point(tmp_path)[0]["step"] == 4
    save_resume_point(tmp_path, state_of(6))
    assert [file.name for file in resume_points(tmp_path)] == ["step_0000006.pt", "last.pt"]
    save_resume_point(tmp_path, state_of(8))
    assert steps_in(tmp_path) == [8, 6]


@pytest.mark.parametrize("damage", [b"", b"\0" * 300, b"hello", None])
def test_a_damaged_resume_point_falls_back_to_the_one_before(tmp_path, damage):
    for step in (1, 2):
        save_resume_point(tmp_path, state_of(step))
    newest, before = resume_points(tmp_path)
    newest.write_bytes(newest.read_bytes()[:200] if damage is None else damage)
    state, remark = load_resume_point(tmp_path)
    assert state["step"] == 1
    assert f"{newest} cannot be read as a checkpoint" in remark
    before.write_bytes(b"")
    with pytest.raises(UserError, match="no other resume point is left"):
        load_resume_point(tmp_path)


@pytest.mark.parametrize("missing", ["optimizer", "scaler", "step", "config", "classes"])
def test_an_incomplete_resume_point_falls_back_to_the_one_before(tmp_path, missing):
    save_resume_point(tmp_path, state_of(1))
    save_resume_point(tmp_path, state_of(2))
    newest = resume_points(tmp_path)[0]
    torch.save({key: value for key, value in state_of(2).items() if key != missing}, newest)
    state, remark = load_resume_point(tmp_path)
    assert state["step"] == 1
    assert f"{missing} is missing or damaged" in remark


def test_a_limit_of_the_disk_keeps_what_was_saved(tmp_path):
    resource = pytest.importorskip("resource", reason="this system has no limits of the size of files")
    save_resume_point(tmp_path, state_of(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*File too large.*; step_0000001.pt is kept"):
            save_resume_point(tmp_path, state_of(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.iterdir()] == ["step_0000001.pt"]


def test_what_a_killed_process_left_is_deleted(tmp_path):
    (tmp_path / ".step_0000001.01234567.partial.pt").write_bytes(b"half")
    save_resume_point(tmp_path, state_of(2))
    assert [file.name for file in tmp_path.iterdir()] == ["step_0000002.pt"]


def test_all_files_of_a_run_have_the_same_permissions(shapes_data, tmp_path):
    before = os.umask(0o027)
    try:
        run = run_training(tmp_path, shapes_data)
    finally:
        os.umask(before)
    files = [run.model, *resume_points(run.checkpoints), tmp_path / "config.yaml", tmp_path / "metrics.jsonl"]
    assert {stat.filemode(file.stat().st_mode) for file in files} == {"-rw-r-----"}
