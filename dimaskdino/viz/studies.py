"""Figures of studies: variants of a model side by side, and what they differ by."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.studies.comparison import Difference
from dimaskdino.viz.curves import short_name, stage_order
from dimaskdino.viz.style import BOX, CYCLE, GREY, MASK, NotebookFigure, style


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
    """Plot box AP, mask AP and the imbalance at every stage for variants of a model: mean and standard deviation.

    Args:
        rows: the results of each variant's runs by the name to show; variants without any are left out.
        title: above all panels.
    """
    names = stage_order(result for results in rows.values() for result in results)
    with style():
        figure = NotebookFigure(figsize=(max(9.0, 1.2 * len(names)), 7.2), layout="constrained")
        panels = figure.subplots(2, 2)
        panels[1, 1].set_axis_off()
        for axes, what in zip(panels.flat, ("box AP (%)", "mask AP (%)", "mask − box (points)"), strict=False):
            for number, (label, results) in enumerate(rows.items()):
                values = {name: _at(results, name, what) for name in names}
                x = [i for i, name in enumerate(names) if values[name]]
                means = np.array([statistics.mean(values[names[i]]) for i in x])
                spread = np.array([_deviation(values[names[i]]) for i in x])
                colour = CYCLE[number % len(CYCLE)]
                axes.plot(x, means, marker="os^Dv<>p"[number % 8], color=colour, label=f"{label} ({len(results)})")
                axes.fill_between(x, means - spread, means + spread, color=colour, alpha=0.15, linewidth=0)
            axes.set(ylabel=what)
            axes.set_xticks(range(len(names)), [short_name(name) for name in names], fontsize=8)
        panels[1, 0].axhline(0, color="black", linewidth=0.8)
        if rows:
            handles, labels = panels[0, 0].get_legend_handles_labels()
            panels[1, 1].legend(handles, labels, loc="center", title="mean (runs), band: standard deviation")
        figure.suptitle(title)
    return figure


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


def plot_differences(panels: Mapping[str, Mapping[str, tuple[Difference, Mapping[str, float]]]], title: str) -> Figure:
    """Plot differences between variants: each seed, the mean with its intervals, and the published difference.

    Args:
        panels: for each quantity's label, by the name of the comparison, the difference and the published ones by
            column; at least one.
        title: above all panels.
    """
    names = list(dict.fromkeys(name for outcome in panels.values() for name in outcome))
    place = {name: len(names) - 1 - i for i, name in enumerate(names)}
    columns = list(dict.fromkeys(c for outcome in panels.values() for _, there in outcome.values() for c in there))
    with style():
        across = min(3, len(panels))
        down = -(-len(panels) // across)
        size = (3.4 * across + 2.6, (0.75 * len(names) + 1.3) * down + 0.7)
        figure = NotebookFigure(figsize=size, layout="constrained")
        grid = iter(figure.subplots(down, across, sharey=True, squeeze=False).ravel())
        for (label, outcome), axes in zip(panels.items(), grid, strict=False):
            for name, (difference, published) in outcome.items():
                y = place[name]
                for interval, shift, width, colour in (
                    (difference.over_seeds, -0.1, 2.0, GREY),
                    (difference.over_images, 0.1, 5.0, BOX),
                ):
                    if interval:
                        axes.plot(
                            [interval.low, interval.high], [y + shift] * 2, color=colour, linewidth=width, alpha=0.6
                        )
                seeds = list(difference.by_seed.values())
                axes.plot(seeds, [y] * len(seeds), "o", color="black", markersize=4, markerfacecolor="none")
                axes.plot(difference.mean, y, "|", color="black", markersize=16, markeredgewidth=2)
                for number, column in enumerate(columns):
                    if column in published:
                        axes.plot(published[column], y + 0.28, "D^v"[number % 3], color=MASK, markersize=6)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set(title=label, xlabel="points", ylim=(-0.6, len(names) - 0.3))
            axes.margins(x=0.1)
        for axes in grid:  # places that are left over
            axes.remove()
        figure.axes[0].set_yticks(list(place.values()), names)
        axes = figure.axes[0]
        marks = [
            axes.plot([], [], "|", color="black", markersize=12, markeredgewidth=2, label="mean")[0],
            axes.plot([], [], "o", color="black", markersize=4, markerfacecolor="none", label="a seed")[0],
            axes.plot([], [], color=BOX, linewidth=5, alpha=0.6, label="95 % over images")[0],
            axes.plot([], [], color=GREY, linewidth=2, alpha=0.6, label="95 % over trainings")[0],
            *(
                axes.plot([], [], "D^v"[i % 3], color=MASK, label=f"published, {column}")[0]
                for i, column in enumerate(columns)
            ),
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=min(6, len(marks)), fontsize=9)
        figure.suptitle(title)
    return figure
