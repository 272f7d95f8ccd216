"""Every input of `bad_inputs/` ends in one clear line: no traceback, no hang, no silently wrong number."""

import json
import re
import sys
from pathlib import Path

import pytest
from bad_inputs import BAD_INPUTS, Place, counts, prepare
from small import FILE, overrides

from dimaskdino import UserError, cli
from dimaskdino.data.coco import CocoDataset
from dimaskdino.evaluation.coco_ap import read_truth
from dimaskdino.training.launch import main as train


@pytest.fixture(scope="module")
def finished_run(shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "finished"
    assert train(str(FILE), str(run), overrides(shapes_data)) == 0
    return run


@pytest.mark.parametrize("title", BAD_INPUTS)
def test_one_clear_line(title, shapes_data, finished_run, tmp_path, capfd, monkeypatch):
    case, place = BAD_INPUTS[title], Place(tmp_path, shapes_data, finished_run)
    prepare(place)
    monkeypatch.chdir(tmp_path)
    kept = [path for path in [*finished_run.rglob("*"), *shapes_data.rglob("*")] if path.is_file()]
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in kept}
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["dimaskdino", *map(str, case.make(place))])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output = capfd.readouterr()
    said = [text for text in (output.out + output.err).splitlines() if re.search(case.says, text)]
    assert said, output
    assert ended.value.code == case.code, output
    assert "Traceback" not in output.out + output.err, output
    assert len(said[0]) < 1000
    assert not (tmp_path / "pwned").exists()
    changed = [path for path in kept if (path.stat().st_mtime_ns, path.stat().st_size) != before[path]]
    assert [path for path in changed if path.name not in ("lock", "status.json", "train.log")] == []


@pytest.mark.parametrize("title", [title for title in BAD_INPUTS if title.startswith("json: ")])
def test_check_training_and_evaluation_refuse_the_same(title, shapes_data, tmp_path):
    place = Place(tmp_path, shapes_data, tmp_path)
    BAD_INPUTS[title].make(place)
    messages = []
    for read in (lambda: CocoDataset(tmp_path, "train"), lambda: read_truth(tmp_path / "annotations" / "train.json")):
        with pytest.raises(UserError, match=BAD_INPUTS[title].says) as error:
            read()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_there_are_many_and_the_record_counts_them():
    record = Path(__file__).parent.parent / "docs" / "measurements" / "bad_inputs.json"
    assert json.loads(record.read_text()) == counts(), "run `PYTHONPATH=tests python -m bad_inputs`"
    assert len(BAD_INPUTS) >= 150
