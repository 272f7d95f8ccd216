"""Figures of the error analysis (`dimaskdino.evaluation.error_analysis`)."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from dimaskdino.data.painting import data_label
from dimaskdino.evaluation.coco_ap import Kind
from dimaskdino.evaluation.error_analysis import KINDS, Confusion, TideAnalysis
from dimaskdino.viz.curves import short_name
from dimaskdino.viz.style import BOX, MASK, NotebookFigure, style

MOST_CLASSES = 20  # with a row of their own in a confusion matrix


def plot_error_analysis(stages: Mapping[str, Mapping[Kind, TideAnalysis]]) -> Figure:
    """Plot how many points of AP at IoU 0.5 each kind of error costs, for boxes and masks.

    Args:
        stages: by stage, the analysis of boxes and of masks; one panel per stage.
    """
    names = list(KINDS)
    with style():
        figure = NotebookFigure(figsize=(4.6 * len(stages) + 1.2, 3.6), layout="constrained")
        panels = figure.subplots(1, len(stages), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (stage, kinds) in zip(panels, stages.items(), strict=True):
            height = 0.8 / len(kinds)
            for number, (kind, analysis) in enumerate(kinds.items()):
                places = np.arange(len(names)) + (number - (len(kinds) - 1) / 2) * height
                values = [analysis.lost[name] for name in names]
                label = f"{kind}: {analysis.ap:.1f} AP50"
                bars = axes.barh(places, values, height, color={"box": BOX, "mask": MASK}[kind], label=label)
                axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=2, fontsize=8)
            axes.set_title(short_name(stage).replace("\n", " "))
            axes.set_xlabel("AP50 gained if corrected (points)")
            axes.legend(fontsize=9, loc="lower right")
            axes.margins(x=0.15)
        panels[0].set_yticks(range(len(names)), list(KINDS.values()))
        panels[0].invert_yaxis()
        figure.suptitle("AP lost by kind of error")
    return figure


def plot_confusion(confused: Confusion) -> Figure:
    """Plot what became of the objects of each class, in percent of the class.

    Args:
        confused: the counts. With more than `MOST_CLASSES` classes, those with the most confusions are shown.
    """
    matrix, count = confused.matrix, len(confused.classes)
    wrong = matrix[:count, :count].sum(1) - np.diag(matrix)[:count]
    chosen = np.sort(np.argsort(-wrong, kind="stable")[:MOST_CLASSES])
    rows = matrix[chosen][:, [*chosen, count]]
    other = matrix[chosen].sum(1) - rows.sum(1)
    share = 100 * np.column_stack([rows[:, :-1], other, rows[:, -1]]) / np.maximum(matrix[chosen].sum(1), 1)[:, None]
    names = [data_label(confused.classes[i]) for i in chosen]
    columns = [*names, "another class", "missed"]
    if not other.any():
        share, columns = np.delete(share, -2, axis=1), [*names, "missed"]
    side = 0.5 * len(columns) + 2.2
    with style():
        figure = NotebookFigure(figsize=(side + 0.6, 0.5 * len(names) + 2.2), layout="constrained")
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.5:
                colour = "white" if value > 60 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.grid(False)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(f"Objects of each class, % (scores of {confused.threshold:g} and more)", fontsize=10)
    return figure
