"""Writing a benchmark's result: to the terminal, and to a file with the versions and the machine."""

import json
from pathlib import Path
from typing import Any

from dimaskdino.runs.folder import environment
from dimaskdino.utils.files import write_text


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


def save(result: dict[str, Any], output: Path | None) -> None:
    """Write a result as a json file of its own, together with the versions and the machine; nothing without a file."""
    if output:
        write_text(output, json.dumps(result | {"versions": environment()}, indent=1) + "\n")
