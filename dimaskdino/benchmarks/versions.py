"""An earlier commit and this checkout in turns: `python -m dimaskdino.benchmarks.versions COMMIT --output FILE`.

Every measurement is one process of a version's own benchmark. The versions take turns, so that both meet the same
machine; medians are over the rounds. In every round one large matrix product tells what the processor can do at most.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from dimaskdino.benchmarks.model import Task
from dimaskdino.benchmarks.record import save
from dimaskdino.errors import UserError
from dimaskdino.progress import progress_bar

ROOT = Path(__file__).parents[2]
R50 = "configs/coco/instance-segmentation/dimaskdino_r50_4scale_bs16_12ep.yaml"
# the benchmark's module by the file that has it, the newest first
MODULES = {
    "dimaskdino/benchmarks/model.py": "dimaskdino.benchmarks.model",
    "dimaskdino/evaluation/speed.py": "dimaskdino.evaluation.speed",
}


@dataclass(frozen=True)
class Case:
    """One task of the benchmark: configuration, size of the images, their number, and objects in each."""

    name: str
    config: str
    task: Task
    size: tuple[int, int]
    images: int
    objects: int
    repeat: int


CASES = (
    Case("training step of the demo", "configs/shapes/dimaskdino_r18.yaml", "training", (128, 128), 4, 4, 15),
    Case("inference R50, 480×640", R50, "inference", (480, 640), 1, 7, 3),
    Case("inference R50, 800×1088", R50, "inference", (800, 1088), 1, 7, 2),
    Case("training step R50, 512×512", R50, "training", (512, 512), 1, 7, 2),
)
PRECISIONS = ("fp32", "bf16")
PEAK = """
import sys, time, torch
a = torch.randn(3072, 3072, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[sys.argv[1]])
times = []
for _ in range(6):
    started = time.perf_counter()
    a @ a
    times.append(time.perf_counter() - started)
print(2 * 3072**3 / min(times) / 1e9)
"""


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit.

    Raises:
        UserError: there is no such commit.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        made = subprocess.run(
            ["git", "worktree", "add", "--detach", tree, commit], cwd=ROOT, capture_output=True, text=True
        )
        if made.returncode:
            raise UserError(f"no commit '{commit}' here: {made.stderr.strip().splitlines()[-1]}")
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def environment_of(tree: Path, threads: int) -> dict[str, str]:
    """The variables that let a process import a checkout's own packages, with a number of threads."""
    path = os.pathsep.join([str(tree), str(tree / "ops")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


def measure(tree: Path, case: Case, precision: str, threads: int) -> dict[str, Any]:
    """One run of a checkout's benchmark: the record that it writes.

    Raises:
        RuntimeError: it failed.
    """
    module = next(name for file, name in MODULES.items() if (tree / file).exists())
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "record.jsonl"
        command = [sys.executable, "-m", module, tree / case.config, f"train.precision={precision}"]
        command += ["--task", case.task, "--size", *map(str, case.size), "--images", str(case.images)]
        command += ["--objects", str(case.objects), "--repeat", str(case.repeat), "--output", output]
        done = subprocess.run(command, cwd=tree, env=environment_of(tree, threads), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case.name} failed in {tree}:\n{done.stderr}")
        return json.loads(output.read_text())


def peak(precision: str, threads: int) -> float:
    """GFLOP/s of a matrix product of 3,072², the fastest of six."""
    command = [sys.executable, "-c", PEAK, precision]
    return float(subprocess.run(command, env=environment_of(ROOT, threads), capture_output=True, check=True).stdout)


def compare(before: Path, cases: Sequence[Case], threads: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Every case in every precision and with every number of threads, before and now in turns."""
    jobs = [(case, precision, count) for case in cases for precision in PRECISIONS for count in threads]
    found = []
    for case, precision, count in progress_bar(jobs, "measurements"):
        seen: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
        peaks = []
        for _ in range(rounds):
            peaks.append(peak(precision, count))
            for version, tree in (("before", before), ("now", ROOT)):
                seen[version].append(measure(tree, case, precision, count))
        found.append(
            {
                "case": case.name,
                "precision": precision,
                "threads": count,
                "peak_gflops": statistics.median(peaks),
                "gflop": seen["now"][0]["gflop"],
                "product_seconds": statistics.median(run["product_seconds"] for run in seen["now"]),
                **{version: summary(runs) for version, runs in seen.items()},
            }
        )
    return found


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median, fastest and slowest seconds and the largest memory of some processes that measured the same."""
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "fastest": min(run["fastest"] for run in runs),
        "slowest": max(run["slowest"] for run in runs),
        "peak_memory_gib": max(run["peak_memory_gib"] for run in runs),
    }


def main(
    commit: tyro.conf.Positional[str], threads: tuple[int, ...] = (1, 2), rounds: int = 2, output: Path | None = None
) -> None:
    """Measure a commit and this checkout in turns.

    For example: python -m dimaskdino.benchmarks.versions 07dc08c --threads 1 2

    Args:
        commit: The earlier version.
        threads: Numbers of threads.
        rounds: Number of turns; medians are reported.
        output: File for the record, json.
    """
    with checked_out(commit) as before:
        found = compare(before, CASES, threads, rounds)
    for row in found:
        before, now = row["before"], row["now"]
        print(
            f"{row['case']}, {row['precision']}, {row['threads']} threads: {before['seconds']:.2f} s before, "
            f"{now['seconds']:.2f} s now, {before['seconds'] / now['seconds']:.2f}×"
        )
    able = torch.cpu.get_capabilities()
    instructions = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if able.get(name)]
    save({"commit": commit, "rounds": rounds, "instructions": instructions, "cases": found}, output)


if __name__ == "__main__":
    tyro.cli(main)
