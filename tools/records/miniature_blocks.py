"""The numbers of the second miniature and of the study on photographs in study.md, from their runs."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache

from dimaskdino.evaluation.layerwise_ap import FIRST_LAYER
from dimaskdino.modeling.detector import Detector
from dimaskdino.studies.comparison import (
    EvaluatedRun,
    Interval,
    Quantity,
    compare,
    planned_mde,
    pooled_deviation,
)
from dimaskdino.studies.report import StudyReport, show_p
from dimaskdino.studies.study import Study, find_study, load_study
from tools.records.formats import number, signed
from tools.records.sources import measured
from tools.records.study_blocks import (
    BOX,
    FOLDERS,
    NAMES,
    comparison_table,
    interval,
    lags_by_class,
    report,
    with_seeds,
)

REGISTERED = {  # by folder of runs, in the order of the plan
    "miniature": ("box_formula", "figure_1"),
    "follow_up": ("controls", "bato_frozen", "table_3"),
    "photographs": ("photographs",),
}
SOLID, OPEN = ("disk",), ("ring", "frame", "cross", "gear", "crescent", "star")
PILOT = (0, 1, 2)  # seeds
LARGEST_DEVIATION = 1.5  # points of AP: differences between two rows of a seed


@cache
def study_named(name: str) -> Study:
    """A study of configs/ablations."""
    return load_study(find_study(name))


def folder_of(name: str) -> str:
    """The folder in which the runs of a registered study are."""
    return next(folder for folder, names in REGISTERED.items() if name in names)


def registered(name: str) -> StudyReport:
    """The report of a registered study."""
    return report(name, folder_of(name))


def all_reports() -> list[tuple[str, str]]:
    """Folder of runs and name of every study."""
    return [(folder, name) for folder, names in ({"shapes": NAMES} | REGISTERED).items() for name in names]


def study_reach() -> str:
    """What the second miniature can find if its trainings scatter as much as is allowed."""
    study = study_named("box_formula")
    tables = [report(f"table_{n}") for n in (5, 6, 7, 8, 9)]
    compared = [(table, c.comparison) for table in tables for c in table.results if c.comparison.quantity == BOX]
    published = [abs(table.published_difference("COCO", comparison)) for table, comparison in compared]
    low, high = number(min(published)), number(max(published))
    return (
        f"If differences between two rows of a seed vary by {LARGEST_DEVIATION} points, {len(study.seeds)} seeds find "
        f"an effect of a module of ±{_effect_found(LARGEST_DEVIATION):.1f} points of box AP with 80 % power, adjusted "
        f"for {len(study.registered)} comparisons. The differences in the paper's tables 5 to 9 are {low} to {high} "
        "points on COCO: out of reach, and not run."
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
    return with_seeds(report("table_4", "miniature"), PILOT).measured


def _effect_found(deviation: float) -> float:
    """A module's effect on box AP that `box_formula` finds, if differences between rows of a seed vary so much."""
    study = study_named("box_formula")
    [comparison, *_] = (c for c in study.registered if c.quantity == BOX)
    return planned_mde(comparison, len(study.seeds), deviation / 2**0.5, len(study.registered), paired=True)


def study_box_formula() -> str:
    """Each module's effect under the three formulas."""
    return comparison_table(registered("box_formula").results)


def study_formulas() -> str:
    """Means without and with De-Imbalance under the three formulas."""
    formulas = {"_mask2box": "`mask2box`, published", "": "`bitmask`", "_no": "`no`, predicted"}
    return _means_by_formula(registered("box_formula"), "di", formulas)


def _means_by_formula(source: StudyReport, model: str, formulas: dict[str, str]) -> str:
    """A table of means, those of MaskDINO's row and then of another model's.

    Args:
        source: the study.
        model: the start of the name of the other model's rows.
        formulas: what to call the formulas for the boxes of masks, by the ends of the rows' names.
    """
    quantities = {
        "box AP, first layer": "first.box",
        "box AP, last layer": "last.box",
        "lag at the decoder's input": "decoder.0.imbalance",
        "at the first layer": "first.imbalance",
        "at the last layer": "last.imbalance",
    }
    lines = [f"| boxes that enter the decoder | {' | '.join(quantities)} |", "|---" * (len(quantities) + 1) + "|"]
    for suffix, formula in formulas.items():
        cells = [formula]
        for what in map(Quantity.parse, quantities.values()):
            means = (statistics.mean(source.values(row + suffix, what).values()) for row in ("neither", model))
            cells.append(" → ".join(number(mean, sign=what.metric == "imbalance") for mean in means))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def study_mask_ap() -> str:
    """What each module does to mask AP, which the study does not register, under the published formula."""
    source = registered("box_formula")
    label = ", published formula"
    asked = [c for c in source.study.registered if c.quantity == BOX and c.label.endswith(label)]
    masks = [replace(c, quantity=Quantity.parse("last.mask"), label=c.label.removesuffix(label)) for c in asked]
    found = compare(masks, source.measured, len(source.study.seeds), paired=True)
    texts = (f"with {c.comparison.label} {signed(c.difference)} ({interval(c)})" for c in found)
    return f"Mask AP of the last layer, which the study does not register, differs {', '.join(texts)}."


def study_open_classes() -> str:
    """Lag at the first layer by class in the second miniature."""
    labels = study_named("table_4")  # of its rows with the last cell
    source = registered("box_formula")
    measured = {row.name: source.measured[row.name] for row in labels.variants}
    return lags_by_class(replace(source, study=labels, measured=measured), SOLID, OPEN)


def study_figure_1() -> str:
    """The lag at the first and at the last layer, and what both modules change."""
    source = registered("figure_1")
    lines = [
        "| | first layer: box AP | mask AP | lag, 95 % interval | last layer: box AP | mask AP | lag, 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in source.study.variants:
        cells = []
        for layer in ("first", "last"):
            values = {
                what: source.values(row.name, Quantity.parse(f"{layer}.{what}")).values()
                for what in ("box", "mask", "imbalance")
            }
            cells += [number(statistics.mean(values[what])) for what in ("box", "mask")]
            cells.append(_mean_with_interval(list(values["imbalance"])))
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", comparison_table(source.results, source)])


def study_figure_1_all_seeds() -> str:
    """The same with the seeds that `box_formula` registers for these rows, and the study of figure 1 does not."""
    every = StudyReport.of(study_named("figure_1"), "miniature", FOLDERS["miniature"])
    [lag] = (c for c in every.results if c.comparison.quantity == Quantity.parse("first.imbalance"))
    seeds = min(lag.runs.values())
    return (
        f"With all {seeds} seeds of these rows, the lag at the first layer differs by {signed(lag.difference)} "
        f"({interval(lag)}), adjusted p {show_p(lag.adjusted_p)}."
    )


def study_controls() -> str:
    """De-Imbalance against as many parameters, and against interaction alone."""
    source = registered("controls")
    models = {row.label: Detector(source.study.config(row, source.scale).model) for row in source.study.variants}
    sizes = (f"{label} {sum(p.numel() for p in model.parameters()) / 1e6:.2f}" for label, model in models.items())
    return f"{comparison_table(source.results)}\n\nParameters in millions: {'; '.join(sizes)}."


def study_bato_frozen() -> str:
    """BATO with its initial weights."""
    return comparison_table(registered("bato_frozen").results)


def study_table_3() -> str:
    """The models made harder, with the published differences."""
    source = registered("table_3")
    return comparison_table(source.results, source)


def study_photographs() -> str:
    """Both models on photographs under two formulas, with what true masks allow."""
    source, ceilings = registered("photographs"), measured("ceilings.json")["animals"]
    formulas = {
        suffix: f"`{formula}`; ceiling of boxes {number(ceilings[formula]['mean'])}"
        for suffix, formula in (("_mask2box", "mask2box"), ("", "bitmask"))
    }
    return f"{comparison_table(source.results)}\n\n{_means_by_formula(source, 'di_bato', formulas)}"


def study_bato() -> str:
    """What happens without BATO's outputs at test time, and what its attention is like during the training."""
    runs = list(measured("bato.json").values())
    whole = [run["left_out"]["nothing"] for run in runs]
    stages = list(whole[0])
    later = stages[stages.index(FIRST_LAYER) + 1 :]  # BATO acts after the first layer
    places = [(stage, kind) for kind in ("box", "mask") for stage in later]
    titles = (f"{kind} AP, layer {stage.removeprefix('decoder.')}" for stage, kind in places)
    lines = [f"| left out at test time | {' | '.join(titles)} |", f"|---{'|---' * len(places)}|"]
    for name in runs[0]["left_out"]:
        cells = []
        for stage, kind in places:
            values = [run["left_out"][name][stage][kind] for run in runs]
            if name == "nothing":
                cells.append(_range(values, number))
            else:
                changes = (value - before[stage][kind] for value, before in zip(values, whole, strict=True))
                cells.append(_range(changes, signed))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    points = [{point["step"]: point for point in run["training"]} for run in runs]
    shown = [step for step in points[0] if step in (100, 200, 500, 1000)]
    lines += ["", f"| step | {' | '.join(map(str, shown))} |", f"|---{'|---' * len(shown)}|"]
    source = registered("bato_frozen")
    guiding_tokens = source.study.config(source.study.variant("di_bato"), source.scale).model.bato.guiding_tokens
    for what, label in (("rank", f"effective rank, at most {guiding_tokens}"), ("entropy", "entropy, at most 1")):
        cells = (_range((found[step][what] for found in points), lambda value: number(value, 2)) for step in shown)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: Iterable[float], form: Callable[[float], str]) -> str:
    found = sorted(values)
    return f"{form(found[0])} to {form(found[-1])}"


def _mean_with_interval(values: list[float]) -> str:
    """Mean and its 95 % interval over trainings."""
    mean, n = statistics.mean(values), len(values)
    interval = Interval.around(mean, statistics.variance(values) / n, n - 1)
    return f"{signed(mean)} ({signed(interval.low)} to {signed(interval.high)})"


BLOCKS = (
    study_reach,
    study_pilot,
    study_box_formula,
    study_formulas,
    study_mask_ap,
    study_open_classes,
    study_figure_1,
    study_figure_1_all_seeds,
    study_controls,
    study_bato_frozen,
    study_table_3,
    study_photographs,
    study_bato,
)
