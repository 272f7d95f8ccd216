"""Archives of runs: they hold all numbers of the tables, and stand for run folders."""

import shutil

import numpy as np
import pytest
from study_files import ROOT, write_run, write_study, write_training

from dimaskdino.studies.runner import plan_study
from dimaskdino.studies.runs import archive_runs, load_runs
from dimaskdino.studies.study import load_study
from dimaskdino.utils.errors import UserError

ARCHIVES = ROOT / "notebooks" / "studies"


@pytest.fixture
def study(tmp_path):
    """A study of two seeds, of which `a` was run with both and `b` with the first."""
    file = write_study(tmp_path, seeds=[0, 1])
    for variant, seed, box in (("a", 0, 30.25), ("a", 1, 1 / 3), ("b", 0, 32.5)):
        samples = {"decoder.2/box": [box, box + 0.1], "decoder.2/mask": [box, box + 0.2]} if variant == "a" else None
        run = write_run(tmp_path, variant, seed, (10.0, 13.0), (box, None), samples)
        write_training(run, file, variant, seed, [(10, 1.0, 2.0, 0.5), (20, None, None, 1.5)])
    return load_study(file)


def test_an_archive_stands_for_run_folders(study, tmp_path):
    before = load_runs(tmp_path, ["b", "none", "a"])
    assert {variant: list(runs) for variant, runs in before.items()} == {"b": [0], "a": [0, 1]}
    assert before["a"][0].validations == (
        {"decoder.1": {"box": 0.5, "mask": 1.0}, "decoder.2": {"box": 1.0, "mask": 2.0}},
        {"decoder.1": {"box": 1.5, "mask": 1.0}, "decoder.2": {"box": None, "mask": None}},
    )
    file = archive_runs(tmp_path)
    assert "somebody" not in file.read_text()
    shutil.rmtree(tmp_path / "runs")
    after = load_runs(tmp_path, ["b", "none", "a"])
    assert list(after) == ["b", "a"]
    for variant, runs in before.items():
        for seed, run in runs.items():
            archived = after[variant][seed]
            assert (archived.result, archived.validations) == (run.result, run.validations)
            if run.samples is None:
                assert archived.samples is None
                continue
            assert archived.samples.images == run.samples.images
            for name, values in run.samples.samples.items():
                np.testing.assert_array_equal(archived.samples.samples[name], values)


def test_a_study_goes_on_from_an_archive(study, tmp_path):
    archive_runs(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("runs.jsonl", "bootstrap.npz"):
        shutil.copyfile(tmp_path / name, elsewhere / name)
    plan = plan_study(study, "tiny", [], elsewhere)
    assert [run.title for run in plan.missing] == ["B, seed 1"]
    with pytest.raises(UserError, match=r"runs.jsonl holds a run with other settings \(model.decoder.layers\)"):
        plan_study(study, "tiny", [], elsewhere, ["model.decoder.layers=3"])
    # a run folder takes precedence, and archiving again keeps what only the archive has
    run = write_run(elsewhere, "a", 0, (10.0, 13.0), (50.0, None))
    write_training(run, elsewhere.parent / "study.yaml", "a", 0)
    assert load_runs(elsewhere, ["a"])["a"][0].result.last.box.AP == 50
    archive_runs(elsewhere)
    shutil.rmtree(elsewhere / "runs")
    runs = load_runs(elsewhere, ["a", "b"])
    assert {variant: [run.result.last.box.AP for run in by_seed.values()] for variant, by_seed in runs.items()} == {
        "a": [50, 1 / 3],
        "b": [32.5],
    }
    assert runs["a"][0].samples is None


def test_a_start_is_trained_only_for_seeds_with_missing_runs(tmp_path):
    shapes = ROOT / "configs" / "shapes"
    scales = {"tiny": str(shapes / "miniature.yaml")}
    file = write_study(tmp_path, scales=scales, starts={"tiny": str(shapes / "miniature_start.yaml")}, seeds=[0, 1])
    for variant in "ab":
        run = write_run(tmp_path, variant, 0, (1.0, 1.0), (1.0, 1.0))
        write_training(run, file, variant, 0, changes=["train.weights=another/folder/runs/start_0"])
    archive_runs(tmp_path)
    shutil.rmtree(tmp_path / "runs")
    plan = plan_study(load_study(file), "tiny", [], tmp_path)
    assert [run.title for run in plan.missing] == ["start, seed 1", "A, seed 1", "B, seed 1"]


def test_damaged_archives_are_refused(study, tmp_path):
    file = archive_runs(tmp_path)
    text = file.read_text()
    file.write_text(text[:-200])
    with pytest.raises(UserError, match=r"runs.jsonl, line 3: .*copy the file again"):
        load_runs(tmp_path, ["a"])
    file.write_text(text.replace('"stages"', '"steps"'))
    with pytest.raises(UserError, match=r"runs.jsonl, a_0: damaged"):
        load_runs(tmp_path, ["a"])
    file.write_text(text)
    (tmp_path / "bootstrap.npz").write_bytes((tmp_path / "bootstrap.npz").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"bootstrap.npz is damaged"):
        load_runs(tmp_path, ["a"])
    (tmp_path / "bootstrap.npz").unlink()
    with pytest.raises(UserError, match=r"runs.jsonl, a_0: damaged"):
        load_runs(tmp_path, ["a"])
