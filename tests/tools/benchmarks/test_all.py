"""All benchmarks from one command, and those that are small enough to run here."""

import json

import pytest

from tools.benchmarks import __main__ as everything
from tools.benchmarks import detectors
from tools.benchmarks.__main__ import STEPS, Step, main


def test_steps_run_in_their_order_and_a_failure_does_not_stop_the_next(monkeypatch, tmp_path, capfd):
    (tmp_path / "docs").mkdir()
    (tmp_path / "ops" / "benchmarks").mkdir(parents=True)
    for script in ("tools/records/records.py", "ops/benchmarks/table.py"):
        (tmp_path / script).write_text(f"print('tables of {script}')")
    steps = {
        "broken": Step("which fails", ("-c", "raise SystemExit(3)")),
        "sound": Step("which does not", ("-c", "print('measured')"), ("no_such_package",)),
    }
    monkeypatch.setattr(everything, "STEPS", steps)
    monkeypatch.setattr(everything, "project_root", lambda: tmp_path)
    with pytest.raises(SystemExit) as stopped:
        everything.run([])
    assert stopped.value.code == "without a result: broken; the others are written"
    printed = capfd.readouterr().out
    for line in (
        "broken: failed after",
        "rows that need no_such_package are left out",
        "measured",
        "sound: done after",
    ):
        assert line in printed
    assert printed.index("sound: done") < printed.index("tables of tools/records/records.py")
    main(("sound",))
    assert "broken" not in capfd.readouterr().out


def test_a_step_that_does_not_exist_is_named():
    with pytest.raises(SystemExit) as stopped:
        everything.run(["nothing"])
    assert stopped.value.code.startswith("no benchmark 'nothing'; there are operator, ")


def test_every_step_is_a_command_that_exists():
    for step in STEPS.values():
        module = step.command[1]
        assert step.command[0] == "-m"
        __import__(module)


@pytest.mark.parametrize("name", ["mask_rcnn", "mask2former"])
def test_another_detector_is_measured(name, monkeypatch):
    if name == "mask2former":
        pytest.importorskip("transformers", reason="pip install transformers")
    found = detectors.measure(name, 64, 96, "fp32", repeat=1)
    assert found["gflop"] > 1
    assert 0 < found["fastest"] <= found["seconds"] <= found["slowest"]
    run = detectors.MODELS[name](detectors.synthetic_sample(64, 96, 3, 80).image, "bf16")
    result = run()
    if name == "mask_rcnn":
        assert result[0]["masks"].shape == (detectors.DETECTIONS, 1, 64, 96)  # the work of a trained model
    else:
        assert result[1].shape[-2:] == (64, 96)


def test_models_take_turns_in_processes_of_their_own(monkeypatch):
    seen = []

    def run(command, env, **options):
        seen.append((command[command.index("--one") + 1], env["OMP_NUM_THREADS"]))
        row = {"seconds": 1.0 + len(seen), "fastest": 1.0, "slowest": 9.0, "peak_memory_gib": 2.0, "gflop": 100.0}
        return type("Done", (), {"returncode": 0, "stdout": f"a note\n{json.dumps(row)}\n"})

    monkeypatch.setattr(detectors.subprocess, "run", run)
    monkeypatch.setattr(detectors, "peak", lambda precision, threads: 50.0)
    rows = detectors.compare(("dimaskdino", "mask_rcnn"), 64, 96, (1,), rounds=2, repeat=1)
    assert seen[:4] == [("dimaskdino", "1"), ("mask_rcnn", "1")] * 2
    assert [row["precision"] for row in rows] == ["fp32", "fp32", "bf16", "bf16"]
    assert rows[0]["seconds"] == 3.0  # the median of 2 and 4
