"""All benchmarks, one after the other: `make benchmark`, or `python -m tools.benchmarks STEP …`.

Each step writes its record, of which README and docs are made. The machine should do nothing else meanwhile.
"""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from dimaskdino.runs.processes import project_root
from dimaskdino.utils.errors import UserError


@dataclass(frozen=True)
class Step:
    """One benchmark.

    Attributes:
        title: what it measures.
        command: what is run, after `python`.
        needs: packages without which a part of it is left out.
    """

    title: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def _module(name: str, record: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"tools.benchmarks.{name}", *arguments, "--output", f"docs/measurements/{record}")


STEPS = {
    "operator": Step(
        "deformable attention",
        ("-m", "ms_deform_attn.benchmark", "--output", "ops/benchmarks/results"),
        ("transformers",),
    ),
    "detectors": Step("other detectors with a ResNet-50", _module("detectors", "detectors.json"), ("transformers",)),
    "runtimes": Step(
        "an exported model in other runtimes",
        _module("runtimes", "runtimes.json", "dimaskdino-solids", "notebooks/scenes"),
        ("onnxruntime", "openvino"),
    ),
    "coco_ap": Step("AP and bootstrap at COCO's size", _module("coco_ap", "coco_size.jsonl")),
}


def main(steps: Positional[tuple[str, ...]] = ()) -> None:
    """Run benchmarks and write their tables. All of them take about an hour.

    For example: python -m tools.benchmarks operator detectors

    Args:
        steps: Which ones; all by default.
    """
    unknown = set(steps) - set(STEPS)
    if unknown:
        raise UserError(f"no benchmark '{min(unknown)}'; there are {', '.join(STEPS)}")
    root = project_root()
    failed = [name for name in steps or STEPS if not _run(name, STEPS[name], root)]
    for script in ("tools/records/records.py", "ops/benchmarks/table.py"):
        subprocess.run([sys.executable, root / script], cwd=root, check=True)
    if failed:
        raise UserError(f"without a result: {', '.join(failed)}; the others are written")


def _run(name: str, step: Step, root: Path) -> bool:
    """Run a step and say how it went."""
    print(f"\n{name}: {step.title}", flush=True)
    for package in step.needs:
        if importlib.util.find_spec(package) is None:
            print(f"note: rows that need {package} are left out (pip install {package})", flush=True)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *step.command], cwd=root, check=False)
    print(f"{name}: {'failed' if done.returncode else 'done'} after {(time.perf_counter() - started) / 60:.1f} minutes")
    return not done.returncode


def run(arguments: Sequence[str] | None = None) -> None:
    """The command line, with errors in one line."""
    try:
        tyro.cli(main, args=arguments, prog="python -m tools.benchmarks")
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    run()
