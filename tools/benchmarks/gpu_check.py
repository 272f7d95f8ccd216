"""Everything that only a GPU can tell: `python -m tools.benchmarks.gpu_check FOLDER`.

The check has four steps, the most important first: the operator (build, smoke test, speed), the R50 models, the
compiled models, and the tests with NVIDIA's sanitizer and profiler. A step consists of cases. Every case is a command
whose results are in the folder as soon as they exist; one that fails or takes too long is noted and does not stop the
others. The same command again runs what has not yet succeeded.

In the folder: `cases.jsonl` (how each case went, and the last line that it printed), `output.log` (all that they
printed), `models.jsonl` (a line per measurement of `tools.benchmarks.model`), the operator's measurements,
`ap_PRECISION/layers.json` and `profile.csv`.
"""

import importlib.util
import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro

from dimaskdino.config import load_config
from dimaskdino.modeling.precision import Precision
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.resources import configs_folder

MODEL = "dimaskdino_r50_4scale_bs16_12ep"
BASELINE = "maskdino_r50_4scale_bs16_12ep"
CONFIGS = configs_folder() / "coco" / "instance-segmentation"
BATCH = 16
LEAST_SECONDS = 30
CASE_KEYS = ("task", "precision", "compiled", "graphs", "config", "height", "images")  # of a line of models.jsonl
KERNELS = "^_?(msda_)?(forward|backward)_kernel"  # of the operator, CUDA and Triton, by function name

Step = Literal["operator", "models", "compiled", "tests"]


@dataclass(frozen=True)
class Case:
    """One command of the check.

    Attributes:
        name: in `cases.jsonl`.
        command: program and arguments.
        seconds: most that it may take.
    """

    name: str
    command: tuple[str, ...]
    seconds: float = 300


def cases(
    step: Step, folder: Path, versions: Iterable[str] = (), mmcv: Path | None = None, dry_run: bool = False
) -> list[Case]:
    """The cases of a step, the most important first.

    Args:
        step: its name.
        folder: for the results.
        versions: NAME=FILE of other versions of the kernels, timed beside the operator's and those of
            `ops/benchmarks/variants.py`.
        mmcv: unpacked source distribution of mmcv, for the original kernel in the comparison.
        dry_run: the same commands on the CPU, with small inputs.
    """
    if step == "operator":
        return _operator_cases(folder, versions, mmcv, dry_run)
    if step == "tests":
        return _test_cases(folder, dry_run)
    return _model_cases(folder, compiled=step == "compiled", dry_run=dry_run)


def _pytest(*arguments: str) -> tuple[str, ...]:
    # pytest-benchmark, where it is installed, warns beside workers, and warnings are errors
    return sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *arguments


def _pytest_at_once(*arguments: str) -> tuple[str, ...]:
    """With four workers where pytest-xdist is installed: most of the time goes into compiling Triton kernels."""
    return _pytest(*(("-n", "4") if importlib.util.find_spec("xdist") else ()), *arguments)


def _operator_cases(folder: Path, versions: Iterable[str], mmcv: Path | None, dry_run: bool) -> list[Case]:
    python = sys.executable
    device, backends = ("cpu", "cpu") if dry_run else ("cuda", "cuda or triton")
    benchmark = [python, "-m", "ms_deform_attn.benchmark", "--device", device, "--output", str(folder)]
    if dry_run:
        benchmark += ["--rounds", "1", "--queries", "decoder"]
    else:
        files = runpy.run_path("ops/benchmarks/variants.py")["write"](folder / "variants")
        versions = [*versions, *(f"{name}={file}" for name, file in files.items())]
        benchmark += ["--mmcv", str(mmcv)] if mmcv else []
    benchmark += [x for version in versions for x in ("--kernels", version)]
    smoke = f"({backends}) and (definition or precision or odd_sizes) and not emulated"
    return [
        Case("build the kernels", (python, "-m", "ms_deform_attn", "build", device)),
        Case("smoke test of the operator", _pytest("ops/tests/test_ms_deform_attn.py", "-k", smoke)),
        Case("speed of the operator", tuple(benchmark), 420),
    ]


def _model_cases(folder: Path, compiled: bool, dry_run: bool) -> list[Case]:
    """The paper's test size on both models, a GPU's share of the recipe's batch and all of it, larger batches."""
    commands = [
        (task, size, images, name, precision)
        for task, size, images, name in (
            ("inference", "800 1333", "1", MODEL),
            ("training", "1024 1024", "2", MODEL),
            ("inference", "800 1333", "1", BASELINE),
        )
        for precision in ("fp32", "bf16")
    ]
    if not compiled:
        commands.append(("training", "1024 1024", "16", MODEL, "bf16", "train.accumulate=4"))
        commands.append(("training", "1024 1024", "16", MODEL, "fp32", "train.accumulate=8"))
        for size, images, precision in itertools.product(("800 1333", "1024 1024"), ("1", "8"), ("fp32", "bf16")):
            if (size, images) != ("800 1333", "1"):
                commands.append(("inference", size, images, MODEL, precision))
    found = []
    for task, size, images, name, precision, *more in commands:
        settings = [f"train.precision={precision}", f"train.compile={str(compiled).lower()}", *more]
        if dry_run:
            shape = ["--task", task, "--size", "64", "96", "--images", str(min(int(images), 2)), "--objects", "2"]
        else:
            shape = ["--task", task, "--size", *size.split(), "--images", images]
        command = [sys.executable, "-m", "tools.benchmarks.model", str(CONFIGS / f"{name}.yaml"), *settings]
        command += [*shape, "--repeat", "1" if dry_run else "10", "--output", str(folder / "models.jsonl")]
        label = f"{task}, {images} of {size.replace(' ', 'x')}, {name.partition('_')[0]}, {precision}"
        found.append(Case(label + ", compiled" * compiled, tuple(command)))
        if compiled and task == "inference":
            without = [word for word in command if word != "train.compile=true"]
            found.append(Case(label + ", CUDA graph", (*without, "--graphs")))
    return found


def _test_cases(folder: Path, dry_run: bool) -> list[Case]:
    """Tests, AP in every precision, sanitizers, and a profile of one call of every kernel."""
    operator = "ops/tests/test_ms_deform_attn.py"
    # the emulated kernels, and the CPU kernels under the compiler's sanitizer, need no GPU
    chosen = "definition and reference" if dry_run else "not emulated and not sanitizer"
    found = [
        Case("tests of the operator", _pytest_at_once(operator, "-k", chosen)),
        Case("tests of the model", _pytest_at_once("tests/test_on_a_gpu.py")),
    ]
    if shutil.which("compute-sanitizer"):
        some = _pytest(operator, "-k", "cuda and (odd_sizes or nowhere or borders)")
        for tool in ("memcheck", "racecheck", "initcheck"):
            check = ("compute-sanitizer", "--tool", tool, "--kernel-name", "kns=_kernel", "--error-exitcode", "1")
            found.append(Case(f"compute-sanitizer, {tool}", (*check, *some)))
    evaluate = (sys.executable, "-m", "dimaskdino", "evaluate", "dimaskdino-shapes")
    for precision in ("fp32",) if dry_run else get_args(Precision):
        how = ("--device", "cpu" if dry_run else "cuda", "--precision", precision)
        how += ("--output", str(folder / f"ap_{precision}"))
        found.append(Case(f"AP in {precision}", (*evaluate, *how)))
    if shutil.which("ncu"):
        # the machine's clocks are left alone
        profile = ("ncu", "--kernel-name", f"regex:{KERNELS}", "--set", "full", "--clock-control", "none")
        output = ("--csv", "--page", "raw", "--log-file", str(folder / "profile.csv"))
        calls = (sys.executable, "ops/benchmarks/every_kernel.py")
        found.append(Case("profile of the kernels", (*profile, *output, *calls)))
    return found


def run(step: Step, todo: Iterable[Case], folder: Path, seconds: float) -> list[str]:
    """Run the cases of a step that have not succeeded yet. Returns what failed or was left, for people.

    Args:
        step: its name, for the records.
        todo: the cases.
        folder: for the results.
        seconds: time for all of them; none starts with less than half a minute left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record, log = folder / "cases.jsonl", folder / "output.log"
    lines = record.read_text().splitlines() if record.exists() else []
    done = {line["case"] for line in map(json.loads, lines) if line["exit"] == 0}
    end, problems = time.monotonic() + seconds, []
    for case in todo:
        remaining = end - time.monotonic()
        if case.name in done:
            continue
        if remaining < LEAST_SECONDS:
            problems.append(f"not run, for want of time: {case.name}")
            continue
        print(f"[{step}] {case.name} …", end=" ", flush=True)
        started = time.monotonic()
        with log.open("ab") as file:
            file.write(f"\n=== {case.name}: {' '.join(case.command)}\n".encode())
            file.flush()
            code, why = _run(case.command, file, min(case.seconds, remaining))
        taken = round(time.monotonic() - started, 1)
        # the log ends with this case's output, at least its own heading
        last = next(filter(None, reversed(log.read_text(errors="replace").splitlines())))
        with record.open("a") as file:
            line = {"step": step, "case": case.name, "exit": code, "seconds": taken, "last": last}
            file.write(json.dumps(line) + "\n")
        print(f"{taken:.0f} s{'' if code == 0 else ', ' + why}", flush=True)
        if code:
            problems.append(f"{case.name}: {why}; see {log}")
    return problems


def _run(command: tuple[str, ...], output: Any, seconds: float) -> tuple[int, str]:
    """The exit status of a command, and what it means."""
    try:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return 124, f"stopped after {seconds:.0f} s"
    except OSError as error:
        return 127, str(error)
    return code, f"failed with status {code}"


def latest(measurements: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Lines of `models.jsonl`, without those whose case was measured again later."""
    return list({tuple(row[key] for key in CASE_KEYS): row for row in measurements}.values())


def outlook(measurements: Iterable[Mapping[str, Any]], steps: int) -> list[str]:
    """Ratio of the two models' speeds, and the time of a schedule.

    Args:
        measurements: lines of `models.jsonl`.
        steps: of the schedule, with a batch of 16.

    Returns:
        Lines of text. The time on several GPUs is that of each one's share, without communication.
    """
    found = {tuple(row[key] for key in CASE_KEYS): row["seconds"] for row in latest(measurements)}
    lines = []
    for (task, precision, compiled, graphs, config, height, images), seconds in found.items():
        how = f"{precision}{', compiled' * compiled}{', CUDA graph' * graphs}"
        baseline = found.get((task, precision, compiled, graphs, BASELINE, height, images))
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
    folder: tyro.conf.Positional[Path],
    steps: tuple[Step, ...] = get_args(Step),
    minutes: float = 8,
    kernels: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=FILE ...")] = (),
    mmcv: Path | None = None,
    dry_run: bool = False,
) -> int:
    """Measure and test on a GPU, in steps that can be interrupted and resumed.

    Example: python -m tools.benchmarks.gpu_check build/gpu --steps operator models

    Args:
        folder: For the results.
        steps: What to run, in this order.
        minutes: Time for each step. What is left runs with the next call.
        kernels: Other versions of csrc/cuda.cu to time beside it.
        mmcv: Unpacked source distribution of mmcv, for the original kernel of Deformable DETR in the comparison.
        dry_run: Run the same commands on the CPU, with small inputs and without compiling the models; results in a
            folder of their own, dry_run.
    """
    if not torch.cuda.is_available() and not dry_run:
        raise UserError("no GPU that torch can use; --dry-run tries the commands on the CPU")
    if not Path("ops", "tests").is_dir():
        raise UserError("run this in the top folder of a checkout, which has the tests")
    if dry_run:
        folder = folder / "dry_run"  # what ran there has not run on a GPU
        # one thread: two wait for each other on a machine that does something else
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    problems = []
    for step in steps:
        problems += run(step, cases(step, folder, kernels, mmcv, dry_run), folder, 60 * minutes)
    measured = folder / "models.jsonl"
    measurements = map(json.loads, measured.read_text().splitlines()) if measured.exists() else []
    schedule = load_config(CONFIGS / f"{MODEL}.yaml").schedule
    print("\n".join([f"results: {folder}", *([] if dry_run else outlook(measurements, schedule.steps)), *problems]))
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(main))
    except UserError as error:
        sys.exit(str(error))
