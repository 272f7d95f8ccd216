"""Every fault of `faults.py`, and that none of them is forgotten here."""

import json
from pathlib import Path

import pytest
from faults import FAULTS
from scene import NotPossible, Scene

QUICK = ("SIGKILL before", "other settings", "a damaged image", "a disk that fills")


@pytest.mark.parametrize(
    "title", [title if title.startswith(QUICK) else pytest.param(title, marks=pytest.mark.slow) for title in FAULTS]
)
def test_nothing_is_lost(title, shapes_data, tmp_path):
    try:
        FAULTS[title](Scene(shapes_data, tmp_path))
    except NotPossible as reason:
        pytest.skip(str(reason))


def test_there_are_many_and_the_record_has_them_all():
    record = json.loads((Path(__file__).parent.parent / "docs" / "measurements" / "faults.json").read_text())
    assert list(record["faults"]) == list(FAULTS), "run `python tests/faults.py --output docs/measurements/faults.json`"
    assert set(record["faults"].values()) == {"survived"}
    assert len(FAULTS) >= 30
