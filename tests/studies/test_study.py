"""Studies: their files, their published numbers, their report, and a small one from start to end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from scipy.stats import nct
from scipy.stats import t as student
from small import overrides
from study_files import ROOT, write_run, write_study

from dimaskdino.evaluation.bootstrap import BootstrapAP
from dimaskdino.studies.report import StudyReport, paper_tables
from dimaskdino.studies.runner import describe_power, environments, plan_study, run_study
from dimaskdino.studies.study import find_study, load_study
from dimaskdino.utils.errors import UserError

FILES = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
TABLES = paper_tables()


def test_variants_are_configurations_with_published_numbers():
    """Within a study they differ; studies share the runs of a name, so a name stands for one configuration."""
    seen = {}
    for study in map(load_study, FILES):
        for scale in study.scales:
            configs = {variant.name: study.config(variant, scale) for variant in study.variants}
            assert len({config.model_dump_json() for config in configs.values()}) == len(configs)
            for name, config in configs.items():
                assert seen.setdefault((name, scale), config) == config
        for numbers in study.published(TABLES).values():
            assert set(numbers) == {variant.name for variant in study.variants}
            for values in numbers.values():
                assert all(10 < ap < 150 for name, ap in values.items() if not name.endswith("imbalance"))
                assert values["last.imbalance"] == values["last.mask"] - values["last.box"]


def test_published_numbers_are_those_of_the_variant():
    study = load_study(find_study("table_4"))
    for number, variant in enumerate(study.variants):
        entry = TABLES["table_4_modules"][number]
        config = study.config(variant, "coco").model
        assert (len(config.selection.k) > 1, config.bato.enabled) == (entry["di"], entry["bato"])
        found = study.published(TABLES)["COCO"][variant.name]
        assert (found["last.box"], found["last.mask"]) == (entry["coco"]["box"], entry["coco"]["mask"])
    layers = TABLES["figure_1_layer_ap_bdd100k"]["maskdino"]
    found = load_study(find_study("figure_1")).published(TABLES)["BDD100K"]["neither"]
    assert (found["first.box"], found["last.mask"]) == (layers["first"]["box"], layers["last"]["mask"])
    assert found["first.imbalance"] == layers["first"]["mask"] - layers["first"]["box"]


def test_study_files_of_version_0_2_are_read(tmp_path):
    study = load_study(write_study(tmp_path))
    text = (tmp_path / "study.yaml").read_text()
    assert text.count("variants:") == text.count("comparisons:") == 1
    (tmp_path / "old.yaml").write_text(text.replace("variants:", "rows:").replace("comparisons:", "contrasts:"))
    assert load_study(tmp_path / "old.yaml") == study


def test_mistakes_are_named(tmp_path, monkeypatch):
    only = {"name": "a", "label": "A"}
    for changes, message in (
        ({"variants": [only, only]}, "names of variants must be unique, got a, a"),
        ({"variants": [only]}, "unknown variant 'b' in a comparison; the variants are a"),
        ({"comparisons": [{"plus": ["a", "b"], "minus": ["b"]}]}, "b cannot be compared with itself"),
        ({"comparisons": [{"plus": [], "minus": ["b"]}]}, r"comparisons.0.plus"),
        ({"deviation": {"last": 1.0}}, "'last' is not a quantity"),
        ({"report": ["last.boxes"]}, "'last.boxes' is not a quantity. Write STAGE.box"),
        ({"columns": {"COCO": "coco"}}, "set `published` for a, b"),
    ):
        with pytest.raises(UserError, match=message):
            load_study(write_study(tmp_path, **changes))
    study = load_study(write_study(tmp_path))
    with pytest.raises(UserError, match="no scale 'huge', only tiny"):
        study.config(study.variants[0], "huge")
    with pytest.raises(UserError, match=r"cannot read .*none\.yaml"):
        load_study(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="parallel must be at least 1, got 0"):
        plan_study(study, "tiny", [], tmp_path, parallel=0)
    with pytest.raises(UserError, match="unknown setting 'modle'"):
        plan_study(study, "tiny", [], tmp_path, ["modle.heads=3"])
    monkeypatch.chdir(tmp_path)  # a study of the kit is found from anywhere
    assert find_study("table_4") == ROOT / "configs" / "ablations" / "table_4.yaml"
    with pytest.raises(UserError, match=r"no study 'table4': .* table_4, "):
        find_study("table4")


def test_variants_start_from_the_training_of_their_seed(tmp_path):
    shapes = ROOT / "configs" / "shapes"
    scales = {"tiny": str(shapes / "miniature.yaml"), "whole": str(shapes / "dimaskdino_r18.yaml")}
    starts = {"tiny": str(shapes / "miniature_start.yaml")}
    study = load_study(write_study(tmp_path, scales=scales, starts=starts, seeds=[0, 1]))
    start, *others = plan_study(study, "tiny", [1], tmp_path).runs
    assert [run.title for run in (start, *others)] == ["start, seed 1", "A, seed 1", "B, seed 1"]
    assert [run.config.train.weights for run in others] == [tmp_path / "runs" / "start_1"] * 2
    assert [run.config.train.seed for run in (start, *others)] == [1, 1, 1]
    assert [run.is_start for run in plan_study(study, "tiny", [], tmp_path).runs] == [True] * 2 + [False] * 4
    assert len(plan_study(study, "whole", [], tmp_path).runs) == 4
    with pytest.raises(UserError, match="cannot be called start"):
        load_study(write_study(tmp_path, variants=[{"name": "start", "label": "A"}], comparisons=[]))


def test_a_report_of_means_and_differences(tmp_path):
    study = load_study(write_study(tmp_path, seeds=[0, 1, 2]))
    for seed, a, b in ((0, 30.0, 32.0), (1, 34.0, 37.0), (2, 32.0, 36.0)):
        write_run(tmp_path, "a", seed, (10.0, 13.0), (a, 40.0), {"decoder.2/box": [a - 1, a, a + 1]})
        write_run(tmp_path, "b", seed, (10.0, 11.0 + seed), (b, 40.0), {"decoder.2/box": [b + 1, b, b + 1]})
    write_run(tmp_path, "a_wide", 0, (0.0, 0.0), (0.0, 0.0))  # of another variant
    report = StudyReport.of(study, "tiny", tmp_path)
    box, imbalance = study.quantities
    assert report.values("a", box) == {0: 30, 1: 34, 2: 32}
    of_box, of_imbalance = report.results
    assert of_box.comparison.label == "B − A"
    assert (of_box.comparison.quantity, of_imbalance.comparison.quantity) == (box, imbalance)
    # draws of the difference: 3 + (2, 0, 0), so its 2.5 and 97.5 % points by linear interpolation are 3 and 4.9
    assert (of_box.over_images.low, of_box.over_images.high) == pytest.approx((3, 4.9))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.markdown().splitlines() if "|" in line]
    assert lines[2] == ["A", "32.0 ± 2.0", "+3.0 ± 0.0", "3"]
    assert lines[6][:3] == ["B − A", "box AP, last layer", "+3.0"]
    assert lines[6][4] == "+3.0 to +4.9"
    assert lines[6][7] == "3 / 3"
    report.save(tmp_path / "report")
    content = json.loads((tmp_path / "report" / "table.json").read_text())
    assert content["comparisons"][0]["over_images"]["high"] == pytest.approx(4.9)
    assert content["variants"][0]["measured"]["last.box"]["standard_deviation"] == 2


def test_published_differences_of_comparisons():
    study = load_study(find_study("table_4"))
    report = StudyReport(study, "shapes", {}, study.published(TABLES))
    box = {(row["di"], row["bato"]): row["coco"]["box"] for row in TABLES["table_4_modules"]}
    by_label = {}
    for comparison in study.registered:
        if str(comparison.quantity) == "last.box":
            by_label[comparison.label] = report.published_differences(comparison)["COCO"]
    assert by_label["De-Imbalance − neither (MaskDINO)"] == pytest.approx(box[True, False] - box[False, False])
    alone, beside = box[True, False] - box[False, False], box[True, True] - box[False, True]
    assert by_label["De-Imbalance, with and without BATO"] == pytest.approx((alone + beside) / 2)


def test_comparisons_on_other_images_are_refused(tmp_path):
    study = load_study(write_study(tmp_path))
    for variant in "ab":
        write_run(tmp_path, variant, 0, (1.0, 1.0), (1.0, 1.0), {"decoder.2/box": [1, 2]})
    file = tmp_path / "runs" / "a_0" / "evaluation" / "bootstrap.npz"
    BootstrapAP("others", BootstrapAP.load(file).samples).save(file)
    with pytest.raises(UserError, match="different images"):
        StudyReport.of(study, "tiny", tmp_path).markdown()


def test_the_plan_says_what_it_can_find(tmp_path):
    """Two variants of n runs and a deviation σ: standard error σ·√(2/n), at most 2(n − 1) degrees of freedom."""
    study = load_study(write_study(tmp_path, deviation={"last.box": 1.5}))
    title, box, found, imbalance = describe_power(study, "tiny", 8, tmp_path)
    assert title == "minimum detectable effects of 2 comparisons with 8 seeds, at 80 % power:"
    assert box == "  box AP, last layer, for a standard deviation of 1.5 points over trainings:"
    error, critical = 1.5 * (2 / 8) ** 0.5, student.ppf(1 - 0.025 / 2, 14)
    effect = float(found.removeprefix("    B − A: ±").removesuffix(" points"))
    # one decimal is printed, and the plan knows that the degrees of freedom are estimated
    assert 0.78 < nct.sf(critical, 14, effect / error) < 0.86
    assert imbalance.endswith("known after two seeds, or with `deviation` in the study file")
    [line] = describe_power(study, "tiny", 1, tmp_path)
    assert line == "one seed leaves every comparison inconclusive; use at least three"
    for seed, imbalance_of_a in enumerate((1.0, 3.0)):  # variances 2 in a and 0 in b: deviation 1 when pooled
        write_run(tmp_path, "a", seed, (10.0, 10.0 + imbalance_of_a), (30.0, 30.0))
        write_run(tmp_path, "b", seed, (10.0, 11.0), (30.0, 30.0))
    lines = describe_power(study, "tiny", 8, tmp_path)
    assert lines[1] == box  # the file's, although the runs have one, too
    assert lines[3].endswith("for a standard deviation of 1.0 points over trainings:")


@pytest.mark.parametrize(
    ("given", "devices", "parallel", "expected"),
    [
        (None, 3, 3, ["0", "1", "2"]),
        ("4,7", 2, 2, ["4", "7"]),
        ("4,7", 2, 3, ["4", "7", "4"]),
        (None, 0, 2, [None, None]),
    ],
)
def test_runs_that_go_at_once_share_the_gpus_and_cores(monkeypatch, given, devices, parallel, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    found = environments(parallel)
    assert [environment.get("CUDA_VISIBLE_DEVICES") for environment in found] == expected
    assert {environment["OMP_NUM_THREADS"] for environment in found} == {str(12 // parallel)}


@pytest.mark.slow
def test_a_study_runs_and_goes_on_whatever_fails(shapes_data, tmp_path):
    """Two runs at a time, of which one cannot start; then the same again with that repaired, and another seed."""
    study, changes = load_study(write_study(tmp_path)), overrides(shapes_data)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "b_0").touch()  # where a folder should be
    failed = run_study(plan_study(study, "tiny", [0], tmp_path, changes, parallel=2))
    assert list(failed) == ["B, seed 0"]
    done = StudyReport.of(study, "tiny", tmp_path)
    assert {name: list(runs) for name, runs in done.measured.items()} == {"a": [0]}
    assert done.measured["a"][0].samples is not None
    before = (tmp_path / "runs" / "a_0" / "checkpoints" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "runs" / "b_0").unlink()
    plan = plan_study(study, "tiny", [0, 1], tmp_path, changes, parallel=2)
    assert [run.title for run in plan.missing] == ["B, seed 0", "A, seed 1", "B, seed 1"]
    assert "4 runs, 1 done, 3 to do" in plan.describe()
    assert "18 steps, 36 images of training; about 0:00:0" in plan.describe()
    assert run_study(plan) == {}
    assert (tmp_path / "runs" / "a_0" / "checkpoints" / "model.safetensors").stat().st_mtime_ns == before
    report = StudyReport.of(study, "tiny", tmp_path)
    assert {name: list(runs) for name, runs in report.measured.items()} == {"a": [0, 1], "b": [0, 1]}
    assert report.results[0].over_images is not None
    with pytest.raises(UserError, match="holds a run with other settings"):
        plan_study(study, "tiny", [0], tmp_path, [*changes, "model.decoder.layers=3"])
    # a run may be resumed with another learning rate, but its result is not that of this study
    with pytest.raises(UserError, match=r"holds a run with other settings \(optimizer.lr"):
        plan_study(study, "tiny", [0], tmp_path, [*changes, "optimizer.lr=1e-5"])


@pytest.mark.slow
def test_the_command_writes_a_report_and_interrupting_it_loses_nothing(shapes_data, tmp_path):
    study = write_study(tmp_path, variants=[{"name": "a", "label": "A"}], comparisons=[])
    changes = overrides(shapes_data, "schedule.steps=150", "train.checkpoint_every=1")
    command = [sys.executable, "-m", "dimaskdino", "study", str(study), str(tmp_path / "out"), *changes]
    run = tmp_path / "out" / "runs" / "a_0"
    # where the tests run in the background, SIGINT is ignored, and children inherit that
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    started = subprocess.Popen([*command, "--scale", "tiny"], cwd=ROOT, stderr=subprocess.PIPE, **listening)
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    started.communicate(timeout=120)
    while "running" in (run / "status.json").read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    stopped = json.loads((run / "status.json").read_text())
    assert stopped["state"] == "stopped"
    reached = max(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert 0 < reached < 150
    again = subprocess.run([*command, "--scale", "tiny", "--archive"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "1 runs, 0 done, 1 to do" in again.stdout
    assert f"{150 - reached} of 150 steps left" in again.stdout
    assert "| A" in again.stdout
    report = tmp_path / "out" / "study"
    for name in ("study.ipynb", "table.md", "table.json", "variants.png", "layers.png", "../runs.jsonl"):
        assert (report / name).exists()
    assert json.loads((report / "status.json").read_text())["state"] == "finished"
