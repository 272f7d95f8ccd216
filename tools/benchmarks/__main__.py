"""The benchmarks that need no GPU, one after the other: `make benchmark`, or `python -m tools.benchmarks STEP …`."""

import subprocess
import sys
from typing import Literal

import tyro
from tyro.conf import Positional

from dimaskdino.runs.processes import project_root

Step = Literal["operator", "detectors", "runtimes", "coco_ap"]
COMMANDS: dict[Step, str] = {
    "operator": "ms_deform_attn.benchmark --output ops/benchmarks/results",
    "detectors": "tools.benchmarks.detectors --output docs/measurements/detectors.json",
    "runtimes": "tools.benchmarks.runtimes dimaskdino-solids notebooks/scenes --output docs/measurements/runtimes.json",
    "coco_ap": "tools.benchmarks.coco_ap --output docs/measurements/coco_size.jsonl",
}


def main(steps: Positional[tuple[Step, ...]] = ()) -> int:
    """Run benchmarks on an otherwise idle machine and write their records; all of them take about an hour.

    A benchmark that fails does not stop the next.

    Example: python -m tools.benchmarks operator detectors

    Args:
        steps: All by default: deformable attention, other detectors with a ResNet-50, an exported model in other
            runtimes, AP at COCO's size.
    """
    failed = []
    for step in steps or COMMANDS:
        print(f"\n{step}: python -m {COMMANDS[step]}", flush=True)
        command = [sys.executable, "-m", *COMMANDS[step].split()]
        if subprocess.run(command, cwd=project_root(), check=False).returncode:
            failed.append(step)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m tools.benchmarks"))
