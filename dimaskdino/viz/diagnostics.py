"""Figures of the diagnostics (`dimaskdino.inspection.diagnostics`).

`models` has the results of one or several models by the name to show.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dimaskdino.data.painting import GREY, colour_of, data_label
from dimaskdino.inspection.diagnostics import GradientConflict, Survey, query_stability
from dimaskdino.viz.curves import places, stage_ticks
from dimaskdino.viz.style import KINDS, LINES, bar_places, panels, style


@style()
def plot_imbalance_by_group(models: Mapping[str, Mapping[str, Mapping[str, float]]], title: str) -> Figure:
    """Plot results of `imbalance_by_group` at every stage: one line per group of objects, one panel per model."""
    figure, columns = panels(1, len(models), 5.2 * len(models), 3.8, sharey=True)
    for axes, (label, groups) in zip(columns, models.items(), strict=True):
        names = list(dict.fromkeys(stage for stages in groups.values() for stage in stages))
        for number, (group, stages) in enumerate(groups.items()):
            x = places(stages, names)
            look: dict[str, Any] = {"marker": "os^Dv<>p"[number % 8], "color": colour_of(number)}
            axes.plot(x, list(stages.values()), label=data_label(group), **look)
        axes.axhline(0, color="black", linewidth=0.8)
        stage_ticks(axes, names, 8)
        axes.set(title=label)
        axes.legend(fontsize=9)
    columns[0].set(ylabel="imbalance (points)")
    figure.suptitle(title)
    return figure


@style()
def plot_matched_queries(models: Mapping[str, Survey]) -> Figure:
    """Plot mean box and mask IoU of the matched queries per stage, and how many objects keep their query."""
    names = max((list(survey.matched.stages) for survey in models.values()), key=len)
    figure, (left, right) = panels(1, 2, 12, 3.8, width_ratios=[3, 2])
    for number, (label, survey) in enumerate(models.items()):
        line = LINES[number % len(LINES)]
        for kind, colour, marker in KINDS:
            ious = survey.matched.box_iou if kind == "box" else survey.matched.mask_iou
            x = places(survey.matched.stages, names)
            left.plot(x, ious.mean(1), line, marker=marker, color=colour, label=f"{label}: {kind} IoU")
        stable = query_stability(survey.matched)
        layers = [int(stage.partition(".")[2]) for stage in stable]
        right.plot(layers, list(stable.values()), line, marker="D", color=colour_of(2 + number % 6), label=label)
        right.set_xticks(layers, [f"{layer - 1 or 'input'} → {layer}" for layer in layers])
    stage_ticks(left, names, 8)
    left.set(ylabel="mean IoU", title="Boxes and masks of the matched queries", ylim=(0, 1))
    right.set(ylabel="fraction of the objects", xlabel="decoder layers", ylim=(0, 1.02))
    right.set_title("Objects that keep their query")
    left.legend(fontsize=9)
    right.legend(fontsize=9)
    return figure


@style()
def plot_selection_recall(models: Mapping[str, Survey]) -> Figure:
    """Plot the fraction of objects with at least one token, after each selection."""
    selections = list(dict.fromkeys(name for survey in models.values() for name in survey.recall))
    figure, [axes] = panels(1, 1, 6, 3.6)
    for number, (label, survey) in enumerate(models.items()):
        x, width = bar_places(places(survey.recall, selections), number, len(models))
        fractions = [float(kept.float().mean()) for kept in survey.recall.values()]
        bars = axes.bar(x, fractions, 0.92 * width, color=colour_of(number), label=label)
        axes.bar_label(bars, fmt="{:.2f}", padding=2, fontsize=9)
    names = [f"$T_{{{name.removeprefix('T_')}}}$" for name in selections]
    names[selections.index("T_i")] = "$T_i$: all tokens"
    axes.set_xticks(range(len(selections)), names, parse_math=True)
    axes.set(ylabel="fraction of the objects", title="Objects with at least one token on them", ylim=(0, 1.12))
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure


@style()
def plot_guidance_rank(models: Mapping[str, Survey], guiding_tokens: int) -> Figure:
    """Plot the effective rank of BATO's attention per image; the largest rank is the number of guiding tokens."""
    figure, [axes] = panels(1, 1, 6, 3.2)
    for number, (label, survey) in enumerate(models.items()):
        if len(survey.guidance_rank):
            ranks = survey.guidance_rank.numpy()
            text = f"{label}: mean {ranks.mean():.1f} of {guiding_tokens}"
            axes.hist(ranks, bins=20, color=colour_of(number), alpha=0.6, label=text)
            axes.axvline(ranks.mean(), color=colour_of(number))
    axes.set(xlabel="effective rank of the guidance attention", ylabel="images", title="Rank of the guidance")
    if axes.has_data():
        axes.legend(fontsize=9)
    return figure


@style()
def plot_gradient_conflict(models: Mapping[str, Mapping[str, Sequence[GradientConflict]]]) -> Figure:
    """Plot the ratio of the gradient norms of box and mask losses per part of the model, and their cosine.

    Bars are means over the batches of `Survey.conflict`, thin lines the standard deviation of the cosines.
    """
    parts = list(dict.fromkeys(part for conflicts in models.values() for part in conflicts))
    figure, (left, right) = panels(1, 2, 12, 4)
    for number, (label, conflicts) in enumerate(models.items()):
        shown, ratios, cosines, spread = [], [], [], []
        for part, batches in conflicts.items():
            # where a loss sends no gradient to a part there is neither ratio nor direction
            usable = [batch for batch in batches if not np.isnan(batch.cosine)]
            if usable:
                shown.append(part)
                ratios.append(np.mean([batch.box_norm / batch.mask_norm for batch in usable]))
                cosines.append(np.mean([batch.cosine for batch in usable]))
                spread.append(np.std([batch.cosine for batch in usable]))
        x, width = bar_places(places(shown, parts), number, len(models))
        left.bar(x, ratios, 0.92 * width, color=colour_of(number), label=label)
        right.bar(x, cosines, 0.92 * width, yerr=spread, ecolor=GREY, color=colour_of(number))
    for axes in (left, right):
        axes.set_xticks(range(len(parts)), [part.replace("_", "\n") for part in parts], fontsize=8)
        axes.grid(axis="x", visible=False)
    left.legend(fontsize=9)
    left.axhline(1, color="black", linewidth=0.8)
    left.set(yscale="log", ylabel="box norm / mask norm", title="Gradient norm of the box losses over the mask losses'")
    right.axhline(0, color="black", linewidth=0.8)
    right.set(ylabel="cosine", title="Cosine of the two gradients: below 0 they conflict")
    return figure
