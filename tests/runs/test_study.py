"""Studies: their files, their published numbers, and a small one from start to end."""

import json
from pathlib import Path

import pytest
import yaml
from small import overrides

from dimaskdino.errors import UserError
from dimaskdino.evaluation.coco_ap import AveragePrecision
from dimaskdino.evaluation.layers import LayerwiseAP, StageAP
from dimaskdino.runs.study import load_study, run_study

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
TABLES = json.loads((ROOT / "docs" / "paper_tables.json").read_text())


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_every_row_is_a_configuration_and_has_published_numbers(file):
    study = load_study(file)
    for scale in study.scales:
        configs = [study.config(row, scale).model_dump_json() for row in study.rows]
        assert len(set(configs)) == len(configs)
    for numbers in study.published(TABLES).values():
        assert set(numbers) == {row.name for row in study.rows}
        assert all(10 < ap < 60 for pair in numbers.values() for ap in pair)


def test_rows_with_one_name_are_one_variant():
    seen = {}
    for study in map(load_study, FILES):
        for row in study.rows:
            for scale in study.scales:
                config = study.config(row, scale)
                assert seen.setdefault((row.name, scale), config) == config


def test_published_numbers_are_those_of_the_row():
    study = load_study(ROOT / "configs" / "ablations" / "table_4.yaml")
    numbers = study.published(TABLES)
    for number, row in enumerate(study.rows):
        entry = TABLES["table_4_modules"][number]
        config = study.config(row, "coco").model
        assert (len(config.selection.k) > 1, config.bato.enabled) == (entry["di"], entry["bato"])
        assert numbers["COCO"][row.name] == (entry["coco"]["box"], entry["coco"]["mask"])


def write_study(folder, **changes):
    content = {
        "title": "Two rows",
        "columns": {"X": ""},
        "scales": {"tiny": str(ROOT / "configs" / "shapes" / "dimaskdino_r18.yaml")},
        "rows": [
            {"name": "a", "label": "A", "published": "x"},
            {"name": "b", "label": "B", "published": "x", "settings": {"tiny": ["model.bato.enabled=false"]}},
        ],
    } | changes
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return folder / "study.yaml"


def test_mistakes_are_named(tmp_path):
    row = {"name": "a", "label": "A", "published": "x"}
    with pytest.raises(UserError, match="every row needs a name of its own, got a, a"):
        load_study(write_study(tmp_path, rows=[row, row]))
    study = load_study(write_study(tmp_path))
    with pytest.raises(UserError, match="no scale 'huge', only tiny"):
        study.config(study.rows[0], "huge")
    with pytest.raises(UserError, match="cannot read the study"):
        load_study(tmp_path / "none.yaml")


def result(first, last):
    def stage(box, mask):
        values = dict.fromkeys(AveragePrecision.__dataclass_fields__)
        return StageAP(AveragePrecision(**values | {"AP": box}), AveragePrecision(**values | {"AP": mask}))

    return LayerwiseAP({"decoder.1": stage(*first), "decoder.2": stage(*last)}, 1, "made up")


def test_a_table_of_means_and_deviations(tmp_path):
    study = load_study(write_study(tmp_path))
    for seed, last in enumerate((30.0, 34.0)):
        result((10.0, 13.0), (last, 40.0)).save(tmp_path / f"a_{seed}" / "evaluation" / "layers.json")
    result((0.0, 0.0), (0.0, 0.0)).save(tmp_path / "a_wide_0" / "evaluation" / "layers.json")  # another row's
    measured = study.measured(tmp_path)
    assert {name: len(runs) for name, runs in measured.items()} == {"a": 2}
    a, b = study.table(measured).splitlines()[2:]
    assert a.split() == ["A", "32.0", "±", "2.8", "40.0", "±", "0.0", "+3.0", "±", "0.0", "2"]
    assert b.split() == ["B", "–", "–", "–", "0"]


@pytest.mark.slow
def test_a_study_runs_and_goes_on(shapes_data, tmp_path):
    study, folder = load_study(write_study(tmp_path)), tmp_path / "runs"
    changes = overrides(shapes_data)
    run_study(study, "tiny", [0], folder, changes)
    before = (folder / "a_0" / "checkpoints" / "model.safetensors").stat().st_mtime_ns
    run_study(study, "tiny", [0, 1], folder, changes)
    assert (folder / "a_0" / "checkpoints" / "model.safetensors").stat().st_mtime_ns == before
    assert {name: len(runs) for name, runs in study.measured(folder).items()} == {"a": 2, "b": 2}
    with pytest.raises(UserError, match="other settings than this study's"):
        run_study(study, "tiny", [0], folder, [*changes, "model.decoder.layers=3"])
