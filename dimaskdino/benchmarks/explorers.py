"""Response time of the explorers: `python -m dimaskdino.benchmarks.explorers`.

From the change of a control to the new picture, in this process, without drawing it in a browser.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from dimaskdino.benchmarks.record import save
from dimaskdino.course.frames import examples
from dimaskdino.viz.architecture import FLOWS
from dimaskdino.viz.explorers import Explorer


def change_all(explorer: Explorer, changes: Sequence[tuple[str, Any]]) -> Iterator[None]:
    """Change a control of an explorer at a time, (name, value); each change draws a new picture."""
    for name, value in changes:
        explorer.controls[name].value = value
        yield


def seconds(explorer: Explorer, changes: Sequence[tuple[str, Any]]) -> list[float]:
    """Seconds to the new picture for each change of a control, (name, value)."""
    times: list[float] = []
    begun = time.perf_counter()
    explorer.picture.observe(lambda change: times.append(time.perf_counter() - begun), names="png")
    for _ in change_all(explorer, changes):
        begun = time.perf_counter()
    return times


def explorers() -> dict[str, tuple[Explorer, list[tuple[str, Any]]]]:
    """The explorers of the course by name, and changes of their controls."""
    images = [("image", i) for i in (1, 2, 3, 4, 5, 0)]
    runs = (("MaskDINO",), ("DI-MaskDINO",), ("MaskDINO", "DI-MaskDINO"))
    made = {name: example.explorer for name, example in examples().items()}
    stages = [("stage", value) for _, value in made["layers"].controls["stage"].options]
    changes: dict[str, list[tuple[str, Any]]] = {
        "layers": [*images, *stages, *(("threshold", x / 10) for x in (1, 2, 4, 5))],
        "selection": [*images, *(("k1", k) for k in range(10, 80, 10))],
        "sampling": [*images, *(("query", q) for q in range(1, 9)), ("head", 0), ("layer", 1)],
        "architecture": [*images, *(("place", name) for name in FLOWS)],
        "true boxes": [*images, ("formula", "bitmask"), ("formula", "no")],
        "guidance": [*images, *(("token", t) for t in range(2, 10))],
        "curves": [("names", names) for names in runs * 3],
    }
    return {name: (explorer, changes[name]) for name, explorer in made.items()}


def main(output: Path | None = None) -> None:
    """Time every explorer.

    Args:
        output: File for the record, json.
    """
    found = {}
    for name, (explorer, changes) in explorers().items():
        times = seconds(explorer, changes)
        found[name] = {"median": statistics.median(times), "slowest": max(times), "changes": len(times)}
        print(f"{name:<12} median {found[name]['median']:.2f} s, slowest {max(times):.2f} s of {len(times)}")
    save({"explorers": found, "threads": torch.get_num_threads()}, output)


if __name__ == "__main__":
    tyro.cli(main)
