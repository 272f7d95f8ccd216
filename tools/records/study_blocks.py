"""The numbers of the first miniature in study.md, from its runs and measurements/ceilings.json."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from dimaskdino.evaluation.layerwise_ap import FIRST_LAYER, LayerwiseAP
from dimaskdino.studies.comparison import (
    ComparisonResult,
    Quantity,
    correlation_of_pairs,
    planned_mde,
    slope_within_variants,
)
from dimaskdino.studies.report import StudyReport, show_p
from dimaskdino.studies.study import find_study, load_study
from tools.records.formats import number, signed
from tools.records.sources import ROOT, measured

STUDIES = ROOT / "notebooks" / "studies"
FOLDERS = {"shapes": STUDIES} | {name: STUDIES / name for name in ("miniature", "follow_up", "photographs")}
SCALES = {"follow_up": "miniature"}  # of the folders that are not named after theirs
NAMES = (*(f"table_{number}" for number in range(3, 10)), "figure_1", "bato_layers", "undetached_selection")
SOLID, OPEN = ("disk", "rectangle", "triangle"), ("star", "ring")
BOX = Quantity.parse("last.box")


@cache
def report(name: str, folder: str = "shapes") -> StudyReport:
    """A study's report from the committed runs of one of the folders.

    Runs count if the study registers their seeds, except in the first miniature, where rows have what was run.
    """
    found = StudyReport.of(load_study(find_study(name)), SCALES.get(folder, folder), FOLDERS[folder])
    return found if folder == "shapes" else with_seeds(found, found.study.seeds)


def with_seeds(source: StudyReport, seeds: Iterable[int]) -> StudyReport:
    """A report of the runs with these seeds."""
    measured = {row: {s: run for s, run in runs.items() if s in seeds} for row, runs in source.measured.items()}
    return replace(source, measured=measured)


def main_comparison(row: str) -> ComparisonResult:
    """Box AP of a row of table 4 at the last layer, against the row with neither module."""
    wanted = ((row,), ("neither",), BOX)
    comparisons = report("table_4").results
    return next(c for c in comparisons if (c.comparison.plus, c.comparison.minus, c.comparison.quantity) == wanted)


VERDICTS = {"supported": "**supported**", "contradicted": "**contradicted**", "inconclusive": "inconclusive"}


def share_of_the_formula() -> float:
    """Percentage of the baseline's lag at the decoder's input that predicted boxes would not have."""
    lag, left = (_decoder_input()[f]["mask"] - _decoder_input()[f]["box"] for f in ("mask2box", "no"))
    return 100 * (lag - left) / lag


def _decoder_input() -> dict[str, dict[str, float]]:
    return {formula: stages["decoder.0"] for formula, stages in _ceilings()["maskdino_shapes"].items()}


def study_ceilings() -> str:
    """What true masks and the bounds of true masks reach."""
    record = _ceilings()
    photographs = record["photographs"]
    rows = {f"shapes at {size} pixels": found for size, found in record["shapes"].items()}
    rows |= {
        "shapes of the second miniature, at 160 pixels": record["miniature"],
        f"{record['animals']['images']} photographs of animals at 192 pixels": record["animals"],
        f"{photographs['images']} photographs of COCO at the paper's resolution": photographs,
    }
    lines = ["| | boxes, `mask2box` | boxes, `bitmask` | masks |", "|---|---|---|---|"]
    for what, found in rows.items():
        lines.append(f"| {what} | {_cells(found[key]['mean'] for key in ('mask2box', 'bitmask', 'mask'))} |")
    lines.append(
        f"| small objects of the photographs of COCO | "
        f"{_cells(photographs[key]['small'] for key in ('mask2box', 'bitmask', 'mask'))} |"
    )
    return "\n".join(lines)


def study_formula() -> str:
    """The baseline's decoder input under the three formulas."""
    record = _decoder_input()
    what = {
        "mask2box": "bounds without the last cell, as trained and published",
        "bitmask": "bounds with the last cell",
        "no": "predicted",
    }
    lines = ["| boxes that enter the decoder | box AP | mask AP | lag of boxes |", "|---|---|---|---|"]
    for formula, ap in record.items():
        cells = f"{ap['box']:.1f} | {ap['mask']:.1f} | {ap['mask'] - ap['box']:+.1f}"
        lines.append(f"| `{formula}`: {what[formula]} | {cells} |")
    lag = record["mask2box"]["mask"] - record["mask2box"]["box"]
    lines += ["", f"The formula makes {share_of_the_formula():.0f} % of the lag of {lag:.1f} points."]
    return "\n".join(lines)


def study_classes() -> str:
    """Lag at the first layer by class."""
    return lags_by_class(report("table_4"), SOLID, OPEN)


def lags_by_class(source: StudyReport, solid: tuple[str, ...], open_: tuple[str, ...]) -> str:
    """Lag at the first layer by class, mean of the seeds, of classes without and with holes or spikes."""
    labels = {row.name: row.label for row in source.study.variants}
    kinds = (*solid, *open_)
    lines = [f"| | {' | '.join(kinds)} | solid | with holes or spikes |", "|---" * (len(kinds) + 3) + "|"]
    for name, runs in source.measured.items():
        lags = {
            kind: statistics.mean(_class_lag(run.result.stages[FIRST_LAYER], kind) for run in runs.values())
            for kind in kinds
        }
        groups = [statistics.mean(lags[kind] for kind in group) for group in (solid, open_)]
        lines.append(f"| {labels[name]} | {_cells([*lags.values(), *groups], sign=True)} |")
    return "\n".join(lines)


def study_equal_ap() -> str:
    """Whether a higher AP alone would narrow the lag as much."""
    measured = report("table_4").measured
    box, lag = Quantity.parse("first.box"), Quantity.parse("first.imbalance")
    slope = slope_within_variants(measured, lag, box)

    def difference(quantity: Quantity) -> float:
        rows = [report("table_4").values(name, quantity).values() for name in ("di_bato", "neither")]
        return statistics.mean(rows[0]) - statistics.mean(rows[1])

    return (
        f"Among runs of one row, a point of box AP at the first layer goes with {signed(slope, 2)} points of lag. The "
        f"model with both modules is {signed(difference(box))} points ahead there, which would explain "
        f"{signed(slope * difference(box))} of the {signed(difference(lag))} points by which its lag differs."
    )


def study_crossing() -> str:
    """Lag of the course's MaskDINO at its first and last layer by class."""
    stages = LayerwiseAP.load(ROOT / "notebooks" / "models" / "maskdino" / "evaluation" / "layers.json").stages
    first, last = stages["decoder.1"], stages[next(reversed(stages))]
    lines = [f"| lag of boxes | {' | '.join((*SOLID, *OPEN))} |", "|---|---|---|---|---|---|"]
    for what, stage in (("first layer", first), ("last layer", last)):
        lines.append(f"| {what} | {_cells((_class_lag(stage, kind) for kind in (*SOLID, *OPEN)), sign=True)} |")
    return "\n".join(lines)


def study_table_4() -> str:
    """What each module brings, with and without the other, in table 4."""
    return comparison_table([found for found in report("table_4").results if len(found.comparison.plus) == 2])


def table_4() -> str:
    """The rows of the study of table 4."""
    rows = report("table_4").to_json()["variants"]
    lines = [
        "| | box AP | mask AP | first layer: mask − box | box AP − baseline, 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        values = row["measured"]
        cells = [_spread(values["last.box"]), _spread(values["last.mask"]), _spread(values["first.imbalance"], True)]
        if row is rows[0]:
            cells.append("–")
        else:
            found = main_comparison(row["name"])
            low, high = (signed(end) for end in (found.joint.low, found.joint.high))
            cells.append(f"{signed(found.difference)} ({low} to {high})")
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def study_others() -> str:
    """What the comparisons of the other studies can tell, and which have a single run."""
    repeated, single = [], []
    for name in NAMES:
        if name in ("table_4", "figure_1"):
            continue
        for found in report(name).results:
            if found.comparison.quantity == BOX:
                (single if min(found.runs.values()) == 1 else repeated).append((report(name).study.title, found))
    differences = [found.difference for _, found in repeated]
    ends = [end for _, found in repeated for end in (found.joint.low, found.joint.high)]
    powers = [found.mde for _, found in repeated]
    smallest = min(found.adjusted_p for _, found in repeated)
    runs = sorted({n for _, found in repeated for n in found.runs.values()})
    titles, alone = (", ".join(dict.fromkeys(title for title, _ in some)) for some in (repeated, single))
    return (
        f"{len(repeated)} comparisons of box AP with {' or '.join(map(str, runs))} runs a row ({titles}): differences "
        f"of {signed(min(differences))} to {signed(max(differences))} points, intervals within {signed(min(ends))} to "
        f"{signed(max(ends))}, adjusted p of {show_p(smallest)} or more. They would find differences of "
        f"±{min(powers):.1f} to ±{max(powers):.1f}.\n\n{len(single)} comparisons have one run a row, so nothing can be "
        f"said: {alone}."
    )


def study_power() -> str:
    """Whether runs with one seed resemble each other, and how many seeds these models would take."""
    values = {name: report("table_4").values(name, BOX) for name in report("table_4").measured}
    names = list(values)
    correlations = [correlation_of_pairs(values[a], values[b]) for i, a in enumerate(names) for b in names[:i]]
    low, high = signed(min(correlations)), signed(max(correlations))
    deviation = statistics.mean(statistics.variance(found.values()) for found in values.values()) ** 0.5
    [comparison, *_] = (c.comparison for c in report("table_4").results if c.comparison.quantity == BOX)
    seeds = next(n for n in range(2, 1000) if planned_mde(comparison, n, deviation, 1) <= 2)
    return (
        f"Runs with one seed need not resemble each other (correlations of {low} to {high} between rows), so rows are "
        f"compared without pairing. With the deviation over these trainings, {deviation:.1f} points, a single "
        f"comparison of two rows needs {seeds} seeds of each to find a difference of 2 points with 80 % power; most "
        "effects in the paper are smaller."
    )


def comparison_table(results: Sequence[ComparisonResult], source: StudyReport | None = None) -> str:
    """A table of comparisons: what is compared down, quantities across, or quantities down if there is one comparison.

    Args:
        results: those to show.
        source: their study; shows its published numbers and the verdict on the signs.
    """
    [column] = source.published if source else [None]
    cells = {}
    for found in results:
        comparison, runs = found.comparison, found.runs.values()
        p = show_p(found.adjusted_p)
        cell = (
            f"{signed(found.difference)} ({interval(found)}); p {p if p.startswith('<') else f'= {p}'}; "
            f"n {'/'.join(map(str, sorted(set(runs))))}; MDE {found.mde:.1f}"
        )
        if source and column:
            published = source.published_difference(column, comparison)
            if published is not None:
                cell += f"; {column} {signed(published)}: {VERDICTS[found.verdict(published)]}"
        cells[comparison.label, comparison.quantity.label] = cell
    labels, quantities = (list(dict.fromkeys(key[end] for key in cells)) for end in (0, 1))
    if len(labels) == 1:
        labels, quantities = quantities, labels
        cells = {(quantity, label): cell for (label, quantity), cell in cells.items()}
    lines = [f"| | {' | '.join(quantities)} |", "|---" * (len(quantities) + 1) + "|"]
    return "\n".join(lines + [f"| {row} | {' | '.join(cells[row, head] for head in quantities)} |" for row in labels])


def interval(found: ComparisonResult) -> str:
    """The joint interval of a comparison."""
    return f"{signed(found.joint.low)} to {signed(found.joint.high)}"


def _spread(values: Mapping[str, Any], sign: bool = False) -> str:
    return f"{number(values['mean'], sign=sign)} ± {values['standard_deviation']:.1f}"


def _class_lag(stage: Any, kind: str) -> float:
    return stage.mask.per_class[kind] - stage.box.per_class[kind]


def _cells(values: Iterable[float], sign: bool = False) -> str:
    return " | ".join(number(value, sign=sign) for value in values)


def _ceilings() -> Mapping[str, Any]:
    return measured("ceilings.json")


BLOCKS = (
    table_4,
    study_ceilings,
    study_formula,
    study_classes,
    study_equal_ap,
    study_crossing,
    study_table_4,
    study_others,
    study_power,
)
