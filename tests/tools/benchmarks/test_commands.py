"""All benchmarks from one command, and the comparison of detectors."""

import importlib.util
import json

import pytest

from tools.benchmarks import __main__ as everything
from tools.benchmarks import detectors


def test_a_failure_does_not_stop_the_next_benchmark(monkeypatch, capfd):
    monkeypatch.setattr(everything, "COMMANDS", {"broken": "no_such_module", "sound": "platform --terse"})
    assert everything.main() == 1
    printed = capfd.readouterr().out
    assert printed.index("broken: python -m no_such_module") < printed.index("sound: python -m platform")
    assert printed.splitlines()[-1] == "failed: broken"
    assert everything.main(("sound",)) == 0


def test_every_benchmark_is_a_module():
    for command in everything.COMMANDS.values():
        assert importlib.util.find_spec(command.split()[0])


@pytest.mark.parametrize("name", ["mask_rcnn", "mask2former"])
def test_another_detector_returns_masks_at_the_size_of_the_image(name):
    if name == "mask2former":
        pytest.importorskip("transformers", reason="pip install transformers")
    result = detectors.MODELS[name](detectors.synthetic_sample(64, 96, 80).image, "fp32")()
    if name == "mask_rcnn":
        assert result[0]["masks"].shape == (detectors.DETECTIONS, 1, 64, 96)  # as many as a trained model returns
    else:
        assert result[1].shape[-2:] == (64, 96)


@pytest.mark.slow
def test_detectors_are_timed_in_both_precisions(tmp_path, capsys):
    detectors.main(("dimaskdino",), (64, 96), 1, tmp_path / "detectors.json")
    rows = json.loads((tmp_path / "detectors.json").read_text())["rows"]
    assert [(row["model"], row["precision"]) for row in rows] == [("DI-MaskDINO", "fp32"), ("DI-MaskDINO", "bf16")]
    for row in rows:
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["gflop"] > 1
    assert len(capsys.readouterr().out.splitlines()) == 4  # a table in Markdown
