"""Every fault of `faults.py`, and that none of them is forgotten here."""

import pytest
from faults import FAULTS, Scene

QUICK = ("SIGKILL before", "SIGTERM", "two runs", "other settings", "a damaged image")


@pytest.mark.parametrize(
    "title", [title if title.startswith(QUICK) else pytest.param(title, marks=pytest.mark.slow) for title in FAULTS]
)
def test_nothing_is_lost(title, shapes_data, tmp_path):
    FAULTS[title](Scene(shapes_data, tmp_path))
