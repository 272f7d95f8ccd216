"""Peak memory, and records with the versions of the packages."""

import json
import resource
from pathlib import Path
from typing import Any

from dimaskdino.runs.folder import environment
from dimaskdino.utils.files import write_text


def peak_memory_gib() -> float:
    """Largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def save(result: dict[str, Any], output: Path | None) -> None:
    """Write a result together with the versions and the machine.

    Args:
        result: the measured values.
        output: a `.jsonl` file gets one more line, any other file is replaced; None writes nothing.
    """
    if output is None:
        return
    record = result | {"versions": environment()}
    if output.suffix == ".jsonl":
        with output.open("a") as file:
            file.write(json.dumps(record) + "\n")
    else:
        write_text(output, json.dumps(record, indent=1) + "\n")
