"""Speed of the R50 models on a GPU: `python -m dimaskdino.benchmarks.gpu_check OUTPUT`.

Each line of the output is one measurement of `dimaskdino.benchmarks.model`, with the device's name. A measurement that
fails, for example because memory runs out, is named at the end and does not stop the others. The last lines say what
the measurements mean for the 12-epoch recipe.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from dimaskdino.config import load_config
from dimaskdino.errors import UserError

MODEL = "dimaskdino_r50_4scale_bs16_12ep"
BASELINE = "maskdino_r50_4scale_bs16_12ep"
CONFIGS = Path("configs/coco/instance-segmentation")
BATCH = 16
LIMIT_SECONDS = 300


def cases() -> list[list[str]]:
    """Arguments of `dimaskdino.benchmarks.model`, the most important first.

    The paper's test size on both models, whose ratio it reports; larger batches; a share of the recipe's batch of 16
    as each of 8 GPUs has it; the whole batch on one GPU.
    """
    commands = []
    for name, precision, compiled in itertools.product((MODEL, BASELINE), ("fp32", "bf16"), ("false", "true")):
        commands.append(["inference", "800 1333", "1", name, precision, compiled])
    for size, images, precision in itertools.product(("800 1333", "1024 1024"), ("1", "8"), ("fp32", "bf16")):
        if (size, images) != ("800 1333", "1"):
            commands.append(["inference", size, images, MODEL, precision, "false"])
    for precision, compiled in itertools.product(("fp32", "bf16"), ("false", "true")):
        commands.append(["training", "1024 1024", "2", MODEL, precision, compiled])
    commands.append(["training", "1024 1024", "16", MODEL, "fp32", "false", "train.accumulate=8"])
    commands.append(["training", "1024 1024", "16", MODEL, "bf16", "false", "train.accumulate=4"])
    arguments = []
    for task, size, images, name, precision, compiled, *more in commands:
        settings = [f"train.precision={precision}", f"train.compile={compiled}", *more]
        shape = ["--task", task, "--size", *size.split(), "--images", images]
        arguments.append([str(CONFIGS / f"{name}.yaml"), *settings, *shape])
    return arguments


def outlook(measurements: Iterable[Mapping[str, Any]], steps: int) -> list[str]:
    """Ratio of the two models' speeds, and the time of a schedule.

    Args:
        measurements: lines of the output; later lines replace earlier ones of the same case.
        steps: of the schedule, with a batch of 16.

    Returns:
        Lines of text. The time on several GPUs is that of each one's share, without communication.
    """
    latest = {
        tuple(m[key] for key in ("task", "precision", "compiled", "config", "height", "images")): m["seconds"]
        for m in measurements
    }
    lines = []
    for (task, precision, compiled, config, height, images), seconds in latest.items():
        how = f"{precision}{', compiled' if compiled else ''}"
        baseline = latest.get((task, precision, compiled, BASELINE, height, images))
        if config == MODEL and baseline is not None:
            lines.append(
                f"{task}, {how}, {images} of height {height}: {images / seconds:.1f} images/s, MaskDINO "
                f"{images / baseline:.1f}, ratio {baseline / seconds:.3f} (published: 7.7 / 8.0 = {7.7 / 8.0:.3f})"
            )
        if task == "training" and BATCH % images == 0:
            gpus = BATCH // images
            lines.append(f"{steps:,} steps, {how}, {gpus} such GPU{'s' * (gpus > 1)}: {steps * seconds / 3600:.1f} h")
    return lines


def main(
    output: tyro.conf.Positional[Path],
    repeat: Annotated[int, tyro.conf.arg(help="Repetitions after the first; the median is kept.")] = 10,
) -> int:
    """Measure the R50 models on a GPU; each measurement is appended to a file, a line of json each."""
    if not torch.cuda.is_available():
        raise UserError("no GPU that torch can use")
    failed = []
    todo = cases()
    for number, arguments in enumerate(todo, start=1):
        command = [sys.executable, "-m", "dimaskdino.benchmarks.model", *arguments]
        command += ["--repeat", str(repeat), "--output", str(output)]
        print(f"[{number}/{len(todo)}] {' '.join(arguments[1:])}", flush=True)
        try:
            subprocess.run(command, check=True, timeout=LIMIT_SECONDS)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            failed.append(f"{' '.join(arguments)}: {error}")
    measurements = map(json.loads, output.read_text().splitlines()) if output.exists() else []
    schedule = load_config(CONFIGS / f"{MODEL}.yaml").schedule
    lines = [f"written: {output}", *outlook(measurements, schedule.steps), *(f"failed: {line}" for line in failed)]
    print("\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(main))
    except UserError as error:
        sys.exit(str(error))
