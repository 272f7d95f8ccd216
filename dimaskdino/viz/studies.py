"""Figures of studies: variants of a model side by side, and what they differ by."""

import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dimaskdino.data.painting import CYCLE, GREY, data_label
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.studies.comparison import ComparisonResult
from dimaskdino.studies.report import StudyReport
from dimaskdino.viz.curves import short_name, stage_order
from dimaskdino.viz.style import BOX, MASK, NotebookFigure, style

MARKERS, LINES = "os^Dv<>p", ("-", "--", ":", "-.")
MOST_BANDS = 6  # variants; more bands hide each other
LONGEST_ROW = 48  # characters of a label beside a line


def study_figures(report: StudyReport) -> dict[str, Figure]:
    """The figures of a study by name: `rows`, `differences` if rows are compared, and `layers`."""
    study, labels = report.study, {row.name: row.label for row in report.study.variants}
    columns = {
        f"{name}, published": {row: [(v["last.box"], v["last.mask"])] for row, v in rows.items()}
        for name, rows in report.published.items()
    }
    columns[f"{report.scale}, measured"] = {
        row: [(m.result.last.box.AP, m.result.last.mask.AP) for m in runs.values()]
        for row, runs in report.measured.items()
    }
    figures = {"rows": plot_ablation(labels, columns, f"{study.title}: last layer")}
    if report.results:
        pairs = [(found, report.published_differences(found.comparison)) for found in report.results]
        figures["differences"] = plot_differences(pairs, f"{study.title}: differences")
    by_label = {labels[row]: [m.result for m in runs.values()] for row, runs in report.measured.items()}
    return figures | {"layers": plot_study_layers(by_label, f"{study.title}: every stage")}


def plot_ablation(
    rows: Mapping[str, str], columns: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], title: str
) -> Figure:
    """Plot box and mask AP of variants of a model, one panel per source; a bar marks the mean of several runs.

    Args:
        rows: labels by row name, from top to bottom.
        columns: by the name to show, (box AP, mask AP) of every run of each row; rows without any are left empty.
        title: above all panels.
    """
    place = {name: len(rows) - 1 - i for i, name in enumerate(rows)}
    with style():
        figure = NotebookFigure(figsize=(3.6 * len(columns) + 2.2, 0.62 * len(rows) + 1.9), layout="constrained")
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, (column, outcome) in zip(panels, columns.items(), strict=True):
            for kind, (colour, marker, shift) in enumerate(((BOX, "s", 0.14), (MASK, "o", -0.14))):
                for name, values in outcome.items():
                    x, y = [pair[kind] for pair in values], place[name] + shift
                    axes.plot(x, [y] * len(x), marker, color=colour, alpha=0.55 if len(x) > 1 else 1, markersize=7)
                    if len(x) > 1:
                        axes.plot([np.mean(x)] * 2, [y - 0.16, y + 0.16], color=colour, linewidth=2.5)
                axes.plot([], [], marker, color=colour, label=("box", "mask")[kind])
            axes.set(title=column, xlabel="AP (%)", ylim=(-0.6, len(rows) - 0.4))
            axes.margins(x=0.1)
            if not outcome:
                axes.set(xticks=[], xlabel="nothing measured")
        panels[0].set_yticks(list(place.values()), list(rows.values()))
        panels[-1].legend(loc="best")
        figure.suptitle(title)
    return figure


def plot_study_layers(rows: Mapping[str, Sequence[LayerwiseAP]], title: str) -> Figure:
    """Plot the imbalance at every stage for variants of a model, large, beside box and mask AP on one scale.

    Lines are means over the runs; bands, of up to six variants, are standard deviations. The dotted line is the upper
    bound of masks where a result has one (`evaluation.upper_bounds`). Variants of two factors, named `A, x`, `A, y`,
    `B, x`, …, have a colour for the first and a line style for the second.

    Args:
        rows: the results of each variant's runs by the name to show; variants without any are left out.
        title: above all panels.
    """
    names = stage_order(result for results in rows.values() for result in results)
    strokes = _strokes(rows)
    with style():
        figure = NotebookFigure(figsize=(max(12.0, 1.5 * len(names)), 6.4), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.45))
        box = figure.add_subplot(grid[0, 0])
        mask = figure.add_subplot(grid[1, 0], sharex=box, sharey=box)
        imbalance = figure.add_subplot(grid[:, 1])
        for axes, what in ((box, "box AP (%)"), (mask, "mask AP (%)"), (imbalance, "mask − box (points)")):
            ends: list[tuple[float, float, str, dict[str, Any]]] = []
            for label, results in rows.items():
                values = {name: _at(results, name, what) for name in names}
                x = [i for i, name in enumerate(names) if values[name]]
                if not x:
                    continue
                means = np.array([statistics.mean(values[names[i]]) for i in x])
                spread = np.array([_deviation(values[names[i]]) for i in x])
                runs = f"{len(results)} run{'s' if len(results) > 1 else ''}"
                axes.plot(x, means, **strokes[label], label=f"{label} ({runs})")
                if len(rows) <= MOST_BANDS:
                    band = {"color": strokes[label]["color"], "alpha": 0.15, "linewidth": 0}
                    axes.fill_between(x, means - spread, means + spread, **band)
                ends.append((x[-1], means[-1], f"{data_label(label, LONGEST_ROW)} ({runs})", strokes[label]))
            axes.set(ylabel=what)
            axes.set_xticks(range(len(names)), [short_name(name) for name in names], fontsize=8)
            if axes is not imbalance:
                axes.tick_params("x", labelsize=7.5, labelrotation=40)
            else:
                axes.axhline(0, color="black", linewidth=0.8)
                _label_lines(axes, ends)
        mask.autoscale_view()
        limits = {r.upper_bounds.mask.mean for results in rows.values() for r in results if r.upper_bounds is not None}
        for limit in limits - {None}:
            _mark_upper_bound(mask, limit)
        figure.suptitle(title)
    return figure


def _mark_upper_bound(axes: Any, limit: float) -> None:
    """A dotted line at an upper bound, or a note where the curves end far below it."""
    low, high = axes.get_ylim()
    if limit < high + 0.5 * (high - low):
        axes.axhline(limit, color=GREY, linestyle=":")
        axes.text(0, limit, f"upper bound, masks {limit:.0f}", color=GREY, fontsize=8.5, va="bottom")
    else:
        axes.text(0.02, 0.95, f"upper bound, masks {limit:.0f}", color=GREY, fontsize=8.5, transform=axes.transAxes)


def _strokes(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each variant's line."""
    names = list(labels)
    parts = [tuple(name.split(", ", 1)) for name in names]
    first, second = (list(dict.fromkeys(part[end] for part in parts)) for end in (0, -1))
    factors = all(len(part) == 2 for part in parts) and len(first) * len(second) == len(names) > len(second)
    found = {}
    for number, (name, part) in enumerate(zip(names, parts, strict=True)):
        at, dashes = (first.index(part[0]), second.index(part[1])) if factors else (number, 0)
        look = {"color": CYCLE[at % len(CYCLE)], "marker": MARKERS[at % len(MARKERS)]}
        found[name] = look | {"linestyle": LINES[dashes % len(LINES)]}
    return found


def _label_lines(axes: Any, ends: Sequence[tuple[float, float, str, dict[str, Any]]]) -> None:
    """Write each line's label beside its last point (x, y, text, look), moved apart where they would overlap."""
    if not ends:
        return
    low, high = axes.get_ylim()
    places, step, lowest = [], 0.05 * (high - low), -np.inf
    for _, y, _, _ in sorted(ends, key=lambda end: end[1]):
        lowest = max(y, lowest + step)
        places.append(lowest)
    raised = statistics.mean(places) - statistics.mean(y for _, y, _, _ in ends)
    right = max(x for x, *_ in ends) + 0.1
    for (x, y, text, look), place in zip(sorted(ends, key=lambda end: end[1]), places, strict=True):
        line = {"arrowstyle": "-", "color": look["color"], "linestyle": look["linestyle"], "relpos": (0, 0.5)}
        where = {"textcoords": "data", "va": "center", "annotation_clip": False, "arrowprops": line}
        axes.annotate(text, (x, y), (right + 0.35, place - raised), color=look["color"], fontsize=9.5, **where)
    axes.set_xlim(right=right)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _at(results: Sequence[LayerwiseAP], stage: str, what: str) -> list[float]:
    """The values at a stage of those runs that have one."""
    stages = [result.stages[stage] for result in results if stage in result.stages]
    if what.startswith("mask −"):
        outcome = [stage.imbalance for stage in stages]
    elif what.startswith("mask"):
        outcome = [stage.mask.AP if stage.mask else None for stage in stages]
    else:
        outcome = [stage.box.AP for stage in stages]
    return [value for value in outcome if value is not None]


def plot_differences(comparisons: Sequence[tuple[ComparisonResult, Mapping[str, float]]], title: str) -> Figure:
    """Plot differences between variants with their intervals, one panel per quantity, beside the published differences.

    All panels have one scale, so that a point of AP has the same length everywhere.

    Args:
        comparisons: each comparison with the published differences by column; at least one.
        title: above all panels.
    """
    names = list(dict.fromkeys(found.comparison.label for found, _ in comparisons))
    place = {name: len(names) - 1 - i for i, name in enumerate(names)}
    columns = list(dict.fromkeys(column for _, published in comparisons for column in published))
    quantities = list(dict.fromkeys(found.comparison.quantity for found, _ in comparisons))
    with style():
        across = min(3, len(quantities))
        down = -(-len(quantities) // across)
        size = (3.2 * across + 3.4, (0.62 * len(names) + 1.3) * down + 0.7)
        figure = NotebookFigure(figsize=size, layout="constrained")
        grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
        for quantity, axes in zip(quantities, grid, strict=False):
            for found, published in comparisons:
                if found.comparison.quantity != quantity:
                    continue
                y = place[found.comparison.label]
                for interval, width, colour in ((found.joint, 2.0, GREY), (found.over_images, 6.0, BOX)):
                    if interval:
                        ends = [interval.low, interval.high]
                        axes.plot(ends, [y] * 2, color=colour, linewidth=width, alpha=0.6, solid_capstyle="butt")
                axes.plot(found.difference, y, "|", color="black", markersize=14, markeredgewidth=2)
                for number, column in enumerate(columns):
                    if column in published:
                        axes.plot(published[column], y + 0.28, "D^v"[number % 3], color=MASK, markersize=6)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set(title=quantity.label, xlabel="points", ylim=(-0.6, len(names) - 0.4))
            axes.xaxis.set_tick_params(labelbottom=True)
            axes.margins(x=0.06)
        for axes in grid[len(quantities) :]:  # places that are left over
            axes.remove()
        axes = figure.axes[0]
        axes.set_yticks(list(place.values()), [textwrap.fill(name, 26, break_on_hyphens=False) for name in names])
        marks = [
            axes.plot([], [], "|", color="black", markersize=12, markeredgewidth=2, label="difference of the means")[0],
            axes.plot([], [], color=GREY, linewidth=2, alpha=0.6, label="95 %, trainings and images")[0],
            axes.plot([], [], color=BOX, linewidth=6, alpha=0.6, label="95 %, images alone")[0],
            *(
                axes.plot([], [], "D^v"[i % 3], color=MASK, label=f"published, {column}")[0]
                for i, column in enumerate(columns)
            ),
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=min(5, len(marks)), fontsize=9)
        figure.suptitle(title)
    return figure
