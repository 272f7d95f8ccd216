"""The paper's intermediates over the image: selected tokens, sampling points, guidance, feature tokens.

`look` is an image and the model's predictions for it (`dimaskdino.inspection.look`).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor
from torchvision.ops import box_convert

from dimaskdino.data.painting import GREY, ORANGE, colour_of
from dimaskdino.inspection.look import Look
from dimaskdino.inspection.objects import token_owners
from dimaskdino.modeling.stages import FIRST_LAYER
from dimaskdino.modeling.structures import BATOOutput, FeatureLevels, SelectedTokens
from dimaskdino.utils.errors import UserError
from dimaskdino.viz.style import add_boxes, panels, show_image, style

_MARKERS = ("o", "s", "^", "D")  # one a level, finest first


def boxes_in_pixels(look: Look, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Convert boxes from cxcywh relative to the padded input to xyxy in pixels of the image."""
    return look.pixels(box_convert(boxes, "cxcywh", "xyxy").view(-1, 2, 2)).flatten(1)


def show_map(axes: Axes, look: Look, values: Tensor, **options: Any) -> AxesImage:
    """Show values (h, w) or colours (h, w, 3) of the padded input over the image."""
    right, bottom = look.pixels(torch.ones(2)).tolist()
    return axes.imshow(values, extent=(0, right, bottom, 0), **options)


def _finest_first(levels: FeatureLevels) -> list[int]:
    """Numbers of the feature levels, from the finest to the coarsest."""
    return sorted(range(len(levels.strides)), key=lambda number: levels.strides[number])


@style()
def draw_selection(look: Look, k: Sequence[int] = ()) -> Figure:
    """Draw the feature tokens that each selection keeps, and their boxes: the best `k` of each, all by default."""
    selections = look.trace.T_s
    figure, columns = panels(1, len(selections), 5.2 * len(selections), 5.4)
    for number, (axes, tokens) in enumerate(zip(columns, selections, strict=True)):
        kept = tokens.scores.shape[1]
        count = min(k[number], kept) if k else kept
        title = f"$T_{{s{number + 1}}}$: {count} tokens and their boxes"
        show_image(axes, look.sample.image, title, dim=0.45, parse_math=True)
        boxes = boxes_in_pixels(look, tokens.boxes[0][:count])
        add_boxes(axes, boxes, colour_of(number), 0.7, alpha=0.55)
        _scatter_tokens(look, axes, tokens, count, colour_of(number))
        add_boxes(axes, look.sample.boxes, "black", 1.8)
    figure.supxlabel("black: true boxes    marker: level, ○ finest, then □ △ ◇", fontsize=10)
    return figure


def _scatter_tokens(look: Look, axes: Axes, tokens: SelectedTokens, count: int, colour: str) -> None:
    """The places of the best tokens, with a marker for each level."""
    levels, chosen = look.trace.T_i, tokens.indices[0, :count]
    level_of = torch.repeat_interleave(torch.arange(len(levels.sizes)), torch.tensor(levels.sizes))[chosen]
    places = look.pixels(levels.centres()[chosen])
    for marker, number in zip(_MARKERS, _finest_first(levels), strict=False):
        x, y = places[level_of == number].T.numpy()
        axes.scatter(x, y, s=34, marker=marker, color=colour, edgecolors="white", linewidths=0.6, zorder=3)


@style()
def draw_interaction(look: Look) -> Figure:
    """Draw the attention among the tokens of T_s1, sorted by the object that they lie on.

    Blocks along the diagonal mean that tokens of one object look at each other.
    """
    attention = look.trace.interaction_attention[0][0]
    owner = token_owners(look, look.trace.T_s1)
    order = owner.argsort(stable=True)
    ratio = attention[order][:, order] * attention.shape[-1]
    figure, [axes] = panels(1, 1, 6.4, 5.6)
    image = axes.imshow(ratio, cmap="cividis", vmin=0, vmax=max(2.0, float(ratio.quantile(0.99))))
    figure.colorbar(image, label="attention, times the mean")
    ends = owner.unique(return_counts=True)[1].cumsum(0)
    for end in ends[:-1].tolist():
        axes.axhline(end - 0.5, color="white", linewidth=0.8)
        axes.axvline(end - 0.5, color="white", linewidth=0.8)
    axes.set(xlabel="key token", ylabel="query token", xticks=[], yticks=[])
    axes.set_title("Token interaction, layer 1: tokens sorted by object")
    axes.grid(False)
    return figure


@style()
def draw_sampling(look: Look, layer: int, query: int, head: int | None = None) -> Figure:
    """Draw the sampling points and weights of one query of a decoder layer in the feature levels.

    Args:
        look: an image and the model's predictions for it.
        layer: decoder layer, from 0.
        query: row of the queries.
        head: one head; all of them, in one colour each, by default.
    """
    locations, weights = look.trace.sampling[layer]  # (B, Q, heads, levels, points, 2), (B, Q, heads, levels, points)
    locations, weights = locations[0, query], weights[0, query]
    levels = look.trace.T_i if layer == 0 or look.trace.T_bal is None else look.trace.T_bal
    heads = list(range(locations.shape[0])) if head is None else [head]
    box = boxes_in_pixels(look, look.trace.references[layer][0, query][None])
    figure, columns = panels(1, len(levels.sizes), 3.6 * len(levels.sizes), 4.1)
    for axes, level in zip(columns, _finest_first(levels), strict=True):
        part = float(weights[heads, level].sum() / weights[heads].sum())
        show_image(axes, look.sample.image, f"stride {levels.strides[level]}: {part:.0%} of the weight", dim=0.5)
        _draw_cells(look, axes, levels.shapes[level])
        add_boxes(axes, box, "black", 1.5)
        for number in heads:
            x, y = look.pixels(locations[number, level]).T.numpy()
            size = 20 + 900 * weights[number, level].numpy()
            axes.scatter(x, y, s=size, color=colour_of(number), alpha=0.75, edgecolors="white", zorder=3)
    text = "colour: head" if head is None else f"head {head + 1}"
    of = f"query {query} in decoder layer {layer + 1}, black: its reference box"
    figure.supxlabel(f"{of}    {text}    size: attention weight", fontsize=10)
    return figure


def _draw_cells(look: Look, axes: Axes, shape: tuple[int, int]) -> None:
    """The grid of a feature level."""
    right, bottom = look.pixels(torch.ones(2)).tolist()
    lines = []
    for x in torch.linspace(0, right, shape[1] + 1).tolist():
        lines.append([(x, 0), (x, bottom)])
    for y in torch.linspace(0, bottom, shape[0] + 1).tolist():
        lines.append([(0, y), (right, y)])
    axes.add_collection(LineCollection(lines, colors=GREY, linewidths=0.3, alpha=0.6))


def _bato(look: Look) -> BATOOutput:
    if look.trace.bato is None:
        raise UserError("the model has no BATO, whose tokens and features this figure draws")
    return look.trace.bato


@style()
def draw_guidance(look: Look, token: int) -> Figure:
    """Draw the attention of every feature token to a guiding token of BATO, per level; token 0 is the best."""
    bato, levels = _bato(look), look.trace.T_i
    attention = cast(Tensor, bato.attention)
    parts = (attention[0, :, token] * attention.shape[-1]).split(levels.sizes)
    row = cast(Tensor, bato.guiding_indices)[0, token]
    box = boxes_in_pixels(look, look.predictions.stages[FIRST_LAYER].boxes[0, row][None])
    highest = max(2.0, float(attention[0, :, token].max()) * attention.shape[-1])
    figure, columns = panels(1, len(parts), 3.6 * len(parts) + 0.6, 4.1)
    for axes, level in zip(columns, _finest_first(levels), strict=True):
        show_image(axes, look.sample.image, f"stride {levels.strides[level]}")
        heat = parts[level].view(levels.shapes[level])
        shown = show_map(axes, look, heat, cmap="cividis", alpha=0.75, vmin=0, vmax=highest)
        add_boxes(axes, box, ORANGE, 1.8)
    figure.colorbar(shown, ax=columns, label="attention, times the mean")
    figure.supxlabel(f"guiding token {token + 1}: orange, the box of its query after decoder layer 1", fontsize=10)
    return figure


@style()
def draw_token_maps(look: Look) -> Figure:
    """Draw the tokens of the finest level before and after BATO as colours (principal components), and their change."""
    stride = min(look.trace.T_i.strides)
    before, after = look.trace.T_i.map(stride)[0], _bato(look).T_bal.map(stride)[0]  # (C, h, w)
    figure, axes = panels(1, 4, 14.4, 3.9)
    show_image(axes[0], look.sample.image, "image")
    for each, picture, name in zip(axes[1:3], _as_colours(before, after), ("T_i", r"T_{bal}"), strict=True):
        each.imshow(picture)
        each.set_title(f"${name}$ at stride {stride}, as colours", parse_math=True)
    moved = axes[3].imshow((after - before).norm(dim=0) / before.norm(dim=0), cmap="cividis")
    axes[3].set_title(r"$|T_{bal} - T_i| \,/\, |T_i|$", parse_math=True)
    figure.colorbar(moved, ax=axes[3])
    for each in axes[1:]:
        each.set_axis_off()
    return figure


@style()
def draw_mask_features(look: Look, query: int) -> Figure:
    """Draw the mask features before and after BATO, and the mask of one query of the last layer with each."""
    maps = look.trace.mask_features[0], _bato(look).mask_features[0]  # (C, h, w)
    last, image = look.predictions.last, look.sample.image
    embedding = cast(Tensor, last.mask_embedding)[0, query]
    figure, axes = panels(1, 5, 17.5, 3.9)
    show_image(axes[0], image, f"query {query} of the last layer")
    for number, (colours, features, name) in enumerate(zip(_as_colours(*maps), maps, ("$F$", "$F'$"), strict=True)):
        mask = torch.einsum("c,chw->hw", embedding, features).sigmoid()
        show_image(axes[1 + number], image, f"mask features {name}, as colours", parse_math=True)
        show_map(axes[1 + number], look, colours)
        show_image(axes[3 + number], image, f"its mask in {name}", parse_math=True)
        shown = show_map(axes[3 + number], look, mask, cmap="cividis", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes[4], label="probability")
    for each in axes:
        add_boxes(each, boxes_in_pixels(look, last.boxes[0, query][None]), ORANGE, 1.5)
    return figure


def _as_colours(*maps: Tensor) -> list[Tensor]:
    """Maps (C, h, w) as pictures (h, w, 3): their first three principal components, the same for all of them."""
    vectors = torch.cat([x.flatten(1).T for x in maps])
    centred = vectors - vectors.mean(0)
    colours = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    colours = ((colours - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    parts = colours.split([x[0].numel() for x in maps])
    return [part.view(*x.shape[1:], 3) for part, x in zip(parts, maps, strict=True)]
