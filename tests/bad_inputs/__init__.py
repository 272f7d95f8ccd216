"""Bad inputs, each given to the command line: one clear line, no traceback, nothing lost.

`test_bad_inputs.py` runs them all. An input is a function of a `Place`, which makes files in an empty folder and
returns the arguments of a command; with it goes what the line must say. `PYTHONPATH=tests python -m bad_inputs` writes
how many there are of each kind to docs/measurements.
"""

from collections import Counter

from bad_inputs import annotations, commands, configurations, images, models  # noqa: F401
from bad_inputs.commands import prepare
from bad_inputs.table import BAD_INPUTS, Place

__all__ = ["BAD_INPUTS", "Place", "counts", "prepare"]

KINDS = {
    "json": "annotation files",
    "image": "images",
    "image of a dataset": "images",
    "setting": "configurations",
    "configuration": "configurations",
    "model": "checkpoint files",
    "convert": "checkpoint files",
    "run": "parameters of notebooks",
}


def counts() -> dict[str, int]:
    """Number of inputs of each kind."""
    kinds = Counter(KINDS.get(title.partition(":")[0], "command lines and paths") for title in BAD_INPUTS)
    return dict(kinds.most_common())
