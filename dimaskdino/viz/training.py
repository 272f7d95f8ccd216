"""How the model is trained: matching, losses, denoising queries."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import box_convert

from dimaskdino.data.painting import BLUE, GREY, SKY, colour_of, colours_of, data_label
from dimaskdino.modeling.denoising import DenoisingQueries
from dimaskdino.viz.curves import places, stage_ticks, stage_title
from dimaskdino.viz.style import KINDS, LINES, add_boxes, panels, show_image, style


def _pixels(image: Tensor, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Convert boxes from cxcywh in [0, 1] to xyxy in pixels of the image."""
    height, width = image.shape[-2:]
    return box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([width, height, width, height])


@style()
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
    queries, objects = torch.tensor(pairs).view(-1, 2).T
    colours = colours_of(objects.tolist())
    cheapest = cost.min(1).values.argsort(stable=True)[: max(12, 2 * len(pairs))].tolist()
    shown = list(dict.fromkeys(queries.tolist() + cheapest))
    figure, (left, right) = panels(1, 2, 13.5, 4.8, width_ratios=[1, 1.7])
    show_image(left, image, "solid: objects, dashed: the queries matched to them")
    add_boxes(left, _pixels(image, truth[objects]), colours, 1.8)
    add_boxes(left, _pixels(image, found[queries]), colours, 1.8, linestyles="--")
    table = right.imshow(cost[shown].T, cmap="cividis_r", aspect="auto")
    figure.colorbar(table, label="cost")
    cells = torch.stack([torch.arange(len(pairs)), objects], dim=1)  # the matched queries stand first
    add_boxes(right, torch.cat([cells - 0.5, cells + 0.5], dim=1), colours, 2.5)
    right.set_xticks(range(len(shown)), shown, fontsize=8, rotation=90)
    right.set_yticks(range(cost.shape[1]), [f"object {i + 1}" for i in range(cost.shape[1])])
    right.set(xlabel="query: the matched ones, then those with the lowest costs", title="frames: the matching")
    right.grid(False)
    return figure


@style()
def plot_loss_terms(losses: Mapping[str, float]) -> Figure:
    """Plot the weighted losses of a batch, by `stage/term` as in `Losses.terms`, one bar per stage."""
    stages = list(dict.fromkeys(name.rpartition("/")[0] for name in losses))
    figure, [axes] = panels(1, 1, 10, 0.34 * len(stages) + 1.4)
    left = np.zeros(len(stages))
    terms = list(dict.fromkeys(name.rpartition("/")[2] for name in losses))
    for number, term in enumerate(terms):
        values = np.array([losses.get(f"{stage}/{term}", 0.0) for stage in stages])
        axes.barh(range(len(stages)), values, left=left, color=colour_of(number), label=data_label(term))
        left += values
    names = []
    for stage in stages:
        plain = stage.removeprefix("denoising.")
        names.append(stage_title(plain) if plain == stage else f"denoising: {stage_title(plain)}")
    axes.set_yticks(range(len(stages)), names)
    axes.invert_yaxis()
    axes.set(xlabel="weighted loss", title="Weighted losses of one batch, by stage")
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=len(terms), loc="lower right")
    return figure


@style()
def draw_denoising(image: Tensor, truth: Tensor, denoising: DenoisingQueries, objects: int) -> Figure:
    """Draw the noised boxes of some groups over the image, and the attention mask of the decoder's self-attention.

    Args:
        image: (3, h, w) uint8 RGB.
        truth: (M, 4) true boxes, cxcywh in [0, 1].
        denoising: the denoising queries of this image.
        objects: M, how many queries a group has.
    """
    noised = denoising.queries.boxes[0].view(denoising.groups, objects, 4)
    shown, rows = min(3, denoising.groups), denoising.groups * objects
    colours = colours_of(range(objects))
    figure, axes = panels(1, shown + 1, 3.6 * shown + 5, 4.2, width_ratios=[1] * shown + [1.35])
    for group in range(shown):
        show_image(axes[group], image, f"group {group + 1} of {denoising.groups}")
        add_boxes(axes[group], _pixels(image, truth[:objects]), colours, 1.8)
        add_boxes(axes[group], _pixels(image, noised[group]), colours, 1.8, linestyles=":")
    mask = axes[-1]
    mask.imshow(denoising.attention_mask.numpy(), cmap=ListedColormap([SKY, "white"]), vmin=0, vmax=1)
    mask.axhline(rows - 0.5, color=BLUE, linewidth=1)
    mask.axvline(rows - 0.5, color=BLUE, linewidth=1)
    mask.set(xlabel="is looked at", ylabel="looks", title="self-attention: blue is allowed")
    places = [rows / 2, rows + (len(denoising.attention_mask) - rows) / 2]
    mask.set_xticks(places, ["denoising", "matching"])
    mask.set_yticks(places, ["denoising", "matching"], rotation=90, va="center")
    mask.grid(False)
    mask.spines[:].set_visible(True)
    mask.spines[:].set_color(GREY)
    text = "solid: objects    dotted: their noised copies, which the decoder learns to restore"
    figure.supxlabel(text, fontsize=10)
    return figure


@style()
def plot_trainings(groups: Mapping[str, Sequence[Mapping[str, Any]]], steps: int) -> Figure:
    """Plot recorded trainings: the loss on the left, box and mask AP of every stage on the right.

    Args:
        groups: by label, records of trainings with other seeds. Each has `loss`, means over equal numbers of steps, and
            `stages`, with `box` and `mask` AP by stage; the lines are means over the seeds.
        steps: of each training.
    """
    stages = max((list(runs[0]["stages"]) for runs in groups.values()), key=len)
    figure, (left, right) = panels(1, 2, 13, 4.6, width_ratios=[1, 1.35])
    for number, (label, runs) in enumerate(groups.items()):
        colour, name = colour_of(number), data_label(label)
        for place, run in enumerate(runs):
            passed = (np.arange(len(run["loss"])) + 0.5) * steps / len(run["loss"])
            left.plot(passed, run["loss"], color=colour, linewidth=1.2, label=None if place else name)
        for (kind, _, marker), line in zip(KINDS, LINES, strict=False):
            x = places(runs[0]["stages"], stages)
            values = [[ap[kind] for ap in run["stages"].values()] for run in runs]  # None where there are no masks
            y = np.array(values, dtype=float).mean(0)
            right.plot(x, y, line, marker=marker, color=colour, label=f"{name}: {kind}", markersize=5)
    left.set(xlabel="step", ylabel="loss", yscale="log", title="loss, means over steps")
    left.yaxis.set_major_formatter("{x:.0f}")
    left.yaxis.set_minor_formatter("{x:.0f}")
    left.legend(fontsize=9)
    stage_ticks(right, stages)
    right.set(ylabel="AP", ylim=(0, None), title="AP at every stage")
    right.legend(fontsize=9, loc="lower right")
    return figure
