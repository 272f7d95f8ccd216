"""Speed beside other programs: `python -m dimaskdino.benchmarks.company --output docs/measurements/company.json`.

A training step of the demo's model and inference of the R50 model are timed on the idle machine and beside 1, 2 and 4
busy programs of the same and of a lower priority. Under each load the ways to choose the threads take several turns,
each in a process of its own. The fair share of a load is the idle time × (cores that all would use) / cores.
"""

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from dimaskdino.benchmarks.model import Task, prepare
from dimaskdino.benchmarks.record import save
from dimaskdino.config import load_config
from dimaskdino.progress import progress_bar
from dimaskdino.resources import find_config
from dimaskdino.threads import share_cores

TASKS: dict[str, tuple[str, Task, tuple[int, int], int, int]] = {  # configuration, task, size, images, objects
    "training step of the demo": ("shapes/dimaskdino_r18", "training", (128, 128), 4, 4),
    "inference R50, 480×640": (
        "coco/instance-segmentation/dimaskdino_r50_4scale_bs16_12ep",
        "inference",
        (480, 640),
        1,
        7,
    ),
}
LOADS = ((0, 0), (1, 0), (2, 0), (4, 0), (2, 10))  # (busy programs, their niceness)
WAYS: dict[str, dict[str, str]] = {
    "as the kit does": {},
    "PyTorch's default": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
}
SECONDS = 4.0
TURNS = 3


def measure(task: str, adaptive: bool) -> float:
    """Median seconds of a task in this process, over `SECONDS` after three repetitions."""
    name, kind, size, images, objects = TASKS[task]
    *_, run = prepare(load_config(find_config(name)), kind, *size, objects, images)
    for _ in range(3):
        run()
    times: list[float] = []
    until = time.monotonic() + SECONDS
    while time.monotonic() < until or len(times) < 3:
        with share_cores() if adaptive else contextlib.nullcontext():
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


@contextlib.contextmanager
def busy_programs(count: int, niceness: int) -> Iterator[None]:
    """Programs that each keep a core busy."""
    command = ["nice", "-n", str(niceness), sys.executable, "-c", "while True: pass"]
    programs = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def in_a_process(task: str, way: str) -> subprocess.Popen[str]:
    """Start a measurement in a process of its own."""
    command = [sys.executable, "-m", "dimaskdino.benchmarks.company", "--task", task, "--way", way]
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return subprocess.Popen(command, env=clean | WAYS[way], stdout=subprocess.PIPE, text=True)


def result_of(process: subprocess.Popen[str]) -> float:
    """The seconds that a process printed.

    Raises:
        RuntimeError: it failed.
    """
    printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the measurement failed with exit status {process.returncode}")
    return float(printed)


def measure_all() -> dict[str, Any]:
    """Every task under every load in every way, and two trainings at once: the seconds of every turn."""
    cores = os.cpu_count() or 1
    record: dict[str, list[dict[str, Any]]] = {}
    for task, (count, niceness) in itertools.product(TASKS, LOADS):
        # inference of the large model in the ways that a user would choose alone: it takes seconds
        ways = list(WAYS) if TASKS[task][1] == "training" else list(WAYS)[:3]
        load = {"busy": count, "niceness": niceness, "share": max(1.0, (cores + count) / cores)}
        record.setdefault(task, []).append({**load, "seconds": {way: [] for way in ways}})
    rounds = [(task, load) for task, loads in record.items() for load in loads for _ in range(TURNS)]
    for task, load in progress_bar(rounds, "turns"):
        with busy_programs(load["busy"], load["niceness"]):
            for way, turns in load["seconds"].items():
                turns.append(result_of(in_a_process(task, way)))
    task = next(iter(TASKS))
    together: list[list[float]] = [[], []]
    for _ in range(TURNS):
        processes = [in_a_process(task, "as the kit does") for _ in together]
        for each, process in zip(together, processes, strict=True):
            each.append(result_of(process))
    return {"cores": cores, "turns": TURNS, "tasks": record, "two_at_once": together}


def main(output: Path | None = None, task: str | None = None, way: str = "as the kit does") -> None:
    """Time a training step and inference beside other programs.

    Args:
        output: File for the record, json.
        task: Measure this task alone, in this process, and print the seconds.
        way: How the threads are chosen.
    """
    if task is not None:
        print(measure(task, adaptive=way == "as the kit does"))
        return
    record = measure_all()
    for name, loads in record["tasks"].items():
        print(name)
        for load in loads:
            cells = ", ".join(f"{way}: {_span(seconds)}" for way, seconds in load["seconds"].items())
            print(f"  {load['busy']} busy programs (nice {load['niceness']}): {cells}")
    print("two trainings at once:", ", ".join(map(_span, record["two_at_once"])))
    save(record, output)


def _span(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    tyro.cli(main)
