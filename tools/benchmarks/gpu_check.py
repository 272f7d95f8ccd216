"""Everything that only a GPU can show: `python -m tools.benchmarks.gpu_check FOLDER`.

The check has four steps, the most important first: the operator (build, smoke test, speed), the R50 models, the
compiled models, and the tests with NVIDIA's sanitizer and profiler. A step consists of cases. Every case is a command
whose results are in the folder as soon as they exist; one that fails or takes too long does not stop the others. The
same command again runs what has not succeeded yet.

In the folder: `summary.md` (speed of the models, AP), `cases.jsonl` (how each case went),
`output.log` (the output of all cases), `models.jsonl` (a line per measurement of `tools.benchmarks.model`), the
operator's measurements, `ap_PRECISION/layers.json` and `profile.csv`.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro

from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.modeling.precision import Precision
from dimaskdino.utils.errors import UserError

MODEL = "dimaskdino_r50_4scale_bs16_12ep"
BASELINE = "maskdino_r50_4scale_bs16_12ep"
LEAST_SECONDS = 30
KERNELS = "^_?(msda_)?(forward|backward)_kernel"  # of the operator, CUDA and Triton, by function name
OPERATOR_TESTS = "ops/tests/test_ms_deform_attn.py"

Step = Literal["operator", "models", "compiled", "tests"]


@dataclass(frozen=True)
class Case:
    """One command of the check.

    Attributes:
        name: in `cases.jsonl`.
        command: program and arguments.
        seconds: the time limit.
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
        versions: NAME=FILE of other versions of the kernels, timed beside the operator's.
        mmcv: unpacked source distribution of mmcv, for the original kernel in the comparison.
        dry_run: the same commands on the CPU, with small inputs.
    """
    if step == "operator":
        return _operator_cases(folder, versions, mmcv, dry_run)
    if step == "tests":
        return _test_cases(folder, dry_run)
    return _model_cases(folder, step == "compiled", dry_run)


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", module, *arguments


def _pytest(*arguments: str) -> tuple[str, ...]:
    # pytest-benchmark, where it is installed, warns beside workers, and warnings are errors
    return _python("pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *arguments)


def _operator_cases(folder: Path, versions: Iterable[str], mmcv: Path | None, dry_run: bool) -> list[Case]:
    device, backends = ("cpu", "cpu") if dry_run else ("cuda", "cuda or triton")
    benchmark = ["--device", device, "--output", str(folder)]
    if dry_run:
        benchmark += ["--rounds", "1", "--queries", "decoder"]
    elif mmcv:
        benchmark += ["--mmcv", str(mmcv)]
    for version in versions:
        benchmark += ["--kernels", version]
    smoke = f"({backends}) and (definition or precision or odd_sizes) and not emulated"
    return [
        Case("build the kernels", _python("ms_deform_attn", "build", device)),
        Case("smoke test of the operator", _pytest(OPERATOR_TESTS, "-k", smoke)),
        Case("speed of the operator", _python("ms_deform_attn.benchmark", *benchmark), 420),
    ]


def _model_cases(folder: Path, compiled: bool, dry_run: bool) -> list[Case]:
    """Both models at the paper's test size, a GPU's share of the recipe's batch and all of it, and larger batches."""
    found = []

    def add(task: str, size: str, images: int, config: str, precision: str, *arguments: str) -> None:
        shape = ["--size", *size.split(), "--images", str(images), "--repeat", "10"]
        if dry_run:
            shape = ["--size", "64", "96", "--images", str(min(images, 2)), "--repeat", "1"]
        name = f"{task}, {images} of {size.replace(' ', 'x')}, {config.partition('_')[0]}, {precision}"
        command = [f"coco/instance-segmentation/{config}", f"train.precision={precision}", *arguments]
        command += ["--task", task, *shape, "--output", str(folder / "models.jsonl")]
        kind = ", CUDA graph" if "--graphs" in command else ", compiled" if "train.compile=true" in command else ""
        found.append(Case(name + kind, _python("tools.benchmarks.model", *command)))

    more = ["train.compile=true"] if compiled else []
    for precision in ("fp32", "bf16"):
        for config in (MODEL, BASELINE):
            add("inference", "800 1333", 1, config, precision, *more)
            if compiled:
                add("inference", "800 1333", 1, config, precision, "--graphs")
        add("training", "1024 1024", 2, MODEL, precision, *more)
    if not compiled:
        add("training", "1024 1024", 16, MODEL, "bf16", "train.accumulate=4")
        add("training", "1024 1024", 16, MODEL, "fp32", "train.accumulate=8")
        add("inference", "800 1333", 8, MODEL, "fp32")
        add("inference", "800 1333", 8, MODEL, "bf16")
    return found


def _test_cases(folder: Path, dry_run: bool) -> list[Case]:
    """Tests, AP in every precision, sanitizers, and a profile of one call of every kernel."""
    # the emulated kernels, and the CPU kernels under the compiler's sanitizer, need no GPU
    chosen = "definition and reference" if dry_run else "not emulated and not sanitizer"
    # most of the time goes into compiling Triton kernels
    workers = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    found = [
        Case("tests of the operator", _pytest(*workers, OPERATOR_TESTS, "-k", chosen)),
        Case("tests of the model", _pytest(*workers, "tests/test_on_a_gpu.py")),
    ]
    if shutil.which("compute-sanitizer"):
        some = _pytest(OPERATOR_TESTS, "-k", "cuda and (odd_sizes or nowhere or borders)")
        for tool in ("memcheck", "racecheck", "initcheck"):
            check = ("compute-sanitizer", "--tool", tool, "--kernel-name", "kns=_kernel", "--error-exitcode", "1")
            found.append(Case(f"compute-sanitizer, {tool}", (*check, *some)))
    for precision in ("fp32",) if dry_run else get_args(Precision):
        how = ("--device", "cpu" if dry_run else "cuda", "--precision", precision)
        how += ("--output", str(folder / f"ap_{precision}"))
        found.append(Case(f"AP in {precision}", _python("dimaskdino", "evaluate", "dimaskdino-shapes", *how)))
    if shutil.which("ncu"):
        # the machine's clocks are left alone
        profile = ("ncu", "--kernel-name", f"regex:{KERNELS}", "--set", "full", "--clock-control", "none")
        output = ("--csv", "--page", "raw", "--log-file", str(folder / "profile.csv"))
        calls = (sys.executable, "ops/benchmarks/every_kernel.py")
        found.append(Case("profile of the kernels", (*profile, *output, *calls)))
    return found


def run(step: Step, todo: Iterable[Case], folder: Path, seconds: float) -> list[str]:
    """Run the cases of a step that have not succeeded yet.

    Args:
        step: its name, for the records.
        todo: the cases.
        folder: for the results.
        seconds: time for all of them; none starts with less than half a minute left.

    Returns:
        A line for each case that failed or was not run.
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
            problems.append(f"no time left: {case.name}")
            continue
        print(f"[{step}] {case.name} …", end=" ", flush=True)
        started = time.monotonic()
        with log.open("ab") as file:
            file.write(f"\n=== {case.name}: {' '.join(case.command)}\n".encode())
            file.flush()
            code, why = _run(case.command, file, min(case.seconds, remaining))
        taken = round(time.monotonic() - started, 1)
        with record.open("a") as file:
            line = {"step": step, "case": case.name, "exit": code, "seconds": taken}
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


def summary(folder: Path) -> str:
    """Speed of the models and AP of the shipped model in each precision, from the results in a folder, in Markdown."""
    lines = ["| | seconds (fastest to slowest) | kernels | images per second | memory |", "|---|---|---|---|---|"]
    measured = folder / "models.jsonl"
    rows = {}
    for line in measured.read_text().splitlines() if measured.exists() else ():
        row = json.loads(line)
        kind = ", CUDA graph" if row["graphs"] else ", compiled" if row["compiled"] else ""
        size = f"{row['images']} × {row['height']}×{row['width']}"
        # a later measurement of a case replaces an earlier one
        rows[f"{row['config'].partition('_')[0]}, {row['task']}, {size}, {row['precision']}{kind}"] = row
    for name, row in rows.items():
        busy = "–" if row["busy_seconds"] is None else f"{row['busy_seconds']:.4f}"
        lines.append(
            f"| {name} | {row['seconds']:.4f} ({row['fastest']:.4f} to {row['slowest']:.4f}) | {busy} "
            f"| {row['images_per_second']:.1f} | {row['peak_memory_gib']:.1f} GiB |"
        )
    for file in sorted(folder.glob("ap_*/layers.json")):
        last = list(LayerwiseAP.load(file).stages.values())[-1]
        precision = file.parent.name.removeprefix("ap_")
        lines += ["", f"AP in {precision}, last layer: box {last.box.AP:.1f}, mask {last.mask.AP:.1f}"]
    return "\n".join(lines)


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
        dry_run: Run the same commands on the CPU, with small inputs and without compiling the models; results in the
            subfolder dry_run.
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
    table = summary(folder)
    (folder / "summary.md").write_text(table + "\n")
    print("\n".join([table, "", f"results: {folder}", *problems]))
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(main))
    except UserError as error:
        sys.exit(str(error))
