"""Archives of runs: they have the results of run folders, and replace them."""

import shutil

import numpy as np
import pytest
from study_files import ROOT, write_run, write_study, write_training

from dimaskdino.studies.runner import plan_study
from dimaskdino.studies.runs import archive_runs, load_runs
from dimaskdino.studies.study import load_study
from dimaskdino.utils.errors import UserError


@pytest.fixture
def study(tmp_path):
    """A study of two seeds: `a` was run with both, `b` with the first."""
    file = write_study(tmp_path, seeds=[0, 1])
    for variant, seed, box in (("a", 0, 30.25), ("a", 1, 1 / 3), ("b", 0, 32.5)):
        samples = {"decoder.2/box": [box, box + 0.1], "decoder.2/mask": [box, box + 0.2]} if variant == "a" else None
        write_training(write_run(tmp_path, variant, seed, (10.0, 13.0), (box, None), samples), file, variant, seed)
    return load_study(file)


def test_an_archive_has_the_results_of_run_folders(study, tmp_path):
    before = load_runs(tmp_path, ["b", "none", "a"])
    assert before["a"][0].validations == (
        {"decoder.1": {"box": 0.5, "mask": 1.0}, "decoder.2": {"box": 1.0, "mask": 2.0}},
        {"decoder.1": {"box": 1.0, "mask": 1.0}, "decoder.2": {"box": None, "mask": None}},
    )
    assert "somebody" not in archive_runs(tmp_path).read_text()
    shutil.rmtree(tmp_path / "runs")
    after = load_runs(tmp_path, ["b", "none", "a"])
    assert [(variant, list(runs)) for variant, runs in after.items()] == [("b", [0]), ("a", [0, 1])]
    for variant, seed in (("a", 0), ("a", 1), ("b", 0)):
        run, archived = before[variant][seed], after[variant][seed]
        assert (archived.result, archived.validations) == (run.result, run.validations)
    assert after["b"][0].samples is None
    run, archived = before["a"][1].samples, after["a"][1].samples
    assert archived.images == run.images
    for name, values in run.samples.items():
        np.testing.assert_array_equal(archived.samples[name], values)


def test_a_study_resumes_from_an_archive(study, tmp_path):
    archive_runs(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("runs.jsonl", "bootstrap.npz"):
        shutil.copyfile(tmp_path / name, elsewhere / name)
    assert [run.title for run in plan_study(study, "tiny", [], elsewhere).missing] == ["B, seed 1"]
    with pytest.raises(UserError, match=r"runs.jsonl holds a run with other settings \(model.decoder.layers\)"):
        plan_study(study, "tiny", [], elsewhere, ["model.decoder.layers=3"])
    # a run folder takes precedence, and archiving again keeps runs that only the archive has
    run = write_run(elsewhere, "a", 0, (10.0, 13.0), (50.0, None))
    write_training(run, tmp_path / "study.yaml", "a", 0)
    for _ in range(2):
        runs = load_runs(elsewhere, ["a"])["a"]
        assert [runs[seed].result.last.box.AP for seed in (0, 1)] == [50, 1 / 3]
        assert runs[0].samples is None
        if run.exists():
            archive_runs(elsewhere)
            shutil.rmtree(run)


def test_a_start_is_trained_only_for_seeds_with_missing_runs(tmp_path):
    shapes = ROOT / "configs" / "shapes"
    scales, starts = {"tiny": str(shapes / "miniature.yaml")}, {"tiny": str(shapes / "miniature_start.yaml")}
    file = write_study(tmp_path, scales=scales, starts=starts, seeds=[0, 1])
    for variant in "ab":
        run = write_run(tmp_path, variant, 0, (1.0, 1.0), (1.0, 1.0))
        write_training(run, file, variant, 0, "train.weights=another/folder/runs/start_0")
    archive_runs(tmp_path)
    shutil.rmtree(tmp_path / "runs")
    plan = plan_study(load_study(file), "tiny", [], tmp_path)
    assert [run.title for run in plan.missing] == ["start, seed 1", "A, seed 1", "B, seed 1"]


def test_damaged_archives_are_refused(study, tmp_path):
    file = archive_runs(tmp_path)
    samples, text = tmp_path / "bootstrap.npz", file.read_text()
    for damaged, message in (
        (text[:-200], r"runs.jsonl, line 3: .*copy the file again"),
        (text.replace('"stages"', '"steps"'), r"runs.jsonl, a_0: damaged"),
    ):
        file.write_text(damaged)
        with pytest.raises(UserError, match=message):
            load_runs(tmp_path, ["a"])
    file.write_text(text)
    samples.write_bytes(samples.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"bootstrap.npz is damaged"):
        load_runs(tmp_path, ["a"])
    samples.unlink()
    with pytest.raises(UserError, match=r"runs.jsonl, a_0: damaged"):
        load_runs(tmp_path, ["a"])
