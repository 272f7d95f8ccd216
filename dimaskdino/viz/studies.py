"""Figures of studies: variants of a model side by side, and their differences."""

import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dimaskdino.data.painting import CYCLE, GREY, data_label
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.studies.comparison import ComparisonResult, Quantity
from dimaskdino.studies.report import StudyReport
from dimaskdino.viz.curves import stage_order, stage_ticks
from dimaskdino.viz.style import BOX, KINDS, LINES, MASK, NotebookFigure, panels, style

LAST_BOX, LAST_MASK = Quantity("last", "box"), Quantity("last", "mask")
MARKERS = "os^Dv<>p"
PUBLISHED = "D^v"  # markers of the columns of published numbers
MOST_BANDS = 6  # variants; more bands hide each other
LONGEST_LABEL = 48  # characters beside a line


@style()
def plot_ablation(report: StudyReport) -> Figure:
    """Plot box and mask AP of a study's variants at the last layer: published, then measured, one panel per source.

    Each run has a mark, and several runs have a bar at their mean.
    """
    variants = report.study.variants
    columns: dict[str, dict[str, dict[str, list[float]]]] = {}  # by title, kind and variant
    for column, by_name in report.published.items():
        columns[f"{column}, published"] = {
            "box": {name: [ap["last.box"]] for name, ap in by_name.items()},
            "mask": {name: [ap["last.mask"]] for name, ap in by_name.items()},
        }
    columns[f"{report.scale}, measured"] = {
        "box": {name: list(report.values(name, LAST_BOX).values()) for name in report.measured},
        "mask": {name: list(report.values(name, LAST_MASK).values()) for name in report.measured},
    }
    size = (3.6 * len(columns) + 2.2, 0.62 * len(variants) + 1.9)
    figure, grid = panels(1, len(columns), *size, sharey=True)
    place = {variant.name: len(variants) - 1 - i for i, variant in enumerate(variants)}
    for axes, (column, kinds) in zip(grid, columns.items(), strict=True):
        for (kind, colour, marker), shift in zip(KINDS, (0.14, -0.14), strict=True):
            for name, x in kinds[kind].items():
                y = place[name] + shift
                axes.plot(x, [y] * len(x), marker, color=colour, alpha=0.55 if len(x) > 1 else 1, markersize=7)
                if len(x) > 1:
                    axes.plot([np.mean(x)] * 2, [y - 0.16, y + 0.16], color=colour, linewidth=2.5)
            axes.plot([], [], marker, color=colour, label=kind)
        axes.set(title=column, xlabel="AP (%)", ylim=(-0.6, len(variants) - 0.4))
        axes.margins(x=0.1)
        if not kinds["box"]:
            axes.set(xticks=[], xlabel="nothing measured")
    grid[0].set_yticks(list(place.values()), [variant.label for variant in variants])
    grid[-1].legend(loc="best")
    figure.suptitle(f"{report.study.title}: last layer")
    return figure


@style()
def plot_study_layers(report: StudyReport) -> Figure:
    """Plot the imbalance of a study's variants at every stage, large, beside box and mask AP on one scale.

    Lines are means over the runs; bands, of up to six variants, are standard deviations. Variants without runs are left
    out. Variants of two factors, labelled `A, x`, `A, y`, `B, x`, …, have a colour for the first and a line style for
    the second.
    """
    variants = {}
    for name, runs in report.measured.items():
        variants[report.study.variant(name).label] = [run.result for run in runs.values()]
    names = stage_order(result for results in variants.values() for result in results)
    strokes = _strokes(variants)
    figure = NotebookFigure(figsize=(max(12.0, 1.5 * len(names)), 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.45))
    box = figure.add_subplot(grid[0, 0])
    mask = figure.add_subplot(grid[1, 0], sharex=box, sharey=box)
    imbalance = figure.add_subplot(grid[:, 1])
    for axes, metric in ((box, "box"), (mask, "mask"), (imbalance, "imbalance")):
        ends = []
        for label, results in variants.items():
            x, means, deviations = _by_stage(results, names, metric)
            if len(x):
                axes.plot(x, means, **strokes[label])
                if len(variants) <= MOST_BANDS:
                    band = {"color": strokes[label]["color"], "alpha": 0.15, "linewidth": 0}
                    axes.fill_between(x, means - deviations, means + deviations, **band)
                count = f"{len(results)} run{'s' if len(results) > 1 else ''}"
                ends.append((x[-1], means[-1], f"{data_label(label, LONGEST_LABEL)} ({count})", strokes[label]))
        axes.set(ylabel="imbalance (points)" if metric == "imbalance" else f"{metric} AP (%)")
        stage_ticks(axes, names, 8)
        if metric == "imbalance":
            axes.axhline(0, color="black", linewidth=0.8)
            _label_lines(axes, ends)
        else:
            axes.tick_params("x", labelsize=7.5, labelrotation=40)
    figure.suptitle(f"{report.study.title}: every stage")
    return figure


def _by_stage(
    results: Sequence[LayerwiseAP], names: Sequence[str], metric: str
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Places of the stages that have values, their means and standard deviations over the results."""
    x, means, deviations = [], [], []
    for place, name in enumerate(names):
        values = []
        for result in results:
            found = getattr(result.stages.get(name), metric, None)
            value = found if metric == "imbalance" or found is None else found.AP
            if value is not None:
                values.append(value)
        if values:
            x.append(place)
            means.append(statistics.mean(values))
            deviations.append(statistics.stdev(values) if len(values) > 1 else 0.0)
    return x, np.array(means), np.array(deviations)


def _strokes(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each variant's line."""
    parts = {label: label.partition(", ")[::2] for label in labels}
    firsts = list(dict.fromkeys(first for first, _ in parts.values()))
    seconds = list(dict.fromkeys(second for _, second in parts.values()))
    two_factors = "" not in seconds and len(firsts) * len(seconds) == len(parts) > len(seconds)
    strokes = {}
    for number, (label, (first, second)) in enumerate(parts.items()):
        colour, dashes = (firsts.index(first), seconds.index(second)) if two_factors else (number, 0)
        look = {"color": CYCLE[colour % len(CYCLE)], "marker": MARKERS[colour % len(MARKERS)]}
        strokes[label] = look | {"linestyle": LINES[dashes % len(LINES)]}
    return strokes


def _label_lines(axes: Axes, ends: Sequence[tuple[float, float, str, dict[str, Any]]]) -> None:
    """Write each line's label beside its last point (x, y, text, look), moved apart where they would overlap."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[1])
    low, high = axes.get_ylim()
    places, lowest = [], -np.inf
    for _, y, _, _ in ends:
        lowest = max(y, lowest + 0.05 * (high - low))
        places.append(lowest)
    raised = np.mean(places) - np.mean([end[1] for end in ends])
    right = max(end[0] for end in ends) + 0.1
    for (x, y, text, look), place in zip(ends, places, strict=True):
        line: dict[str, Any] = {
            "arrowstyle": "-",
            "color": look["color"],
            "linestyle": look["linestyle"],
            "relpos": (0, 0.5),
        }
        where: dict[str, Any] = {"textcoords": "data", "va": "center", "annotation_clip": False, "arrowprops": line}
        axes.annotate(text, (x, y), (right + 0.35, place - raised), color=look["color"], fontsize=9.5, **where)
    axes.set_xlim(right=right)


@style()
def plot_differences(report: StudyReport) -> Figure:
    """Plot a study's differences with their intervals, one panel per quantity, beside the published differences.

    All panels have one scale, so that a point of AP has the same length everywhere.

    Raises:
        ValueError: the study has no results of comparisons.
    """
    results = [(result, report.published_differences(result.comparison)) for result in report.results]
    if not results:
        raise ValueError("no comparison of the study has been measured")
    labels = list(dict.fromkeys(result.comparison.label for result, _ in results))
    place = {label: len(labels) - 1 - i for i, label in enumerate(labels)}
    columns = list(dict.fromkeys(column for _, published in results for column in published))
    quantities = list(dict.fromkeys(result.comparison.quantity for result, _ in results))
    across = min(3, len(quantities))
    down = -(-len(quantities) // across)
    size = (3.2 * across + 3.4, (0.62 * len(labels) + 1.3) * down + 0.7)
    figure, grid = panels(down, across, *size, sharex=True, sharey=True)
    for axes in grid[len(quantities) :]:
        axes.remove()
    for quantity, axes in zip(quantities, grid, strict=False):
        for result, published in results:
            if result.comparison.quantity == quantity:
                _draw_difference(axes, place[result.comparison.label], result, published, columns)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=quantity.label, xlabel="points", ylim=(-0.6, len(labels) - 0.4))
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.margins(x=0.06)
    axes = grid[0]
    axes.set_yticks(list(place.values()), [textwrap.fill(label, 26, break_on_hyphens=False) for label in labels])
    marks = axes.plot([], [], "|", color="black", markersize=12, markeredgewidth=2, label="difference of the means")
    marks += axes.plot([], [], color=GREY, linewidth=2, alpha=0.6, label="95 %, trainings and images")
    marks += axes.plot([], [], color=BOX, linewidth=6, alpha=0.6, label="95 %, images alone")
    for marker, column in zip(PUBLISHED, columns, strict=False):
        marks += axes.plot([], [], marker, color=MASK, label=f"published, {column}")
    figure.legend(handles=marks, loc="outside lower center", ncols=min(5, len(marks)), fontsize=9)
    figure.suptitle(f"{report.study.title}: differences")
    return figure


def _draw_difference(
    axes: Axes, y: float, result: ComparisonResult, published: Mapping[str, float], columns: Sequence[str]
) -> None:
    """Draw a difference at the height y with its intervals and published differences."""
    for interval, width, colour in ((result.joint, 2.0, GREY), (result.over_images, 6.0, BOX)):
        if interval:
            ends = [interval.low, interval.high]
            axes.plot(ends, [y] * 2, color=colour, linewidth=width, alpha=0.6, solid_capstyle="butt")
    axes.plot(result.difference, y, "|", color="black", markersize=14, markeredgewidth=2)
    for marker, column in zip(PUBLISHED, columns, strict=False):
        if column in published:
            axes.plot(published[column], y + 0.28, marker, color=MASK, markersize=6)
