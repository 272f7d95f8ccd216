"""Write the tables of ops/README.md from the measurements in results/: `python ops/benchmarks/table.py`."""

import json
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- measurements -->", "<!-- end of measurements -->"


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


def main() -> None:
    """Replace what lies between the two marks."""
    records = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(before + "\n".join([BEGIN, "\n\n".join(map(table, records)), END]) + after)


if __name__ == "__main__":
    main()
