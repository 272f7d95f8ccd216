"""What a person waits for before anything happens: `python -m dimaskdino.benchmarks.starting --output FILE`.

Each command runs several times, in turns, as a process of its own; files are in the system's cache.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import tyro

from dimaskdino.benchmarks.record import save

COMMANDS = {
    "`import torch, torchvision`": ["-c", "import torch, torchvision"],
    "`import dimaskdino`": ["-c", "import dimaskdino"],
    "`dimaskdino --help`": ["-m", "dimaskdino", "--help"],
    "`dimaskdino train --help`": ["-m", "dimaskdino", "train", "--help"],
    "`import dimaskdino; dimaskdino.load`": ["-c", "import dimaskdino; dimaskdino.load"],
    '`dimaskdino.load("dimaskdino-shapes")`': ["-c", "import dimaskdino; dimaskdino.load('dimaskdino-shapes')"],
}
AIMS = dict(zip(COMMANDS, (None, 0.3, 0.3, None, 3.0, None), strict=True))  # seconds


def measure(rounds: int) -> dict[str, dict[str, float | None]]:
    """Seconds of each command: median, fastest and slowest, beside what is aimed at."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            if number:  # the first round fills the cache
                seconds[name].append(time.perf_counter() - started)
    return {
        name: {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times), "aim": AIMS[name]}
        for name, times in seconds.items()
    }


def main(rounds: int = 5, output: Path | None = None) -> None:
    """Time the imports and the help.

    Args:
        rounds: Number of turns; medians are reported.
        output: File for the record, json.
    """
    found = measure(rounds)
    for name, row in found.items():
        print(f"{name}: {row['seconds']:.2f} s, from {row['fastest']:.2f} to {row['slowest']:.2f}")
    save({"commands": found, "rounds": rounds}, output)


if __name__ == "__main__":
    tyro.cli(main)
