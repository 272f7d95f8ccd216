"""Write the tables of ops/README.md from their records: `python ops/benchmarks/table.py`.

The records are the measurements in results/; machine_code.json, which is written by
`python ops/tests/cuda_machine_code.py 80 90 100 --output ops/benchmarks/machine_code.json`; and profile.json, which
`python docs/keep_gpu.py` makes of a check on a GPU.
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def table(record: dict) -> str:
    """One device's measurements in Markdown: medians in milliseconds and how many times faster than the slow one."""
    versions = record.get("versions", {})
    names = [name for name in record["rows"][0]["milliseconds"] if name not in versions]
    base = "original" if "original" in names else "reference"
    header = ["samples", "batch", "type", "pass", *(f"{name} (ms)" for name in names), "ratio", "floor (ms)"]
    lines = [
        f"{record['device']}, torch {record['torch']}, medians of {record['rounds']} rounds; "
        f"ratio: {base} to the fastest of the others.",
        "",
        "| " + " | ".join(header) + " |",
        "|---" * 4 + "|---:" * (len(header) - 4) + "|",
    ]
    for row in record["rows"]:
        w, ms = row["workload"], row["milliseconds"]
        best = min(ms[name] for name in names if name != base)
        cells = [f"{w['queries']}, {w['locations']}", str(w["batch"]), w["dtype"], row["direction"]]
        cells += [_short(ms[name]) for name in names] + [f"{ms[base] / best:.1f}×", f"{row['floor_ms']:.2g}"]
        lines.append("| " + " | ".join(cells) + " |")
    if base == "original":
        lines += ["", _against_others(record)]
    return "\n".join([*lines, *(_versions(record) if versions else ())])


def _against_others(record: dict) -> str:
    """How the CUDA kernels compare with the original, with deformops and with the floor."""

    def span(ratio: Callable[[dict], float], *chosen: str) -> str:
        rows = [r for r in record["rows"] if {*chosen} <= {*r["workload"].values(), r["direction"]}]
        found = [ratio(row) for row in rows]
        return f"{min(found):.1f} to {max(found):.1f}"

    def to(name: str) -> Callable[[dict], float]:
        return lambda row: row["milliseconds"][name] / row["milliseconds"]["cuda"]

    def floor(row: dict) -> float:
        return row["milliseconds"]["cuda"] / row["floor_ms"]

    original = to("original")
    return (
        f"The CUDA kernels are {span(original, 'encoder', 'forward', 'float32')} times as fast as the original forward "
        f"in the encoder in float32, and {span(original, 'encoder', 'forward', 'bfloat16')} times in bfloat16, which "
        f"the original has to cast to float32; with backward {span(original, 'encoder', 'forward+backward')} times. In "
        f"the decoder: {span(original, 'decoder')} times. deformops takes {span(to('deformops'), 'encoder')} times as "
        f"long in the encoder, {span(to('deformops'), 'decoder')} times in the decoder. The floor of the encoder's "
        f"forward, all sampled cells through the L1 caches, is {span(floor, 'encoder', 'forward')} times lower."
    )


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _versions(record: dict) -> list[str]:
    """Other versions of the CUDA kernels in the same run: their times relative to the operator's, in the encoder."""
    kinds = [(dtype, way) for way in ("forward", "forward+backward") for dtype in ("float32", "bfloat16")]
    lines = [
        "",
        "Other versions of the CUDA kernels, in the same rounds: time relative to `cuda`, geometric mean of the "
        "encoder's rows.",
        "",
        "| version | " + " | ".join(f"{dtype}, {way}" for dtype, way in kinds) + " |",
        "|---" + "|---:" * len(kinds) + "|",
    ]
    for name, what in record["versions"].items():
        cells = []
        for kind in kinds:
            rows = [r for r in record["rows"] if (r["workload"]["dtype"], r["direction"]) == kind]
            rows = [r["milliseconds"] for r in rows if r["workload"]["queries"] == "encoder"]
            cells.append(f"{statistics.geometric_mean(ms[name] / ms['cuda'] for ms in rows):.2f}")
        lines.append("| " + " | ".join([what, *cells]) + " |")
    return lines


def machine_code(record: dict) -> str:
    """The kernels that the model calls, for every GPU that they were compiled for, in Markdown."""
    lines = [
        f"{record['compiler']}, heads of 32 channels; per sample and group of lanes.",
        "",
        "| kernel | GPU | registers | bytes in memory for want of registers | instructions per sample | additions |",
        "|---|---|---:|---:|---:|---|",
    ]
    for kernel in record["kernels"]:
        adds = ", ".join(f"{n:.0f} × {name.split('.STRONG')[0]}" for name, n in kernel["atomics"].items()) or "none"
        cells = [kernel["name"], f"sm_{kernel['capability']}", str(kernel["registers"]), str(kernel["stack"])]
        lines.append("| " + " | ".join([*cells, f"{kernel['instructions']:.0f}", adds]) + " |")
    return "\n".join(lines)


def profile(record: dict) -> str:
    """What the kernels keep busy, in Markdown, and what bounds them."""
    lines = [
        f"{record['device']}, Nsight Compute, one image's encoder; part of what the GPU can sustain.",
        "",
        "| kernel | microseconds | registers | warps | instructions | L1 | L1 hits | L2 | memory |",
        "|---|" + "---:|" * 8,
    ]
    kernels = {(k["backend"], k["direction"], k["dtype"]): k for k in record["kernels"]}
    for names, kernel in kernels.items():
        parts = ("warps", "instructions", "l1", "l1_hits", "l2", "memory")
        cells = [f"{kernel['nanoseconds'] / 1e3:.0f}", f"{kernel['registers']:.0f}"]
        lines.append(f"| {' | '.join([', '.join(names), *cells, *(f'{kernel[part]:.0f} %' for part in parts)])} |")
    forward, backward = (kernels["cuda", direction, "fp32"] for direction in ("forward", "backward"))
    lines += [
        "",
        f"The **forward** pass waits for its loads, {forward['waiting_for_loads']:.0f} cycles of a warp for every "
        f"instruction: with {forward['registers']:.0f} registers a thread, "
        f"{forward['warps']:.0f} % of the possible warps are there, and L1 is busy for {forward['l1']:.0f} % of the "
        f"time. The **backward** pass is bound by L2, which is busy for {backward['l2']:.0f} % of the time: there the "
        "gradients of the values are added.",
    ]
    return "\n".join(lines)


def updated(text: str) -> str:
    """The README with its tables as the records have them."""
    records = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    blocks = {
        "measurements": "\n\n".join(map(table, records)),
        "machine code": machine_code(json.loads((HERE / "machine_code.json").read_text())),
        "profile": profile(json.loads((HERE / "profile.json").read_text())),
    }
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _, b=begin, t=block, e=end: f"{b}\n{t}\n{e}", text, flags=re.DOTALL)
    return text


def main() -> None:
    """Rewrite the tables."""
    README.write_text(updated(README.read_text()))


if __name__ == "__main__":
    main()
