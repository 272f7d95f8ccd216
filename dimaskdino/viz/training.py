"""How the model is trained: matching, losses, denoising queries."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import box_convert

from dimaskdino.data.painting import BLUE, CYCLE, GREY, SKY, data_label
from dimaskdino.modeling.denoising import DenoisingQueries
from dimaskdino.viz.curves import short_name
from dimaskdino.viz.style import NotebookFigure, style

TERMS = ("label", "l1", "giou", "mask", "dice")


def draw_matching(
    image: Tensor, truth: Tensor, found: Tensor, cost: Float[Tensor, "Q M"], pairs: Sequence[tuple[int, int]]
) -> Figure:
    """Draw the cost of every query for every object, and the pairs with the lowest total.

    Args:
        image: (3, h, w) uint8 RGB.
        truth: (M, 4) true boxes, cxcywh in [0, 1].
        found: (Q, 4) the queries' boxes, cxcywh in [0, 1].
        cost: of each query as the detection of each object.
        pairs: (query, object), one for each object.
    """
    order = np.argsort(cost.min(1).values.numpy(), kind="stable")[: max(12, 2 * len(pairs))]
    shown = [*dict.fromkeys([query for query, _ in pairs] + order.tolist())]
    with style():
        figure = NotebookFigure(figsize=(13.5, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.7])
        _image(left, image, "solid: objects, dashed: the queries matched to them")
        for query, number in pairs:
            _box(left, image, truth[number], CYCLE[number % len(CYCLE)], "-")
            _box(left, image, found[query], CYCLE[number % len(CYCLE)], "--")
        table = right.imshow(cost[shown].T, cmap="cividis_r", aspect="auto")
        figure.colorbar(table, label="cost")
        for query, number in pairs:
            place = (shown.index(query) - 0.5, number - 0.5)
            right.add_patch(Rectangle(place, 1, 1, fill=False, color=CYCLE[number % len(CYCLE)], linewidth=2.5))
        right.set_xticks(range(len(shown)), shown, fontsize=8, rotation=90)
        right.set_yticks(range(cost.shape[1]), [f"object {i + 1}" for i in range(cost.shape[1])])
        right.set(xlabel="query: the matched ones, then those with the least costs", title="frames: the matching")
        right.grid(False)
    return figure


def _image(axes: Axes, image: Tensor, title: str) -> None:
    height, width = image.shape[-2:]
    axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], title=title)
    axes.grid(False)


def _box(axes: Axes, image: Tensor, box: Tensor, colour: str, line: str) -> None:
    height, width = image.shape[-2:]
    x0, y0, x1, y1 = (box_convert(box, "cxcywh", "xyxy") * box.new_tensor([width, height] * 2)).tolist()
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linestyle=line, linewidth=1.8))


def plot_loss_terms(losses: Mapping[str, float], title: str = "Weighted losses of one batch, by stage") -> Figure:
    """Plot the weighted losses, one bar per stage.

    Args:
        losses: by `stage/term`, as `Losses.terms` and the records of a run have them.
        title: above the bars.
    """
    stages = [*dict.fromkeys(name.rpartition("/")[0] for name in losses)]
    with style():
        figure = NotebookFigure(figsize=(10, 0.34 * len(stages) + 1.4), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(stages))
        for colour, term in zip(CYCLE, TERMS, strict=False):
            values = np.array([losses.get(f"{stage}/{term}", 0.0) for stage in stages])
            axes.barh(range(len(stages)), values, left=left, color=colour, label=term)
            left += values
        names = [("denoising: " if s.startswith("denoising.") else "") + short_name(s.removeprefix("denoising."))
                 for s in stages]  # fmt: skip
        axes.set_yticks(range(len(stages)), [name.replace("\n", " ") for name in names])
        axes.invert_yaxis()
        axes.set(xlabel="weighted loss", title=title)
        axes.grid(axis="y", visible=False)
        axes.legend(ncols=len(TERMS), loc="lower right")
    return figure


def draw_denoising(image: Tensor, truth: Tensor, denoising: DenoisingQueries, objects: int) -> Figure:
    """Draw the noised boxes of some groups over the image, and the attention mask of the decoder's self-attention.

    Args:
        image: (3, h, w) uint8 RGB.
        truth: (M, 4) true boxes, cxcywh in [0, 1].
        denoising: the denoising queries of this image.
        objects: M, how many queries a group has.
    """
    noised = denoising.queries.boxes[0].view(denoising.groups, objects, 4)
    shown = min(3, denoising.groups)
    rows = denoising.groups * objects
    with style():
        figure = NotebookFigure(figsize=(3.6 * shown + 5, 4.2), layout="constrained")
        axes = figure.subplots(1, shown + 1, width_ratios=[1] * shown + [1.35], squeeze=False)[0]
        for group in range(shown):
            _image(axes[group], image, f"group {group + 1} of {denoising.groups}")
            for number in range(objects):
                _box(axes[group], image, truth[number], CYCLE[number % len(CYCLE)], "-")
                _box(axes[group], image, noised[group, number], CYCLE[number % len(CYCLE)], ":")
        axes[-1].imshow(denoising.attention_mask.numpy(), cmap=ListedColormap([SKY, "white"]), vmin=0, vmax=1)
        axes[-1].axhline(rows - 0.5, color=BLUE, linewidth=1)
        axes[-1].axvline(rows - 0.5, color=BLUE, linewidth=1)
        axes[-1].set(xlabel="is looked at", ylabel="looks", title="self-attention: blue is allowed")
        places = [rows / 2, rows + (len(denoising.attention_mask) - rows) / 2]
        axes[-1].set_xticks(places, ["denoising", "matching"])
        axes[-1].set_yticks(places, ["denoising", "matching"], rotation=90, va="center")
        axes[-1].grid(False)
        axes[-1].spines[:].set_visible(True)
        axes[-1].spines[:].set_color(GREY)
        figure.supxlabel(
            "solid: objects    dotted: their noised copies, which the decoder learns to restore", fontsize=10
        )
    return figure


def plot_trainings(groups: Mapping[str, Sequence[Mapping[str, Any]]], steps: int) -> Figure:
    """Plot recorded trainings: the loss on the left, box and mask AP of every stage on the right.

    Args:
        groups: by label, records of trainings with other seeds. Each has `loss`, means over equal numbers of steps, and
            `stages`, with `box` and `mask` AP by stage; the lines are means over the seeds.
        steps: of each training.
    """
    stages = max((list(runs[0]["stages"]) for runs in groups.values()), key=len)
    with style():
        figure = NotebookFigure(figsize=(13, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.35])
        for number, (label, runs) in enumerate(groups.items()):
            colour, name = CYCLE[number % len(CYCLE)], data_label(label)
            for place, run in enumerate(runs):
                x = (np.arange(len(run["loss"])) + 0.5) * steps / len(run["loss"])
                left.plot(x, run["loss"], color=colour, linewidth=1.2, label=None if place else name)
            for kind, line, marker in (("box", "-", "s"), ("mask", "--", "o")):
                x = [i for i, stage in enumerate(stages) if runs[0]["stages"].get(stage, {}).get(kind) is not None]
                y = [np.mean([run["stages"][stages[i]][kind] for run in runs]) for i in x]
                right.plot(x, y, line, marker=marker, color=colour, label=f"{name}: {kind}", markersize=5)
        left.set(xlabel="step", ylabel="loss", yscale="log", title="loss, means over steps")
        for formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
            formatter("{x:.0f}")
        left.legend(fontsize=9)
        right.set_xticks(range(len(stages)), [short_name(stage) for stage in stages], fontsize=9)
        right.set(ylabel="AP", ylim=(0, None), title="AP at every stage")
        right.legend(fontsize=9, loc="lower right")
    return figure
