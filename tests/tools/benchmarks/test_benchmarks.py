"""The clocks behind the tables of times: every moment belongs to one part, and nothing is left behind."""

import json
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from small import settings

from dimaskdino.config import load_config
from dimaskdino.modeling import Detector, ImageBatch
from dimaskdino.utils.errors import UserError
from tools.benchmarks.dataloader import measure as measure_loading
from tools.benchmarks.gpu_check import BASELINE, MODEL, Case, Step, cases, main, outlook, run
from tools.benchmarks.model import PartClock, measure

ROOT = Path(__file__).parents[3]


def test_parts_add_up_to_the_whole(shapes_data):
    torch.manual_seed(0)
    detector = Detector(settings(shapes_data).model).eval()
    batch = ImageBatch.from_images([torch.randint(0, 256, (3, 64, 64))])
    hooks = sum(len(m._forward_hooks) for m in detector.modules())
    started = time.perf_counter()
    with torch.no_grad(), PartClock(detector, torch.device("cpu")) as clock:
        detector(batch)
        with clock.part("sleep"):
            time.sleep(0.05)
    whole = time.perf_counter() - started
    assert 0.05 <= clock.seconds["sleep"] < 0.2
    assert abs(sum(clock.seconds.values()) - whole) < 0.02
    assert {"backbone", "pixel_decoder", "first_selection", "de_imbalance", "decoder", "heads"} <= set(clock.seconds)
    assert sum(len(m._forward_hooks) for m in detector.modules()) == hooks


def test_measurements_name_their_parts(shapes_data):
    config = settings(shapes_data)
    trained = measure(config, "training", 64, 64, 2, 1)
    assert {"matching and losses", "backward", "clipping and optimizer"} <= set(trained.parts)
    assert min(trained.parts.values()) >= 0
    assert "postprocess" in measure(config, "inference", 64, 64, 0, 1).parts
    in_parts = measure(settings(shapes_data, "train.precision=bf16", "train.accumulate=2"), "training", 64, 64, 2, 1, 3)
    assert (in_parts.images, in_parts.parts_per_step, in_parts.precision) == (3, 2, "bf16")
    assert in_parts.images_per_second == 3 / in_parts.seconds
    loading = measure_loading(config, 6)
    assert set(loading["milliseconds_per_image"]) == {"decode", "masks", "decode and masks", "jitter", "collate"}
    assert loading["images_per_second"] > 0


@pytest.mark.parametrize("dry_run", [False, True])
def test_cases_of_the_gpu_check_are_configurations(dry_run, tmp_path):
    found = [case for step in ("models", "compiled") for case in cases(step, tmp_path, dry_run=dry_run)]
    for case in found:
        file, *arguments = case.command[3:]
        overrides = [a for a in arguments if "=" in a]
        assert load_config(file, overrides).model.backbone.name == "resnet50"
        assert arguments[len(overrides)] == "--task"
    everything = [case for step in get_args(Step) for case in cases(step, tmp_path, dry_run=dry_run)]
    assert len({case.name for case in everything}) == len(everything) > 20


def test_the_gpu_check_goes_on_after_failures_and_resumes(tmp_path, capsys):
    def python(name: str, code: str, seconds: float = 60) -> Case:
        return Case(name, (sys.executable, "-c", code), seconds)

    flag = tmp_path / "mended"
    todo = [
        python("good", "print('something measured')"),
        python("bad", f"import pathlib, sys; sys.exit(not pathlib.Path({str(flag)!r}).exists())"),
        python("slow", "import time; time.sleep(60)", 0.5),
        Case("absent", (str(tmp_path / "no such program"),)),
        python("last", "print('the last one')"),
    ]
    problems = run("operator", todo, tmp_path / "out", 100)
    assert [line.partition(":")[0] for line in problems] == ["bad", "slow", "absent"]
    assert "failed with status 1" in problems[0]
    assert "stopped after 0 s" in problems[1] or "stopped after 1 s" in problems[1]
    log = (tmp_path / "out" / "output.log").read_text()
    assert "something measured" in log
    assert "the last one" in log
    flag.touch()
    assert [line.partition(":")[0] for line in run("operator", todo[:2], tmp_path / "out", 100)] == []
    lines = [json.loads(line) for line in (tmp_path / "out" / "cases.jsonl").read_text().splitlines()]
    assert [(line["case"], line["exit"]) for line in lines] == [
        ("good", 0), ("bad", 1), ("slow", 124), ("absent", 127), ("last", 0), ("bad", 0),
    ]  # fmt: skip
    assert run("operator", [python("late", "")], tmp_path / "out", 0) == ["not run, for want of time: late"]


def test_the_gpu_check_says_what_it_needs(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU that torch can use; --dry-run"):
            main(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="top folder of a checkout"):
        main(tmp_path, dry_run=True)


def test_outlook_of_the_gpu_check():
    def line(config: str, task: str, images: int, seconds: float) -> dict:
        made = {"task": task, "config": config, "images": images, "seconds": seconds, "height": 800}
        return {**made, "precision": "bf16", "compiled": False, "graphs": False}

    measured = [
        line(MODEL, "inference", 8, 4.0),  # measured again below
        line(MODEL, "inference", 8, 2.0),
        line(BASELINE, "inference", 8, 1.6),
        line(MODEL, "training", 2, 0.5),
        line(MODEL, "training", 16, 3.6),
    ]
    ratio, eight, one = outlook(measured, 1000)
    assert "4.0 images/s, MaskDINO 5.0, ratio 0.800" in ratio
    assert eight.endswith("8 such GPUs: 0.1 h")
    assert one.endswith("1 such GPU: 1.0 h")
