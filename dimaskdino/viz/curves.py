"""Curves over stages, over training steps and over recall."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from dimaskdino.data.painting import GREY, colour_of, data_label
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.modeling.stages import is_decoder, short_name
from dimaskdino.viz.style import BOX, KINDS, LINES, MASK, NotebookFigure, bar_places, panels, style

RUNNING_MEANS = 60  # about this many windows over a long run


def stage_order(results: Iterable[LayerwiseAP]) -> list[str]:
    """The names of all stages that any of the results has, in the order of the model."""
    kinds = ("first_selection", "token_interaction", "decoder")
    names = {name for result in results for name in result.stages}
    return sorted(names, key=lambda name: (kinds.index(name.partition(".")[0]), int(name.partition(".")[2] or 0)))


def places(names: Iterable[str], order: Sequence[str]) -> list[int]:
    """The place of each name in an order."""
    return [order.index(name) for name in names]


def stage_title(stage: str) -> str:
    """A stage's name on one line."""
    return short_name(stage).replace("\n", " ")


def stage_ticks(axes: Axes, stages: Sequence[str], size: float = 9) -> None:
    """Write the names of the stages at the places 0, 1, … of the x axis."""
    axes.set_xticks(range(len(stages)), [short_name(stage) for stage in stages], fontsize=size)


@style()
def plot_layerwise_ap(runs: Mapping[str, LayerwiseAP]) -> Figure:
    """Plot box and mask AP of every stage, and below it the imbalance `AP_mask − AP_box`, for one or several runs.

    Args:
        runs: results by the name to show. One run: boxes and masks in their own colours, with their values. Several:
            one colour per run, boxes solid and masks dashed. Dotted lines are upper bounds on AP
            (`evaluation.upper_bounds`), diamonds the imbalance relative to them.
    """
    names = stage_order(runs.values())
    alone = len(runs) == 1
    figure, (top, bottom) = panels(2, 1, max(7.0, 1.05 * len(names)), 5.6, sharex=True, height_ratios=[3, 1.3])
    for number, (label, result) in enumerate(runs.items()):
        label = data_label(label)
        x = places(result.stages, names)
        aps = {"box": _aps(result, "box"), "mask": _aps(result, "mask")}
        for (kind, own, marker), line in zip(KINDS, LINES, strict=False):
            colour = own if alone else colour_of(number)
            word = {"box": "detection", "mask": "segmentation"}[kind]
            text = f"{word} ({kind}) AP" if alone else f"{label}: {kind}"
            top.plot(x, aps[kind], line, marker=marker, color=colour, label=text)
            if alone:
                _write_values(top, aps[kind], aps["mask" if kind == "box" else "box"], colour)
        _draw_bounds(top, result, names, BOX if alone else colour_of(number))
        _draw_imbalance(bottom, result, names, number, len(runs))
    top.set(ylabel="AP (%)", title="Box and mask AP at every stage")
    top.margins(y=0.15)
    if runs:
        top.legend(loc="lower right")
    bottom.axhline(0, color="black", linewidth=0.8)
    bottom.set(ylabel="imbalance\n(points)")
    stage_ticks(bottom, names, 11)
    bottom.grid(axis="x", visible=False)
    return figure


def _aps(result: LayerwiseAP, kind: str) -> list[float]:
    """The AP of every stage; NaN, a gap in a curve, where a stage predicts no masks."""
    values = []
    for stage in result.stages.values():
        measured = stage.box if kind == "box" else stage.mask
        values.append(np.nan if measured is None or measured.AP is None else measured.AP)
    return values


def _write_values(axes: Axes, values: Sequence[float], others: Sequence[float], colour: str) -> None:
    """Write each value at its point, on the side away from the other curve."""
    for i, (value, other) in enumerate(zip(values, others, strict=True)):
        if not np.isnan(value):
            offset = (0, -15 if value < other else 8)
            axes.annotate(f"{value:.1f}", (i, value), offset, textcoords="offset points", ha="center", color=colour)


def _draw_bounds(axes: Axes, result: LayerwiseAP, names: Sequence[str], colour: str) -> None:
    """Upper bounds of masks along all stages with masks, and of boxes where they are made from masks."""
    limits = result.upper_bounds
    if limits is None:
        return
    lines = []
    with_masks = [name for name, stage in result.stages.items() if stage.mask is not None]
    if with_masks:
        lines.append((names.index(with_masks[0]), names.index(with_masks[-1]), limits.mask.mean, MASK, "masks"))
    for stage, convention in limits.boxes_from_masks.items():
        if stage in result.stages:
            place = names.index(stage)
            lines.append((place, place, limits.box[convention].mean, colour, "boxes"))
    for start, end, value, shade, kind in lines:
        if value is not None:
            axes.plot([start - 0.35, end + 0.35], [value] * 2, ":", color=shade, linewidth=1.6)
            where: dict[str, Any] = {"xy": (start - 0.35, value), "xytext": (0, 3), "textcoords": "offset points"}
            axes.annotate(f"upper bound, {kind} {value:.0f}", color=shade, fontsize=8.5, **where)


def _draw_imbalance(axes: Axes, result: LayerwiseAP, names: Sequence[str], number: int, count: int) -> None:
    """Bars of the imbalance, and diamonds of the imbalance relative to the upper bounds."""
    stages = [name for name, stage in result.stages.items() if stage.imbalance is not None]
    values = np.array([result.stages[name].imbalance for name in stages], dtype=float)
    x, width = bar_places(places(stages, names), number, count)
    colour = GREY if count == 1 else colour_of(number)
    bars = axes.bar(x, values, 0.75 * width, color=colour)
    relative = [result.relative_imbalance(name) for name in stages]
    if any(value is not None for value in relative):
        diamonds: dict[str, Any] = {"marker": "D", "linestyle": "", "markersize": 5, "markerfacecolor": "white"}
        axes.plot(x, np.array(relative, dtype=float), color=colour, **diamonds)
        if number == count - 1:
            axes.legend(axes.plot([], [], color=GREY, **diamonds), ["relative to the upper bounds"], fontsize=8.5)
    if count == 1:
        texts = [f"{round(value, 1) + 0.0:+.1f}" for value in values]  # + 0.0 turns −0.0 into 0.0
        axes.bar_label(bars, texts, padding=2, fontsize=9)
        axes.margins(y=0.3)


@style()
def plot_losses(runs: Mapping[str, Sequence[dict[str, Any]]]) -> Figure:
    """Plot the total loss and all loss terms of the last decoder layer over the steps; long runs as running means.

    Args:
        runs: a run's metrics records (`RunFolder.read_metrics`) by the name to show.
    """
    figure, (left, right) = panels(1, 2, 10, 3.6)
    terms: dict[str, int] = {}  # of all runs, with the number of their colour
    for number, (label, records) in enumerate(runs.items()):
        records = [record for record in records if "loss" in record and "losses" in record]
        if not records:
            continue
        steps, total = [record["step"] for record in records], [record["loss"] for record in records]
        width = max(1, len(records) // RUNNING_MEANS)
        if width > 1:
            left.plot(steps, total, color=colour_of(number), alpha=0.25, linewidth=0.8)
        left.plot(*_running_mean(steps, total, width), color=colour_of(number), label=data_label(label))
        for term, (passed, values) in _last_layer(records).items():
            text = None if term in terms else data_label(term)
            colour = colour_of(terms.setdefault(term, len(terms)))
            right.plot(*_running_mean(passed, values, width), LINES[number % len(LINES)], color=colour, label=text)
    left.set(xlabel="step", ylabel="total loss", title="All stages", yscale="log")
    right.set(xlabel="step", ylabel="weighted loss", title="Last decoder layer", yscale="log")
    for axes in (left, right):
        axes.yaxis.set_major_formatter(_PlainLog(minor_thresholds=(2, 0.4)))
        axes.yaxis.set_minor_formatter(_PlainLog(minor_thresholds=(2, 0.4)))
    left.legend()
    right.legend(ncols=2)
    return figure


def _last_layer(records: Sequence[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and losses of the last decoder layer, by term."""
    stages = {name.partition("/")[0] for name in records[-1]["losses"]}
    last = max((stage for stage in stages if is_decoder(stage)), key=lambda stage: int(stage.partition(".")[2]))
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in record["losses"].items():
            stage, _, term = name.partition("/")
            if stage == last:
                steps, values = curves.setdefault(term, ([], []))
                steps.append(record["step"])
                values.append(value)
    return curves


def _running_mean(steps: Sequence[int], values: Sequence[float], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of `width` neighbours, or of all if there are fewer, at the middle of their steps."""
    width = min(width, len(values))
    weights = np.full(width, 1 / width)
    return np.convolve(steps, weights, "valid"), np.convolve(values, weights, "valid")


class _PlainLog(LogFormatter):
    """Labels of a logarithmic axis as 200 and 0.1 rather than 2 · 10² and 10⁻¹."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


LayerAP = Mapping[str, Mapping[str, float]]


@style()
def plot_first_and_last_layer(figures: Mapping[str, Mapping[str, LayerAP]]) -> Figure:
    """Plot figure 1 of the paper as slopes: box and mask AP of the first and last decoder layer, and the imbalance.

    Args:
        figures: by the title of a group of panels, then by the name of the model: {"first": {"box": AP, "mask": AP},
            "last": {…}}. Models of a group share one AP axis.
    """
    widths = [len(models) for models in figures.values()]
    figure = NotebookFigure(figsize=(2.9 * sum(widths) + 0.6, 3.9), layout="constrained")
    groups = figure.subfigures(1, len(figures), squeeze=False, width_ratios=widths, wspace=0.04)
    for number, (group, (title, models)) in enumerate(zip(groups[0], figures.items(), strict=True)):
        group.suptitle(title, fontweight="bold")
        values = [ap for layers in models.values() for layer in layers.values() for ap in layer.values()]
        margin = max(0.18 * (max(values) - min(values)), 0.5)
        columns = group.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, (name, layers) in zip(columns, models.items(), strict=True):
            _draw_slopes(axes, layers["first"], layers["last"])
            axes.set(title=data_label(name), xlim=(-1.0, 1.42), ylim=(min(values) - margin, max(values) + margin))
        columns[0].set_ylabel("AP (%)" if number == 0 else "")
        columns[0].legend(loc="lower right", fontsize=9, handlelength=1.2)
    return figure


def _draw_slopes(axes: Axes, first: Mapping[str, float], last: Mapping[str, float]) -> None:
    """One model's slopes, with the values at their ends and the imbalance of the first layer at the left."""
    for kind, colour, marker in reversed(KINDS):
        axes.plot([0, 1], [first[kind], last[kind]], marker=marker, color=colour, linewidth=2.2, label=f"{kind} AP")
        for place, values in ((0, first), (1, last)):
            above = values[kind] == max(values.values())
            aligned: dict[str, Any] = {"ha": "left" if place else "center", "va": "bottom" if above else "top"}
            offset = (6 * place, 6 if above else -6)
            where: dict[str, Any] = {"xy": (place, values[kind]), "xytext": offset, "textcoords": "offset points"}
            axes.annotate(f"{values[kind]:.1f}", color=colour, fontsize=10, **where, **aligned)
    axes.plot([-0.16, -0.16], [first["box"], first["mask"]], color=GREY, linewidth=5, solid_capstyle="butt")
    middle, text = (first["box"] + first["mask"]) / 2, f"imbalance\n{first['mask'] - first['box']:+.1f}"
    axes.text(-0.24, middle, text, ha="right", va="center", color=GREY, fontsize=10)
    axes.set_xticks([0, 1], ["first\nlayer", "last\nlayer"])
    axes.grid(axis="x", visible=False)


@style()
def plot_precision_recall(curves: Mapping[str, Float[np.ndarray, "101"]], title: str) -> Figure:
    """Plot precision-recall curves; the legend has the area below each, its AP.

    Args:
        curves: precision at the recalls 0, 0.01, … 1 by the name to show, such as `box, IoU ≥ 0.5`: the kind sets the
            colour, the rest the line.
        title: above the curves.
    """
    figure, [axes] = panels(1, 1, 7.5, 4.6)
    lines: dict[str, str] = {}
    for name, precision in curves.items():
        kind, _, rest = name.partition(",")
        line = lines.setdefault(rest, LINES[len(lines) % len(LINES)])
        text = f"{name}: AP {100 * precision.mean():.1f}"
        axes.plot(np.linspace(0, 1, 101), precision, line, color=BOX if kind == "box" else MASK, label=text)
    axes.set(xlabel="recall", ylabel="precision", title=title, xlim=(0, 1.01), ylim=(0, 1.03))
    axes.legend(loc="lower left")
    return figure
