"""Curves over decoder layers and over training steps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from dimaskdino.data.painting import CYCLE, GREY, data_label
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.viz.style import BOX, MASK, NotebookFigure, style

RUNNING_MEANS = 60  # about this many windows over a long run
_SHORT = {"first_selection": "first\nselection"}


def short_name(stage: str) -> str:
    """A stage's name for an axis: `decoder.0` is the input of the first layer, `decoder.3` layer 3."""
    if stage == "decoder.0":
        return "decoder\ninput"
    if stage.startswith("decoder."):
        return f"layer {stage.removeprefix('decoder.')}"
    if stage.startswith("token_interaction."):
        return f"token\ninter. {int(stage.removeprefix('token_interaction.')) + 1}"
    return _SHORT.get(stage, stage)


def stage_order(results: Iterable[LayerwiseAP]) -> list[str]:
    """The names of all stages that any of the results has, in the order of the model."""
    names = dict.fromkeys(name for result in results for name in result.stages)
    kinds = ("first_selection", "token_interaction", "decoder")
    parts = {name: name.partition(".") for name in names}
    return sorted(names, key=lambda name: (kinds.index(parts[name][0]), int(parts[name][2] or 0)))


def plot_layerwise_ap(runs: Mapping[str, LayerwiseAP]) -> Figure:
    """Plot box and mask AP of every stage, and below it `AP_mask − AP_box`, for one or several runs.

    Args:
        runs: results by the name to show. One run: boxes and masks in their own colours, values written out.
            Several: one colour per run, boxes solid and masks dashed. Dotted lines are upper bounds on AP
            (`evaluation.upper_bounds`), diamonds the imbalance relative to them.
    """
    names = stage_order(runs.values())
    place = {name: i for i, name in enumerate(names)}
    with style():
        figure = NotebookFigure(figsize=(max(7.0, 1.05 * len(names)), 5.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.3])
        for number, (label, result) in enumerate(runs.items()):
            label = data_label(label)
            alone = len(runs) == 1
            colours = (BOX, MASK) if alone else (CYCLE[number % len(CYCLE)],) * 2
            for kind, colour, line, marker in zip(("box", "mask"), colours, ("-", "--"), ("s", "o"), strict=True):
                # a gap where a stage predicts no masks
                values = [getattr(s, kind).AP if getattr(s, kind) else None for s in result.stages.values()]
                x, y = [place[n] for n in result.stages], [np.nan if v is None else v for v in values]
                text = f"{'detection (box)' if kind == 'box' else 'segmentation (mask)'} AP"
                top.plot(x, y, line, marker=marker, color=colour, label=text if alone else f"{label}: {kind}")
                for i, value in zip(x, values, strict=True):
                    if alone and value is not None:
                        above = value >= _other(result, names[i], kind)
                        offset = (0, 8 if above else -15)
                        top.annotate(
                            f"{value:.1f}", (i, value), offset, textcoords="offset points", ha="center", color=colour
                        )
            _upper_bounds(top, result, place, BOX if alone else colours[0])
            _imbalance(bottom, result, place, number, len(runs), label)
        top.set(ylabel="AP (%)", title="Box and mask AP at every stage")
        top.margins(y=0.15)
        if runs:
            top.legend(loc="lower right")
        bottom.axhline(0, color="black", linewidth=0.8)
        bottom.set(ylabel="mask − box\n(points)")
        bottom.set_xticks(range(len(names)), [short_name(n) for n in names])
        bottom.grid(axis="x", visible=False)
    return figure


def _other(result: LayerwiseAP, stage: str, kind: str) -> float:
    other = getattr(result.stages[stage], "mask" if kind == "box" else "box")
    return (other.AP or 0.0) if other is not None else -1.0


def _upper_bounds(axes: Any, result: LayerwiseAP, place: dict[str, int], colour: str) -> None:
    """The upper bound of masks along all stages with masks, and of boxes where they are bounds of masks."""
    limits = result.upper_bounds
    if limits is None:
        return
    with_masks = [place[name] for name, stage in result.stages.items() if stage.mask is not None]
    lines = (
        [(min(with_masks) - 0.35, max(with_masks) + 0.35, limits.mask.mean, MASK, "upper bound, masks")]
        if with_masks
        else []
    )
    for stage, convention in limits.boxes_from_masks.items():
        if stage in result.stages:
            lines.append(
                (place[stage] - 0.35, place[stage] + 0.35, limits.box[convention].mean, colour, "upper bound, boxes")
            )
    for start, end, value, shade, text in lines:
        if value is not None:
            axes.plot([start, end], [value] * 2, ":", color=shade, linewidth=1.6)
            axes.annotate(
                f"{text} {value:.0f}", (start, value), (0, 3), textcoords="offset points", color=shade, fontsize=8.5
            )


def _imbalance(axes: Any, result: LayerwiseAP, place: dict[str, int], number: int, total: int, label: str) -> None:
    defined = {n: s.imbalance for n, s in result.stages.items() if s.imbalance is not None}
    width = 0.6 / total
    x = np.array([place[n] for n in defined]) + (number - (total - 1) / 2) * width
    colour = GREY if total == 1 else CYCLE[number % len(CYCLE)]
    bars = axes.bar(x, list(defined.values()), width, color=colour, label=label)
    relative = [result.relative_imbalance(name) for name in defined]
    if any(value is not None for value in relative):
        values = [np.nan if value is None else value for value in relative]
        axes.plot(x, values, "D", color=colour, markersize=5, markerfacecolor="white")
        if number == total - 1:
            mark = axes.plot([], [], "D", color=GREY, markersize=5, markerfacecolor="white")
            axes.legend(mark, ["relative to the upper bounds"], loc="best", fontsize=8.5)
    if total == 1:
        # + 0.0 turns a rounded −0.0 into 0.0
        axes.bar_label(bars, [f"{round(v, 1) + 0.0:+.1f}" for v in defined.values()], padding=2, fontsize=9)
        axes.margins(y=0.3)


def plot_losses(runs: Mapping[str, Sequence[dict[str, Any]]]) -> Figure:
    """Plot the total loss and the losses of the last decoder layer over the steps; long runs as running means.

    Args:
        runs: a run's metrics records (`RunFolder.read_metrics`) by the name to show.
    """
    with style():
        figure = NotebookFigure(figsize=(10, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (label, records) in enumerate(runs.items()):
            label = data_label(label)
            records = [record for record in records if "loss" in record]
            steps = [record["step"] for record in records]
            if not records:
                continue
            width = max(1, len(records) // RUNNING_MEANS)
            total = [record["loss"] for record in records]
            if width > 1:
                left.plot(steps, total, color=CYCLE[number % len(CYCLE)], alpha=0.25, linewidth=0.8)
            left.plot(*_running_mean(steps, total, width), color=CYCLE[number % len(CYCLE)], label=label)
            decoder = [name for name in records[-1]["losses"] if name.startswith("decoder.")]
            last = max((name.split("/")[0] for name in decoder), key=lambda s: int(s.split(".")[1]))
            for k, term in enumerate(("label", "l1", "giou", "mask", "dice")):
                values = [record["losses"][f"{last}/{term}"] for record in records]
                right.plot(
                    *_running_mean(steps, values, width),
                    color=CYCLE[k],
                    linestyle=("-", "--", ":", "-.")[number % 4],
                    label=term if number == 0 else None,
                )
        left.set(xlabel="step", ylabel="total loss", title="All stages", yscale="log")
        right.set(xlabel="step", ylabel="weighted loss", title="Last decoder layer", yscale="log")
        for axes in (left, right):
            for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatter(_PlainLog(minor_thresholds=(2, 0.4)))
        left.legend()
        right.legend(ncols=2)
    return figure


def _running_mean(steps: Sequence[int], values: Sequence[float], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of `width` neighbours, at the middle of their steps."""
    weights = np.full(width, 1 / width)
    return np.convolve(steps, weights, "valid"), np.convolve(values, weights, "valid")


class _PlainLog(LogFormatter):
    """Labels of a logarithmic axis as 200 and 0.1 rather than 2 · 10² and 10⁻¹."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


LayerAP = Mapping[str, Mapping[str, float]]


def plot_first_and_last_layer(panels: Mapping[str, Mapping[str, LayerAP]]) -> Figure:
    """Plot figure 1 of the paper as slopes: box and mask AP of the first and last decoder layer, and the imbalance.

    Args:
        panels: by the title of the panel, then by the name of the model: {"first": {"box": AP, "mask": AP},
            "last": {…}}. Panels have AP axes of their own, models in a panel share one.
    """
    with style():
        widths = [len(models) for models in panels.values()]
        figure = NotebookFigure(figsize=(2.6 * sum(widths) + 0.6, 3.9), layout="constrained")
        subfigures = np.atleast_1d(figure.subfigures(1, len(panels), width_ratios=widths, wspace=0.04))
        for number, (part, (title, models)) in enumerate(zip(subfigures, panels.items(), strict=True)):
            part.suptitle(title, fontweight="bold")
            values = [layers[layer][kind] for layers in models.values() for layer in layers for kind in layers[layer]]
            margin = max(0.18 * (max(values) - min(values)), 0.5)
            columns = part.subplots(1, len(models), sharey=True, squeeze=False)[0]
            for axes, (name, layers) in zip(columns, models.items(), strict=True):
                _slopes(axes, layers)
                axes.set(title=data_label(name), xlim=(-0.75, 1.42), ylim=(min(values) - margin, max(values) + margin))
            columns[0].set_ylabel("AP (%)" if number == 0 else "")
            columns[0].legend(loc="lower right", fontsize=9, handlelength=1.2)
    return figure


def _slopes(axes: Any, layers: LayerAP) -> None:
    """One model's slopes, with the values at their ends and the imbalance at the left."""
    first, last = layers["first"], layers["last"]
    for kind, colour, marker in (("mask", MASK, "o"), ("box", BOX, "s")):
        axes.plot([0, 1], [first[kind], last[kind]], marker=marker, color=colour, linewidth=2.2, label=f"{kind} AP")
        for place, values in ((0, first), (1, last)):
            above = values[kind] >= values["box" if kind == "mask" else "mask"]
            axes.annotate(
                f"{values[kind]:.1f}",
                (place, values[kind]),
                (6 if place else 0, 6 if above else -6),
                textcoords="offset points",
                ha="left" if place else "center",
                va="bottom" if above else "top",
                color=colour,
                fontsize=10,
            )
    axes.plot([-0.16, -0.16], [first["box"], first["mask"]], color=GREY, linewidth=5, solid_capstyle="butt")
    middle = (first["box"] + first["mask"]) / 2
    axes.text(-0.24, middle, f"mask −\nbox\n{first['mask'] - first['box']:+.1f}", ha="right", va="center", color=GREY)
    axes.set_xticks([0, 1], ["first\nlayer", "last\nlayer"])
    axes.grid(axis="x", visible=False)


def plot_precision_recall(curves: Mapping[str, Float[np.ndarray, "101"]], title: str) -> Figure:
    """Plot precision-recall curves; the legend has the area below each, its AP.

    Args:
        curves: precision at the recalls 0, 0.01, … 1 by the name to show; a name that begins with `box` or `mask` gives
            the colour, the rest of it the line.
        title: above the curves.
    """
    recall = np.linspace(0, 1, 101)
    lines: dict[str, str] = {}
    with style():
        figure = NotebookFigure(figsize=(7.5, 4.6), layout="constrained")
        axes = figure.subplots()
        for name, precision in curves.items():
            kind, _, rest = name.partition(",")
            line = lines.setdefault(rest, ("-", "--", ":", "-.")[len(lines) % 4])
            colour = {"box": BOX, "mask": MASK}.get(kind, GREY)
            axes.plot(recall, precision, line, color=colour, label=f"{name}: AP {100 * precision.mean():.1f}")
        axes.set(xlabel="recall", ylabel="precision", title=title, xlim=(0, 1.01), ylim=(0, 1.03))
        axes.legend(loc="lower left")
    return figure
