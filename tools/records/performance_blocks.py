"""The tables of performance.md."""

import statistics
from typing import Any, get_args

from dimaskdino.config import load_config
from dimaskdino.modeling.precision import Precision
from tools.records.formats import seconds
from tools.records.sources import MODELS, average_precisions, course_models, measured


def company() -> str:
    """Seconds beside other programs, and how many times the fair share they are."""
    record = measured("company.json")
    lines = []
    spreads = []
    for task, loads in record["tasks"].items():
        idle, ways = statistics.median(loads[0]["seconds"]["PyTorch's default"]), list(loads[0]["seconds"])
        lines += [f"| {task} | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
        for load in loads:
            busy, lower = load["busy"], " of lower priority" if load["niceness"] else ""
            name = f"beside {busy} busy program{'s' * (busy > 1)}{lower}" if busy else "idle machine"
            medians = [statistics.median(turns) for turns in load["seconds"].values()]
            cells = [f"{s:.2f} s ({s / idle / load['share']:.1f}×)" for s in medians]
            spreads += [max(turns) / min(turns) for turns in load["seconds"].values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    alone = statistics.median(record["tasks"]["training step of the demo"][0]["seconds"]["as the kit does"])
    both = [statistics.median(turns) for turns in record["two_at_once"]]
    lines += [
        f"Medians of {record['turns']} turns; the slowest turn took {statistics.median(spreads):.1f} times as long as "
        f"the fastest in the median cell, and {max(spreads):.1f} times in the worst.",
        "",
        f"Two trainings at once on {record['cores']} cores: {' and '.join(f'{s:.2f}' for s in both)} s per step, "
        f"{' and '.join(f'{s / alone:.1f}' for s in both)} times the step of one alone.",
    ]
    return "\n".join(lines)


def versions() -> str:
    """An earlier commit and this version in turns, and what part of the processor's peak inference reaches."""
    record = measured("versions.json")
    lines = [
        f"Commit {record['commit']} and this version in turns, PyTorch {record['versions']['packages']['torch']}, "
        f"one processor with {', '.join(record['instructions'])}:",
        "",
        "| | precision | threads | before | now | times as fast | memory before, now | part of the peak "
        "| products alone, part of the peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["cases"]:
        before, now = row["before"], row["now"]
        spans = (f"{r['seconds']:.2f} s ({r['fastest']:.2f} to {r['slowest']:.2f})" for r in (before, now))
        memory = f"{before['peak_memory_gib']:.1f}, {now['peak_memory_gib']:.1f} GiB"
        part, alone = (
            f"{row['gflop'] / taken / row['peak_gflops']:.0%}" for taken in (now["seconds"], row["product_seconds"])
        )
        lines.append(
            f"| {row['case']} | {row['precision']} | {row['threads']} | {' | '.join(spans)} | "
            f"{before['seconds'] / now['seconds']:.2f} | {memory} | {part} | {row['product_seconds']:.2f} s, {alone} |"
        )
    peaks = {(row["precision"], row["threads"]): row["peak_gflops"] for row in record["cases"]}
    told = ", ".join(f"{peak:,.0f} in {kind} with {n}" for (kind, n), peak in sorted(peaks.items()))
    lines += ["", f"Peak: one matrix product of 3,072², in GFLOP/s: {told} threads."]
    return "\n".join(lines)


def aims() -> str:
    """What the aims of the performance log leave for everything that is not a product."""
    lines = [
        "| | precision | threads | aim | products alone | left for all else | all else takes |",
        "|---|---|---|---|---|---|---|",
    ]
    part = {"fp32": 0.85, "bf16": 0.7}
    for row in measured("versions.json")["cases"]:
        now, products = row["now"]["seconds"], row["product_seconds"]
        if row["case"].startswith("inference"):
            aim = row["gflop"] / row["peak_gflops"] / part[row["precision"]]
        elif row["precision"] == "fp32":
            aim = row["before"]["seconds"] / 2
        else:
            continue
        cells = " | ".join(map(seconds, (aim, products, aim - products, now - products)))
        lines.append(f"| {row['case']} | {row['precision']} | {row['threads']} | {cells} |")
    return "\n".join(lines)


def detectors() -> str:
    """Detectors with a ResNet-50 on the same image."""
    record = measured("detectors.json")
    height, width = record["size"]
    lines = [
        f"One image of {height}×{width}, {record['detections']} detections with masks, {record['rounds']} rounds in "
        f"turns; PyTorch {record['versions']['packages']['torch']}:",
        "",
        "| | precision | threads | seconds | GFLOP | seconds per 100 GFLOP | part of the peak | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        span = f"{row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})"
        each = f"{100 * row['seconds'] / row['gflop']:.2f}"
        part = f"{row['gflop'] / row['seconds'] / row['peak_gflops']:.0%}"
        lines.append(
            f"| {row['model']} | {row['precision']} | {row['threads']} | {span} | {row['gflop']:.0f} | {each} | {part} "
            f"| {row['peak_memory_gib']:.1f} GiB |"
        )
    return "\n".join(lines)


def gpu_speed() -> str:
    """The R50 models on a GPU."""
    record = measured("gpu.json")
    lines = [
        f"{record['device']}, {record['threads']} CPU cores, PyTorch {record['torch']}; random weights, medians of ten "
        "repetitions:",
        "",
        "| | precision | milliseconds (fastest to slowest) | of that, kernels | images per second | memory |",
        "|---|---|---|---|---|---|",
    ]
    rows = {}
    for row in record["rows"]:
        name = next(name for name, key in MODELS.items() if row["config"].startswith(key))
        how = row["precision"] + ", CUDA graph" * row["graphs"] + ", compiled" * row["compiled"]
        rows[name, row["task"], row["images"], how] = row
        what = f"{name}, {row['task']}, {row['images']} × {row['height']}×{row['width']}"
        times = [f"{1e3 * row[key]:.1f}" for key in ("seconds", "fastest", "slowest", "busy_seconds")]
        lines.append(
            f"| {what} | {how} | {times[0]} ({times[1]} to {times[2]}) | {times[3]} "
            f"| {row['images_per_second']:.1f} | {row['peak_memory_gib']:.1f} GiB |"
        )
    return "\n".join([*lines, "", *_gpu_remarks(rows)])


def _gpu_remarks(rows: dict[tuple[str, str, int, str], dict[str, Any]]) -> list[str]:
    """What the measurements mean; rows by model, task, number of images, and precision."""

    def training(how: str, images: int = 2, key: str = "seconds") -> float:
        return rows["DI-MaskDINO", "training", images, how][key]

    def milliseconds(how: str, key: str = "seconds") -> str:
        return f"{1e3 * training(how, key=key):.0f}"

    def ratio(how: str, key: str = "seconds") -> str:
        di, md = (rows[name, "inference", 1, how][key] for name in ("DI-MaskDINO", "MaskDINO"))
        return f"{md / di:.2f}"

    steps = load_config("coco/instance-segmentation/dimaskdino_r50_4scale_bs16_12ep").schedule.steps
    hours = {how: f"{steps * training(how) / 3600:.1f} h" for how in ("fp32", "bf16", "bf16, compiled")}
    waits = rows["DI-MaskDINO", "inference", 1, "fp32"]["synchronisations"]
    return [
        f"* **In bf16 the CPU sets the pace.** The {training('bf16', key='kernels'):,} kernels of a training step take "
        f"{milliseconds('bf16', 'busy_seconds')} of its {milliseconds('bf16')} ms; launching them one by one takes the "
        f"rest. `train.compile` makes it {milliseconds('bf16, compiled')} ms; in fp32, where kernels fill the time, it "
        f"gains nothing ({milliseconds('fp32')} and {milliseconds('fp32, compiled')} ms). A CUDA graph launches all of "
        "inference at once.",
        f"* Copies that make the CPU wait: {training('bf16', key='synchronisations')} in a training step, for the "
        f"costs of matching, and {waits} in inference, after the detector.",
        f"* DI-MaskDINO runs at {ratio('fp32')} of MaskDINO's speed in fp32, {ratio('bf16')} in bf16 and "
        f"{ratio('bf16, CUDA graph')} as a CUDA graph in bf16, where the aim was 0.96. It computes more: "
        f"{ratio('fp32', 'gflop')} is the ratio of their operations.",
        f"* {steps:,} steps of the recipe would take {steps * training('bf16', 16) / 3600:.0f} h on one such GPU in "
        f"bf16. On 8, with 2 images each: {hours['fp32']} in fp32, {hours['bf16']} in bf16 and "
        f"{hours['bf16, compiled']} compiled, without the communication between them, which was not measured.",
    ]


def gpu_precision() -> str:
    """AP of a shipped model in every precision on a GPU, beside that of a CPU."""
    record = measured("gpu.json")["ap"]
    cpu = average_precisions(course_models()["DI-MaskDINO"])
    columns = {"CPU, fp32": cpu} | {f"GPU, {p}": record[p] for p in get_args(Precision) if p in record}
    lines = [f"| stage | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for stage in ("first_selection", "decoder.0", next(reversed(cpu))):
        cells = [f"{at[stage]['box']:.1f} / {at[stage]['mask']:.1f}" for at in columns.values()]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    apart = max(
        abs(at[stage][task] - ap)
        for at in columns.values()
        for stage, tasks in cpu.items()
        for task, ap in tasks.items()
        if ap is not None
    )
    return "\n".join([*lines, "", f"At no stage do they differ from the CPU's by more than {apart:.1f} points."])


def gpu_checks() -> str:
    """How the tests went on a GPU."""
    lines = ["| check on the GPU | how it ended |", "|---|---|"]
    for case in measured("gpu.json")["cases"]:
        if case["step"] == "tests":
            ended = "passed" if case["exit"] == 0 else f"stopped after {case['seconds']:.0f} s"
            lines.append(f"| {case['case']} | {case['last'].strip('= ') or ended} |")
    return "\n".join(lines)


def starting() -> str:
    """Seconds until an import or a help text is there."""
    lines = ["| | median | fastest to slowest | aim |", "|---|---|---|---|"]
    for name, row in measured("starting.json")["commands"].items():
        aim = "–" if row["aim"] is None else f"{row['aim']:.1f} s"
        span = f"{row['fastest']:.2f} to {row['slowest']:.2f} s"
        lines.append(f"| {name} | {row['seconds']:.2f} s | {span} | {aim} |")
    return "\n".join(lines)


def explorers() -> str:
    """Seconds from a control to the new picture."""
    record = measured("explorers.json")
    lines = ["| explorer | median | slowest | changes |", "|---|---|---|---|"]
    for name, row in record["explorers"].items():
        lines.append(f"| {name} | {row['median']:.2f} s | {row['slowest']:.2f} s | {row['changes']} |")
    return "\n".join(lines)


BLOCKS = (company, versions, aims, detectors, gpu_speed, gpu_precision, gpu_checks, starting, explorers)
