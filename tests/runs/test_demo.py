"""`dimaskdino demo`, with a few images and two steps: it ends with the figure, and a second call says so at once."""

import json
import time

import pytest

from dimaskdino import UserError
from dimaskdino.cli.notebooks import demo
from dimaskdino.runs.folder import RunFolder


def test_the_demo_ends_with_its_figure_and_a_second_call_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ("schedule.steps=2", "schedule.drops=[]", "data.shapes.train=8", "data.shapes.val=4", "loss.points=64")
    folder, settings = tmp_path / "demo", (*small, f"data.root={tmp_path / 'shapes'}", "data.workers=0")
    assert demo(settings, folder) == 0
    printed = capsys.readouterr().out
    assert (folder / "figures" / "two_models.png").stat().st_size > 20_000
    assert (folder / "figures" / "three_models.png").stat().st_size > 20_000
    for run in (folder, folder / "training"):
        assert RunFolder(run).status()["state"] == "finished"
    cached = {file.name for file in (folder / "models").iterdir()}
    assert len(cached) == 2
    assert json.loads((folder / "training" / "evaluation" / "layers.json").read_text())["images"] == 4
    assert (folder / "training" / "train.ipynb").exists()
    assert f"finished: {folder / 'demo.ipynb'}" in printed
    started = time.perf_counter()
    assert demo(settings, folder) == 0
    assert time.perf_counter() - started < 2
    assert printed.endswith(capsys.readouterr().out)
    with pytest.raises(UserError, match=r"other settings \(train\.seed\)"):
        demo((*settings, "train.seed=7"), folder)
    with pytest.raises(UserError, match="optimiser"):
        demo(("optimiser.lr=3",), folder)
