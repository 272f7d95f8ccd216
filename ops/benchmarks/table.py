"""Write the tables of ops/README.md from their records: `python ops/benchmarks/table.py`.

The records are the measurements in results/, and machine_code.json, which is written by
`python ops/tests/cuda_machine_code.py 80 90 100 --output ops/benchmarks/machine_code.json`.
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def table(record: dict) -> str:
    """One device's measurements in Markdown: medians in milliseconds and how many times faster than the slow one."""
    names = list(record["rows"][0]["milliseconds"])
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
        best = min(value for name, value in ms.items() if name != base)
        cells = [f"{w['queries']}, {w['locations']}", str(w["batch"]), w["dtype"], row["direction"]]
        cells += [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in ms.values()] + [
            f"{ms[base] / best:.1f}×",
            f"{row['floor_ms']:.2g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def updated(text: str) -> str:
    """The README with its tables as the records have them."""
    records = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    blocks = {
        "measurements": "\n\n".join(map(table, records)),
        "machine code": machine_code(json.loads((HERE / "machine_code.json").read_text())),
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
