"""Figures of the instruments (`dimaskdino.inspection.diagnostics`), for one or several models by name."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dimaskdino.data.painting import CYCLE, GREY, data_label
from dimaskdino.inspection.diagnostics import Calibration, GradientConflict, Survey, query_stability
from dimaskdino.viz.curves import short_name
from dimaskdino.viz.style import BOX, MASK, NotebookFigure, style

_LINES = ("-", "--", ":", "-.")


def plot_imbalance_by_group(models: Mapping[str, Mapping[str, Mapping[str, float]]], title: str) -> Figure:
    """Plot `AP_mask − AP_box` at every stage: one line per group of objects, one panel per model.

    Args:
        models: by the name to show, what `imbalance_by_group` returns.
        title: above all panels.
    """
    with style():
        figure = NotebookFigure(figsize=(5.2 * len(models), 3.8), layout="constrained")
        panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, (label, groups) in zip(panels, models.items(), strict=True):
            names = list(dict.fromkeys(stage for stages in groups.values() for stage in stages))
            for number, (group, stages) in enumerate(groups.items()):
                x = [names.index(stage) for stage in stages]
                axes.plot(
                    x,
                    list(stages.values()),
                    marker="os^Dv<>p"[number % 8],
                    color=CYCLE[number % 8],
                    label=data_label(group),
                )
            axes.axhline(0, color="black", linewidth=0.8)
            _stages(axes, names)
            axes.set(title=label)
            axes.legend(fontsize=9)
        panels[0].set(ylabel="mask − box (points)")
        figure.suptitle(title)
    return figure


def _stages(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), [short_name(name) for name in names], fontsize=8)


def plot_matched_queries(models: Mapping[str, Survey]) -> Figure:
    """Plot mean box and mask IoU of the matched queries per stage, and the fraction of objects that keep their query.

    Args:
        models: surveys by the name to show: a line style each.
    """
    names = list(max((survey_result.matched.stages for survey_result in models.values()), key=len))
    with style():
        figure = NotebookFigure(figsize=(12, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        for number, (label, survey_result) in enumerate(models.items()):
            stages, line = survey_result.matched.stages, _LINES[number % 4]
            for kind, colour, marker in (("box", BOX, "s"), ("mask", MASK, "o")):
                means = getattr(survey_result.matched, f"{kind}_iou").mean(1).numpy()
                x = [names.index(stage) for stage in stages]
                keep = ~np.isnan(means)
                left.plot(
                    np.array(x)[keep], means[keep], line, marker=marker, color=colour, label=f"{label}: {kind} IoU"
                )
            stable = query_stability(survey_result.matched)
            layers = [int(stage.partition(".")[2]) for stage in stable]
            right.plot(layers, list(stable.values()), line, marker="D", color=CYCLE[2 + number % 6], label=label)
            right.set_xticks(layers, [f"{layer - 1 or 'input'} → {layer}" for layer in layers])
        _stages(left, names)
        left.set(ylabel="mean IoU", title="Boxes and masks of the matched queries", ylim=(0, 1))
        right.set(
            ylabel="share of the objects",
            xlabel="decoder layers",
            title="Objects that keep their query",
            ylim=(0, 1.02),
        )
        left.legend(fontsize=9)
        right.legend(fontsize=9)
    return figure


def plot_selection_recall(models: Mapping[str, Survey]) -> Figure:
    """Plot the fraction of objects with at least one token, after each selection.

    Args:
        models: surveys by the name to show.
    """
    selections = list(dict.fromkeys(name for survey_result in models.values() for name in survey_result.recall))
    width = 0.8 / len(models)
    with style():
        figure = NotebookFigure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for number, (label, survey_result) in enumerate(models.items()):
            x = [selections.index(name) + (number - (len(models) - 1) / 2) * width for name in survey_result.recall]
            shares = [float(kept.float().mean()) for kept in survey_result.recall.values()]
            bars = axes.bar(x, shares, width * 0.92, color=CYCLE[number % 8], label=label)
            axes.bar_label(bars, [f"{share:.2f}" for share in shares], padding=2, fontsize=9)
        texts = {"T_i": "$T_i$: all tokens"}
        axes.set_xticks(
            range(len(selections)),
            [texts.get(n, f"$T_{{{n.removeprefix('T_')}}}$") for n in selections],
            parse_math=True,
        )
        axes.set(ylabel="share of the objects", title="Objects with at least one token on them", ylim=(0, 1.12))
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure


def plot_guidance_rank(models: Mapping[str, Survey], guiding_tokens: int) -> Figure:
    """Plot the effective rank of BATO's attention per image.

    Args:
        models: surveys by the name to show; those without BATO are left out.
        guiding_tokens: how many there are, the largest rank possible.
    """
    with style():
        figure = NotebookFigure(figsize=(6, 3.2), layout="constrained")
        axes = figure.subplots()
        for number, (label, survey_result) in enumerate(models.items()):
            if len(survey_result.guidance_rank):
                ranks = survey_result.guidance_rank.numpy()
                text = f"{label}: mean {ranks.mean():.1f} of {guiding_tokens}"
                axes.hist(ranks, bins=20, color=CYCLE[number % 8], alpha=0.6, label=text)
                axes.axvline(ranks.mean(), color=CYCLE[number % 8])
        axes.set(xlabel="effective rank of the guidance attention", ylabel="images", title="What guides the tokens")
        if axes.has_data():
            axes.legend(fontsize=9)
    return figure


def plot_gradient_conflict(models: Mapping[str, Mapping[str, Sequence[GradientConflict]]]) -> Figure:
    """Plot the norms of the gradients of box and mask losses per part of the model, and their cosine.

    Args:
        models: by the name to show, `Survey.conflict`: batches by part of the model. Bars show means over the batches,
            thin lines the cosines' standard deviation.
    """
    parts = list(dict.fromkeys(part for survey_result in models.values() for part in survey_result))
    width = 0.8 / len(models)
    with style():
        figure = NotebookFigure(figsize=(12, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (label, survey_result) in enumerate(models.items()):
            # a part that a loss sends no gradient to in a batch has neither ratio nor direction there
            usable = {part: [c for c in some if not np.isnan(c.cosine)] for part, some in survey_result.items()}
            usable = {part: some for part, some in usable.items() if some}
            x = np.array([parts.index(part) for part in usable]) + (number - (len(models) - 1) / 2) * width
            ratios = [np.mean([c.box_norm / c.mask_norm for c in some]) for some in usable.values()]
            cosines = [np.mean([c.cosine for c in some]) for some in usable.values()]
            spread = [np.std([c.cosine for c in some]) for some in usable.values()]
            colour = CYCLE[number % 8]
            left.bar(x, ratios, width * 0.92, color=colour, label=label)
            right.bar(x, cosines, width * 0.92, yerr=spread, ecolor=GREY, color=colour, label=label)
        for axes in (left, right):
            axes.set_xticks(range(len(parts)), [part.replace("_", "\n") for part in parts], fontsize=8)
            axes.grid(axis="x", visible=False)
            axes.legend(fontsize=9)
        left.axhline(1, color="black", linewidth=0.8)
        left.set(
            yscale="log", ylabel="box norm / mask norm", title="Strength of the box losses against the mask losses"
        )
        right.axhline(0, color="black", linewidth=0.8)
        right.set(ylabel="cosine", title="Direction: below 0 they conflict")
    return figure


def plot_calibration(models: Mapping[str, Mapping[str, Calibration]]) -> Figure:
    """Plot the fraction of right detections against their score, one panel per model.

    Args:
        models: by the name to show, calibrations by name; one that begins with `box` or `mask` gives the colour, the
            rest of it the line.
    """
    with style():
        figure = NotebookFigure(figsize=(4.6 * len(models), 4.2), layout="constrained")
        panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, (label, survey_result) in zip(panels, models.items(), strict=True):
            lines: dict[str, str] = {}
            axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
            for name, measured in survey_result.items():
                kind, _, rest = name.partition(",")
                line = lines.setdefault(rest, _LINES[len(lines) % 4])
                colour = {"box": BOX, "mask": MASK}.get(kind, GREY)
                text = f"{name}: error {measured.error:.2f}"
                axes.plot(measured.score, measured.precision, line, marker="o", markersize=4, color=colour, label=text)
            axes.set(title=label, xlabel="score", xlim=(0, 1), ylim=(0, 1.02))
            axes.legend(fontsize=8, loc="upper left")
        panels[0].set(ylabel="share of right detections")
        figure.suptitle("Calibration: are scores what they seem?")
    return figure
