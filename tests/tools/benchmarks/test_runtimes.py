"""Exported models in every runtime that is installed, and the images on which they agree."""

import json
import subprocess
import sys

import pytest
import torch

from tools.benchmarks.runtimes import _same


def test_what_counts_as_equal():
    boxes, masks = torch.zeros(1, 3, 4), torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    wanted = (boxes, torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[1, 2, 3]]), masks)

    def outputs(scores, labels):
        return (boxes, torch.tensor([scores]), torch.tensor([labels]), masks)

    assert _same(outputs([0.90005, 0.5, 0.5], [1, 2, 3]), wanted)
    assert _same(outputs([0.9, 0.5, 0.5], [1, 3, 2]), wanted)  # rounding may exchange the last two
    assert not _same(outputs([0.9, 0.5, 0.5], [2, 1, 3]), wanted)
    assert not _same(outputs([0.9, 0.5, 0.4], [1, 2, 3]), wanted)


@pytest.mark.slow
def test_a_model_is_timed_in_every_runtime(shapes_data, tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install 'dimaskdino[onnx]'")
    images, output = shapes_data / "images" / "val", tmp_path / "runtimes.json"
    command = [sys.executable, "-m", "tools.benchmarks.runtimes", "dimaskdino-shapes", images, "--count", "2"]
    done = subprocess.run([*command, "--output", output], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    rows = record["runtimes"]
    assert {"PyTorch, compiled operator", "PyTorch, plain operators", "ONNX Runtime"} <= set(rows)
    assert all(row["low"] <= row["seconds"] <= row["high"] for row in rows.values())
    assert rows["PyTorch, compiled operator"]["equal"] == record["images"] == 2
