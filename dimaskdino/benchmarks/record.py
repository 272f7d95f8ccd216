"""Writing a benchmark's result: to the terminal, and as a line of json to a file."""

import json
from pathlib import Path
from typing import Any

from dimaskdino.runs.folder import environment


def report(result: dict[str, Any], output: Path | None, show: bool = True) -> None:
    """Print a result, and append it to a file together with the versions and the machine.

    Args:
        result: the measured values.
        output: file of one line of json per result; None to only print.
        show: print the result as json.
    """
    if show:
        print(json.dumps(result, indent=1))
    if output:
        with output.open("a") as file:
            file.write(json.dumps(result | {"versions": environment()}) + "\n")
