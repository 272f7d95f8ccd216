"""Every fault of `faults.py`, and that none of them is forgotten here."""

import pytest
from faults import FAULTS, NotPossible, Scene

QUICK = ("SIGKILL before", "SIGTERM to all", "two runs", "other settings", "a damaged image", "a disk that fills")


@pytest.mark.parametrize(
    "title", [title if title.startswith(QUICK) else pytest.param(title, marks=pytest.mark.slow) for title in FAULTS]
)
def test_nothing_is_lost(title, shapes_data, tmp_path):
    try:
        FAULTS[title](Scene(shapes_data, tmp_path))
    except NotPossible as reason:
        pytest.skip(str(reason))


def test_there_are_many():
    assert len(FAULTS) >= 30
