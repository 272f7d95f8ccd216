"""The numbers of study.md and of the table of claims, from the runs of the studies and measurements/ceilings.json."""

import json
import statistics
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from formats import number, signed

from dimaskdino.evaluation.layerwise_ap import FIRST_LAYER, LayerwiseAP
from dimaskdino.studies.comparison import (
    Comparison,
    EvaluatedRun,
    Quantity,
    correlation_of_pairs,
    planned_detectable,
    pooled_deviation,
    slope_within_rows,
)
from dimaskdino.studies.report import StudyReport, show_p
from dimaskdino.studies.study import Study, find_study, load_study

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "notebooks" / "studies"
FOLDERS = {"shapes": STUDIES, "miniature": STUDIES / "miniature"}
REPORTS = {  # by scale
    "shapes": [*(f"table_{number}" for number in range(3, 10)), "figure_1", "bato_layers", "undetached_selection"],
    "miniature": [],  # of a study whose seeds are all there
}
SOLID, OPEN = ("disk", "rectangle", "triangle"), ("star", "ring")
BOX = Quantity.parse("last.box")
PILOT = (0, 1, 2)  # seeds
LARGEST_DEVIATION = 1.5  # points of AP: differences between two rows of a seed in the second miniature


@cache
def report(name: str, scale: str = "shapes") -> StudyReport:
    """A study's report from the committed runs of a scale."""
    return StudyReport.of(load_study(find_study(name)), scale, FOLDERS[scale])


def main_comparison(row: str) -> Comparison:
    """Box AP of a row of table 4 at the last layer, against the row with neither module."""
    wanted = ((row,), ("neither",), BOX)
    comparisons = report("table_4").comparisons
    return next(c for c in comparisons if (c.contrast.plus, c.contrast.minus, c.contrast.quantity) == wanted)


SIGNS = {"yes": "**shown**", "no": "**opposite**", "cannot tell": "cannot be told"}


def verdict(study: str, found: Comparison) -> str:
    """The verdict of the rule in study.md on the sign that the paper has on COCO."""
    published = report(study).published_difference("COCO", found.contrast)
    return SIGNS[found.agrees(published)]


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
    rows |= {f"{photographs['images']} photographs of COCO at the paper's resolution": photographs}
    lines = ["| | boxes, `mask2box` | boxes, `bitmask` | masks |", "|---|---|---|---|"]
    for what, found in rows.items():
        lines.append(f"| {what} | {_cells(found[key]['mean'] for key in ('mask2box', 'bitmask', 'mask'))} |")
    lines.append(
        f"| small objects of these photographs | "
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
    """Lag at the first layer by class, mean of the seeds."""
    rows = report("table_4").measured
    labels = {row.name: row.label for row in report("table_4").study.rows}
    kinds = " | ".join((*SOLID, *OPEN))
    lines = [f"| | {kinds} | solid | with holes or spikes |", "|---|---|---|---|---|---|---|---|"]
    for name, runs in rows.items():
        lags = {
            kind: statistics.mean(_class_lag(run.result.stages["decoder.1"], kind) for run in runs.values())
            for kind in (*SOLID, *OPEN)
        }
        groups = [statistics.mean(lags[kind] for kind in kinds) for kinds in (SOLID, OPEN)]
        lines.append(f"| {labels[name]} | {_cells([*lags.values(), *groups], sign=True)} |")
    return "\n".join(lines)


def study_equal_ap() -> str:
    """Whether a higher AP alone would narrow the lag as much."""
    measured = report("table_4").measured
    box, lag = Quantity.parse("first.box"), Quantity.parse("first.imbalance")
    slope = slope_within_rows(measured, lag, box)

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
    """The contrasts of table 4."""
    return _contrasts((None, found) for found in report("table_4").comparisons)


def study_others() -> str:
    """The contrasts of the other studies that have several runs, and which have a single one."""
    repeated, single = [], []
    for name in REPORTS["shapes"]:
        if name in ("table_4", "figure_1"):
            continue
        for found in report(name).comparisons:
            if found.contrast.quantity == BOX:
                (single if min(found.runs.values()) == 1 else repeated).append((report(name).study.title, found))
    names = ", ".join(dict.fromkeys(f"{title}: {found.contrast.label}" for title, found in single))
    lines = [_contrasts(repeated), "", f"One run each, so nothing can be said: {names}."]
    return "\n".join(lines)


def study_pairs() -> str:
    """Whether runs with one seed resemble each other."""
    values = {name: report("table_4").values(name, BOX) for name in report("table_4").measured}
    names = list(values)
    found = [correlation_of_pairs(values[a], values[b]) for i, a in enumerate(names) for b in names[:i]]
    low, high = signed(min(found)), signed(max(found))
    return f"The correlations of the rows of table 4 over their seeds reach from {low} to {high}."


def study_power() -> str:
    """How many seeds these models would take."""
    runs = report("table_4").measured
    variances = [statistics.variance(report("table_4").values(name, BOX).values()) for name in runs]
    deviation = statistics.mean(variances) ** 0.5
    [contrast, *_] = (c.contrast for c in report("table_4").comparisons if c.contrast.quantity == BOX)
    seeds = next(n for n in range(2, 1000) if planned_detectable(contrast, n, deviation, 1) <= 2)
    return (
        f"With the deviation over trainings of these models ({deviation:.1f} points, pooled), a single comparison of "
        f"two rows needs {seeds} seeds of each to find a difference of 2 points with 80 % power."
    )


def study_reach() -> str:
    """What the second miniature can find if its trainings scatter as much as is allowed."""
    seeds, adjusted = len(_box_formula().seeds), len(_box_formula().registered)
    tables = [report(f"table_{n}") for n in (5, 6, 7, 8, 9)]
    contrasts = [(table, c.contrast) for table in tables for c in table.comparisons if c.contrast.quantity == BOX]
    published = [abs(table.published_difference("COCO", contrast)) for table, contrast in contrasts]
    low, high = number(min(published)), number(max(published))
    return (
        f"If differences between two rows of a seed vary by {LARGEST_DEVIATION} points, {seeds} seeds find an effect "
        f"of a module of ±{_effect_found(LARGEST_DEVIATION):.1f} points of box AP with 80 % power, adjusted for "
        f"{adjusted} comparisons. The differences in the paper's tables 5 to 9 are {low} to {high} points on COCO: out "
        "of reach, and not run."
    )


def study_pilot() -> str:
    """What the pilot of the second miniature was run for: its scatter, and a box AP at which to compare the lag."""
    scatter = 2**0.5 * pooled_deviation({row: BOX.by_seed(runs) for row, runs in _pilot().items()}, paired=True)
    return (
        f"In the pilot the differences in box AP between rows of a seed have a standard deviation of {scatter:.2f} "
        f"points, with which the study finds effects of ±{_effect_found(scatter):.1f}. The first layer of MaskDINO "
        f"reaches at least {_reached():.1f} box AP before the last validation, so the lag is also compared at a box AP "
        f"of {equal_ap()}."
    )


def equal_ap() -> int:
    """The box AP at which the second miniature compares the lag, by its rule."""
    return 5 * int(_reached() // 5)


def _reached() -> float:
    """Box AP that MaskDINO's first layer reaches in every training of the pilot before the last validation."""
    runs = _pilot()["neither"].values()
    return min(max(scores[FIRST_LAYER]["box"] for scores in run.validations[:-1]) for run in runs)


def _pilot() -> dict[str, dict[int, EvaluatedRun]]:
    measured = report("table_4", "miniature").measured
    return {row: {seed: run for seed, run in runs.items() if seed in PILOT} for row, runs in measured.items()}


def _box_formula() -> Study:
    return load_study(find_study("box_formula"))


def _effect_found(deviation: float) -> float:
    """A module's effect on box AP that `box_formula` finds, if differences between rows of a seed vary so much."""
    study = _box_formula()
    [contrast, *_] = (c for c in study.registered if c.quantity == BOX)
    return planned_detectable(contrast, len(study.seeds), deviation / 2**0.5, len(study.registered), paired=True)


def claims() -> str:
    """What the paper says, published and here, with the verdict of the registered rule."""
    lines = [
        "| the paper says | published (COCO) | here, shapes | here, photographs | verdict |",
        "|---|---|---|---|---|",
    ]
    chosen = [
        ("table_4", "di", "neither", "De-Imbalance raises box AP"),
        ("table_4", "bato", "neither", "BATO raises box AP"),
        ("table_4", "di_bato", "neither", "both raise box AP"),
        ("table_5", "bato", "di_bato", "guidance by `T_i` is worse than by `Q_bal`"),
        ("table_5", "guidance_T_s2", "di_bato", "guidance by `T_s2` is worse than by `Q_bal`"),
        ("table_6", "no_generation", "di_bato", "BATO without generation is worse"),
        ("table_7", "triple", "di_bato", "a third selection is worse"),
    ]
    for study, plus, minus, text in chosen:
        source = report(study)
        found = next(
            c
            for c in source.comparisons
            if (c.contrast.plus, c.contrast.minus, c.contrast.quantity) == ((plus,), (minus,), BOX)
        )
        there = source.published_difference("COCO", found.contrast)
        here = f"{signed(found.difference)} ({_interval(found)})"
        photographs = _on_photographs() if (study, plus) == ("table_4", "di_bato") else "not run"
        lines.append(f"| {text} | {signed(there)} | {here} | {photographs} | {verdict(study, found)} |")
    return "\n".join(lines)


def _on_photographs() -> str:
    """The registered difference of box AP on photographs, DI-MaskDINO − MaskDINO, and its verdict."""
    record = json.loads((ROOT / "docs" / "measurements" / "photographs.json").read_text())["animals"]
    found = next(c for c in record["comparisons"] if c["quantity"] == "last.box")
    low, high = (signed(found["joint"][end]) for end in ("low", "high"))
    return f"{signed(found['difference'])} ({low} to {high}): {SIGNS[found['agrees']]}"


def _contrasts(comparisons: Any) -> str:
    lines = [
        "| | | difference | 95 % interval | adjusted p | finds | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, c in comparisons:
        runs = " / ".join(map(str, c.runs.values()))
        label = f"{title}: {c.contrast.label}" if title else c.contrast.label
        cells = [label, c.contrast.quantity.label, signed(c.difference), _interval(c)]
        cells += [show_p(c.adjusted_p), f"±{c.detectable:.1f}", runs]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(found: Comparison) -> str:
    return f"{signed(found.joint.low)} to {signed(found.joint.high)}"


def _class_lag(stage: Any, kind: str) -> float:
    return stage.mask.per_class[kind] - stage.box.per_class[kind]


def _cells(values: Iterator[float] | Any, sign: bool = False) -> str:
    return " | ".join(number(value, sign=sign) for value in values)


def _ceilings() -> Mapping[str, Any]:
    return json.loads((ROOT / "docs" / "measurements" / "ceilings.json").read_text())


BLOCKS = (
    study_ceilings,
    study_formula,
    study_classes,
    study_equal_ap,
    study_crossing,
    study_table_4,
    study_others,
    study_pairs,
    study_power,
    study_reach,
    study_pilot,
    claims,
)
