"""Keep the records of a check on a GPU: `python tools/records/keep_gpu.py build/gpu`.

Makes measurements/gpu.json from what `tools.benchmarks.gpu_check` left in its folder. The operator's measurements
go to ops/benchmarks/results, and its profile, reduced to what ops/README.md tells, to ops/benchmarks/profile.json.
"""

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from tools.benchmarks.gpu_check import latest
from tools.records.sources import MEASUREMENTS, ROOT, average_precisions

OPERATOR = ROOT / "ops" / "benchmarks"
PROFILE = {  # our name: Nsight Compute's
    "nanoseconds": "gpu__time_duration.sum",
    "registers": "launch__registers_per_thread",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "instructions": "sm__instruction_throughput.avg.pct_of_peak_sustained_elapsed",
    "l1": "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_hits": "l1tex__t_sector_pipe_lsu_mem_global_op_ld_hit_rate.pct",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "waiting_for_loads": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
}


def profiled(file: Path) -> Iterator[dict[str, Any]]:
    """Every kernel that `ops/benchmarks/every_kernel.py` called; percentages are of what the GPU can sustain."""
    head, _units, *lines = csv.reader(line for line in file.read_text().splitlines() if line.startswith('"'))
    dtype = ""
    for line in lines:
        cells = dict(zip(head, line, strict=True))
        name = cells["Kernel Name"]
        by = "triton" if "msda" in name else "cuda"
        if by == "cuda":  # the Triton kernels, which do not say their type, follow those of CUDA
            dtype = "bf16" if "BFloat16" in name else "fp32"
        numbers = {ours: float(cells[theirs].replace(",", "")) for ours, theirs in PROFILE.items()}
        direction = "backward" if "backward" in name else "forward"
        yield {"backend": by, "direction": direction, "dtype": dtype, **numbers}


def gpu(folder: Path) -> dict[str, Any]:
    """All that the check found on one GPU. Later measurements of a case replace earlier ones."""
    rows = latest(map(json.loads, (folder / "models.jsonl").read_text().splitlines()))
    cases = list(map(json.loads, (folder / "cases.jsonl").read_text().splitlines()))
    outcomes = {case["case"]: case for case in cases}
    (device,) = {row["device"] for row in rows}
    (torch,) = {row["torch"] for row in rows}
    return {
        "device": device,
        "torch": torch,
        "threads": rows[0]["threads"],
        "rows": rows,
        "cases": list(outcomes.values()),
        "ap": {
            file.parent.name.removeprefix("ap_"): average_precisions(LayerwiseAP.load(file))
            for file in sorted(folder.glob("ap_*/layers.json"))
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="results of the check")
    folder = parser.parse_args().folder
    record = gpu(folder)
    kept = {MEASUREMENTS / "gpu.json": record}
    if (folder / "profile.csv").exists():
        profile = {"device": record["device"], "kernels": list(profiled(folder / "profile.csv"))}
        kept[OPERATOR / "profile.json"] = profile
    for file in folder.glob("*.json"):
        kept[OPERATOR / "results" / file.name] = json.loads(file.read_text())
    for file, content in kept.items():
        file.write_text(json.dumps(content, indent=1) + "\n")
        print("kept:", file)
