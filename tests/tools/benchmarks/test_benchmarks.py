"""Time by part, data loading, and the check on a GPU."""

import json
import shutil
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
from tools.benchmarks.gpu_check import Case, Step, cases, main, run, summary
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
        clock.start("sleep")
        time.sleep(0.05)
    whole = time.perf_counter() - started
    assert 0.05 <= clock.seconds["sleep"] < 0.2
    assert abs(sum(clock.seconds.values()) - whole) < 0.02
    assert {"backbone", "pixel_decoder", "de_imbalance", "decoder", "heads"} <= set(clock.seconds)
    assert sum(len(m._forward_hooks) for m in detector.modules()) == hooks


def test_measurements_name_their_parts(shapes_data):
    config = settings(shapes_data)
    trained = measure(config, "training", 64, 64, 1)
    assert {"matching and losses", "backward", "clipping and optimizer"} <= set(trained["parts"])
    assert min(trained["parts"].values()) >= 0
    assert trained["gflop"] > 0
    assert "postprocess" in measure(config, "inference", 64, 64, 1)["parts"]
    in_parts = measure(settings(shapes_data, "train.precision=bf16", "train.accumulate=2"), "training", 64, 64, 1, 3)
    assert (in_parts["images"], in_parts["parts_per_step"], in_parts["precision"]) == (3, 2, "bf16")
    assert in_parts["images_per_second"] == 3 / in_parts["seconds"]
    loading = measure_loading(config, 6)
    assert set(loading["milliseconds_per_image"]) == {"decode", "sample", "collate"}
    assert loading["images_per_second"] > 0


@pytest.mark.parametrize("dry_run", [False, True])
def test_cases_of_the_gpu_check_are_configurations(dry_run, tmp_path):
    found = [case for step in ("models", "compiled") for case in cases(step, tmp_path, dry_run=dry_run)]
    for case in found:
        file, *arguments = case.command[3:]
        overrides = [a for a in arguments if "=" in a]
        assert load_config(file, overrides).model.backbone.name == "resnet50"
        assert "--task" in arguments[len(overrides) :]
    everything = [case for step in get_args(Step) for case in cases(step, tmp_path, dry_run=dry_run)]
    assert len({case.name for case in everything}) == len(everything) > 20


def test_the_gpu_check_goes_on_after_failures_and_resumes(tmp_path, capsys):
    def python(name: str, code: str, seconds: float = 60) -> Case:
        return Case(name, (sys.executable, "-c", code), seconds)

    flag = tmp_path / "repaired"
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
    assert run("operator", [python("late", "")], tmp_path / "out", 0) == ["no time left: late"]


def test_the_gpu_check_says_what_it_needs(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU that torch can use; --dry-run"):
            main(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="top folder of a checkout"):
        main(tmp_path, dry_run=True)


def test_the_gpu_check_ends_with_a_table(tmp_path):
    def row(precision: str, seconds: float) -> dict:
        made = {"config": "dimaskdino_r50_4scale", "task": "inference", "images": 8, "height": 800, "width": 1333}
        made |= {"precision": precision, "compiled": False, "graphs": precision == "bf16", "busy_seconds": 0.1}
        made |= {"seconds": seconds, "fastest": seconds, "slowest": seconds}
        return {**made, "images_per_second": 8 / seconds, "peak_memory_gib": 1.5}

    rows = [row("fp32", 4.0), row("bf16", 1.0), row("fp32", 2.0)]  # fp32 was measured again
    (tmp_path / "models.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    shutil.copytree(ROOT / "notebooks" / "models" / "dimaskdino" / "evaluation", tmp_path / "ap_bf16")
    text = summary(tmp_path)
    assert "| dimaskdino, inference, 8 × 800×1333, fp32 | 2.0000 (2.0000 to 2.0000) | 0.1000 | 4.0 | 1.5 GiB |" in text
    assert "bf16, CUDA graph | 1.0000" in text
    assert "4.0000" not in text
    assert "AP in bf16, last layer: box 69.4, mask 72.6" in text
