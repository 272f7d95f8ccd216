"""Response time of the explorers: `python -m dimaskdino.benchmarks.explorers`.

From the change of a control to the new picture, in this process, without drawing it in a browser.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from dimaskdino.course.lesson import begin
from dimaskdino.viz.architecture import FLOWS
from dimaskdino.viz.explorers import (
    Explorer,
    explore_architecture,
    explore_curves,
    explore_guidance,
    explore_layers,
    explore_sampling,
    explore_selection,
    explore_true_boxes,
)


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
    """The explorers with the course's models, by name, and changes of their controls."""
    lesson, baseline = begin("notebooks/models/dimaskdino"), begin("notebooks/models/maskdino")
    looks = lesson.looks(6)
    runs = {"MaskDINO": baseline.layerwise_ap(), "DI-MaskDINO": lesson.layerwise_ap()}
    images = [("image", i) for i in (1, 2, 3, 4, 5, 0)]
    stages = [("stage", name) for name in looks[0].predictions.stages]
    return {
        "layers": (explore_layers(looks), [*images, *stages, *(("threshold", x / 10) for x in (1, 2, 4, 5))]),
        "selection": (explore_selection(looks), [*images, *(("k1", k) for k in range(10, 80, 10))]),
        "sampling": (
            explore_sampling(looks),
            [*images, *(("query", q) for q in range(1, 9)), ("head", 0), ("layer", 1)],
        ),
        "architecture": (explore_architecture(looks), [*images, *(("place", name) for name in FLOWS)]),
        "true boxes": (explore_true_boxes(lesson.samples(6)), [*images, ("formula", "bitmask"), ("formula", "no")]),
        "guidance": (explore_guidance(looks), [*images, *(("token", t) for t in range(2, 10))]),
        "curves": (
            explore_curves(runs),
            [("names", names) for names in (("MaskDINO",), ("DI-MaskDINO",), tuple(runs)) * 3],
        ),
    }


def main() -> None:
    for name, (explorer, changes) in explorers().items():
        times = seconds(explorer, changes)
        print(f"{name:<10} median {statistics.median(times):.2f} s, slowest {max(times):.2f} s of {len(times)}")


if __name__ == "__main__":
    main()
