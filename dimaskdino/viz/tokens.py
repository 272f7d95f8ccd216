"""The paper's intermediates over the image: selected tokens, sampling points, guidance, feature tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import box_convert

from dimaskdino.data.painting import CYCLE, GREY, ORANGE
from dimaskdino.inspection.look import Look
from dimaskdino.inspection.objects import token_owners
from dimaskdino.modeling.structures import SelectedTokens
from dimaskdino.viz.style import NotebookFigure, style

_MARKERS = ("o", "s", "^", "D")  # one a level, finest first


def draw_image(look: Look, axes: Axes, title: str, dim: float = 0.0) -> None:
    """The image with its pixels as coordinates, optionally faded towards white."""
    height, width = look.sample.image.shape[-2:]
    canvas = look.sample.image.permute(1, 2, 0).numpy() / 255
    axes.imshow(canvas + (1 - canvas) * dim, extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.grid(False)
    axes.set_title(title, parse_math=True)


def _boxes(look: Look, boxes: Tensor) -> np.ndarray:
    """Relative cxcywh (n, 4) to pixels x, y, w, h."""
    corners = look.pixels(box_convert(boxes, "cxcywh", "xyxy").view(-1, 2, 2))
    return torch.cat([corners[:, 0], corners[:, 1] - corners[:, 0]], dim=1).numpy()


def _scatter_tokens(look: Look, axes: Axes, tokens: SelectedTokens, colour: str, size: float, keep: Tensor) -> None:
    levels = look.trace.T_i
    assert levels is not None
    level_of = torch.repeat_interleave(torch.arange(len(levels.sizes)), torch.tensor(levels.sizes))
    places, level = look.pixels(levels.centres()), level_of[tokens.indices[0]]
    fine_first = sorted(range(len(levels.strides)), key=lambda i: levels.strides[i])
    for marker, number in zip(_MARKERS, fine_first, strict=False):
        x, y = places[tokens.indices[0][keep & (level == number)]].T.numpy()
        axes.scatter(x, y, s=size, marker=marker, color=colour, edgecolors="white", linewidths=0.6, zorder=3)


def draw_selection(look: Look, selections: Sequence[int] = (0, 1), k: Sequence[int] | None = None) -> Figure:
    """Draw the feature tokens that each selection keeps, and their boxes.

    Args:
        look: an image and what the model made of it.
        selections: which of `Trace.T_s` to show, one panel each: 0 is T_s1.
        k: how many of the best tokens of each to show; all if None.
    """
    chosen = [number for number in selections if number < len(look.trace.T_s)]
    with style():
        figure = NotebookFigure(figsize=(5.2 * len(chosen), 5.4), layout="constrained")
        for axes, number in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
            tokens = look.trace.T_s[number]
            count = tokens.scores.shape[1] if k is None else min(k[number], tokens.scores.shape[1])
            shown = torch.arange(tokens.scores.shape[1]) < count
            draw_image(look, axes, f"$T_{{s{number + 1}}}$: {count} tokens and their boxes", dim=0.45)
            x, y, w, h = _boxes(look, tokens.boxes[0][shown]).T
            outlines = np.stack([x, y, x + w, y, x + w, y + h, x, y + h, x, y], axis=1).reshape(-1, 5, 2)
            axes.add_collection(LineCollection(list(outlines), colors=CYCLE[number], linewidths=0.7, alpha=0.55))
            _scatter_tokens(look, axes, tokens, CYCLE[number], 34, shown)
            for x0, y0, x1, y1 in look.sample.boxes.tolist():
                axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="black", linewidth=1.8))
        figure.supxlabel("black: true boxes    marker: level, ○ finest, then □ △ ◇", fontsize=10)
    return figure


def draw_interaction(look: Look, layer: int = 0) -> Figure:
    """Draw the attention among the tokens of T_s1, sorted by the object that they lie on.

    Blocks along the diagonal mean that tokens of one object look at each other.
    """
    attention = look.trace.interaction_attention[layer][0]
    owner = token_owners(look, look.trace.T_s1)
    order = owner.argsort(stable=True)
    with style():
        figure = NotebookFigure(figsize=(6.4, 5.6), layout="constrained")
        axes = figure.subplots()
        ratio = attention[order][:, order] * attention.shape[-1]
        image = axes.imshow(ratio, cmap="cividis", vmin=0, vmax=max(2.0, float(ratio.quantile(0.99))))
        figure.colorbar(image, label="attention, times the mean")
        ends = owner[order].bincount().cumsum(0) if (owner >= 0).all() else (owner[order] + 1).bincount().cumsum(0)
        for end in ends[:-1].tolist():
            axes.axhline(end - 0.5, color="white", linewidth=0.8)
            axes.axvline(end - 0.5, color="white", linewidth=0.8)
        axes.set(
            xlabel="token that is looked at", ylabel="token that looks", xticks=[], yticks=[],
            title=f"Token interaction, layer {layer + 1}: tokens sorted by object",
        )  # fmt: skip
        axes.grid(False)
    return figure


def draw_sampling(look: Look, layer: int, query: int, head: int | None = None) -> Figure:
    """Draw the sampling points and weights of one query of a decoder layer in the feature levels.

    Args:
        look: an image and what the model made of it.
        layer: decoder layer, from 0.
        query: row of the queries.
        head: one head, or all of them in one colour each.
    """
    locations, weights = (x[0, query] for x in look.trace.sampling[layer])  # (heads, levels, points[, 2])
    levels = look.trace.T_i if layer == 0 or look.trace.T_bal is None else look.trace.T_bal
    assert levels is not None
    heads = range(locations.shape[0]) if head is None else [head]
    order = sorted(range(len(levels.strides)), key=lambda i: levels.strides[i])
    box = _boxes(look, look.trace.references[layer][0, query][None])[0]
    with style():
        figure = NotebookFigure(figsize=(3.6 * len(order), 4.1), layout="constrained")
        for axes, level in zip(figure.subplots(1, len(order), squeeze=False)[0], order, strict=True):
            share = float(weights[list(heads), level].sum() / weights[list(heads)].sum())
            draw_image(look, axes, f"stride {levels.strides[level]}: {share:.0%} of the weight", dim=0.5)
            _cells(look, axes, levels.shapes[level])
            axes.add_patch(Rectangle(box[:2], *box[2:], fill=False, color="black", linewidth=1.5))
            for number in heads:
                x, y = look.pixels(locations[number, level]).T.numpy()
                size = 20 + 900 * weights[number, level].numpy()
                axes.scatter(x, y, s=size, color=CYCLE[number % len(CYCLE)], alpha=0.75, edgecolors="white", zorder=3)
        text = "colour: head" if head is None else f"head {head + 1}"
        of = f"query {query} in decoder layer {layer + 1}, black: its reference box"
        figure.supxlabel(f"{of}    {text}    size: attention weight", fontsize=10)
    return figure


def _cells(look: Look, axes: Axes, shape: tuple[int, int]) -> None:
    rows, columns = shape
    far = look.pixels(torch.ones(2)).tolist()
    vertical = [[(far[0] * i / columns, 0), (far[0] * i / columns, far[1])] for i in range(columns + 1)]
    horizontal = [[(0, far[1] * i / rows), (far[0], far[1] * i / rows)] for i in range(rows + 1)]
    axes.add_collection(LineCollection(vertical + horizontal, colors=GREY, linewidths=0.3, alpha=0.6))


def draw_guidance(look: Look, token: int) -> Figure:
    """Draw the attention of every feature token to one guiding token of BATO, per level.

    Args:
        look: an image and what a model with BATO made of it.
        token: number of the guiding token, best first.
    """
    attention, levels = look.trace.guidance_attention, look.trace.T_i
    assert attention is not None
    assert levels is not None
    assert look.trace.guiding_indices is not None
    parts = (attention[0, :, token] * attention.shape[-1]).split(levels.sizes)
    order = sorted(range(len(levels.strides)), key=lambda i: levels.strides[i])
    row = int(look.trace.guiding_indices[0, token])
    box = _boxes(look, look.predictions.stages["decoder.1"].boxes[0, row][None])[0]
    highest = max(2.0, max(float(p.max()) for p in parts))
    far = look.pixels(torch.ones(2)).tolist()
    with style():
        figure = NotebookFigure(figsize=(3.6 * len(order) + 0.6, 4.1), layout="constrained")
        row_axes = figure.subplots(1, len(order), squeeze=False)[0]
        for axes, level in zip(row_axes, order, strict=True):
            draw_image(look, axes, f"stride {levels.strides[level]}")
            heat = parts[level].view(levels.shapes[level])
            shown = axes.imshow(heat, extent=(0, far[0], far[1], 0), cmap="cividis", alpha=0.75, vmin=0, vmax=highest)
            axes.set(xlim=(0, look.sample.image.shape[-1]), ylim=(look.sample.image.shape[-2], 0))
            axes.add_patch(Rectangle(box[:2], *box[2:], fill=False, color=ORANGE, linewidth=1.8))
        figure.colorbar(shown, ax=row_axes, label="attention, times the mean")
        figure.supxlabel(f"guiding token {token + 1}: orange, the box of its query after decoder layer 1", fontsize=10)
    return figure


def draw_token_maps(look: Look, stride: int = 8) -> Figure:
    """Feature tokens of one level as pictures: three principal components as colours, and how far BATO moves them."""
    before, after = look.trace.T_i, look.trace.T_bal
    assert before is not None
    assert after is not None
    a, b = (levels.map(stride)[0].permute(1, 2, 0) for levels in (before, after))  # (h, w, C)
    with style():
        figure = NotebookFigure(figsize=(14.4, 3.9), layout="constrained")
        axes = figure.subplots(1, 4)
        draw_image(look, axes[0], "image")
        for each, picture, name in zip(axes[1:3], _as_colours(a, b), ("T_i", r"T_{bal}"), strict=True):
            each.imshow(picture)
            each.set_title(f"${name}$ at stride {stride}, as colours", parse_math=True)
        moved = axes[3].imshow((b - a).norm(dim=-1) / a.norm(dim=-1), cmap="cividis")
        axes[3].set_title(r"$|T_{bal} - T_i| \,/\, |T_i|$", parse_math=True)
        figure.colorbar(moved, ax=axes[3])
        for each in axes[1:]:
            each.set(xticks=[], yticks=[])
            each.grid(False)
    return figure


def _as_colours(*maps: Tensor) -> list[Tensor]:
    """Maps (h, w, C) as pictures (h, w, 3): their first three principal components, the same for all of them."""
    both = torch.cat([x.flatten(0, 1) for x in maps])
    centred = both - both.mean(0)
    colours = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    colours = ((colours - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    parts = colours.split([x.shape[0] * x.shape[1] for x in maps])
    return [part.view(*x.shape[:2], 3) for part, x in zip(parts, maps, strict=True)]


def draw_mask_features(look: Look, query: int) -> Figure:
    """Draw the mask features before and after BATO, and the mask of one query of the last layer with each.

    Args:
        look: an image and what a model with BATO made of it.
        query: row of the queries.
    """
    before, after = look.trace.mask_features, look.trace.mask_features_bal
    last = look.predictions.last
    assert before is not None
    assert after is not None
    assert last.mask_embedding is not None
    pictures = _as_colours(*(x[0].permute(1, 2, 0) for x in (before, after)))
    logits = [torch.einsum("c,chw->hw", last.mask_embedding[0, query], x[0]) for x in (before, after)]
    far = look.pixels(torch.ones(2)).tolist()
    box = _boxes(look, last.boxes[0, query][None])[0]
    names = ("$F$", "$F'$")
    with style():
        figure = NotebookFigure(figsize=(17.5, 3.9), layout="constrained")
        axes = figure.subplots(1, 5)
        draw_image(look, axes[0], f"query {query} of the last layer")
        for each, picture, name in zip(axes[1:3], pictures, names, strict=True):
            each.imshow(picture, extent=(0, far[0], far[1], 0))
            each.set_title(f"mask features {name}, as colours", parse_math=True)
        for each, logit, name in zip(axes[3:], logits, names, strict=True):
            shown = each.imshow(logit.sigmoid(), extent=(0, far[0], far[1], 0), cmap="cividis", vmin=0, vmax=1)
            each.set_title(f"its mask in {name}", parse_math=True)
        figure.colorbar(shown, ax=axes[4], label="probability")
        for each in axes:
            each.add_patch(Rectangle(box[:2], *box[2:], fill=False, color=ORANGE, linewidth=1.5))
            each.set(xlim=(0, look.sample.image.shape[-1]), ylim=(look.sample.image.shape[-2], 0), xticks=[], yticks=[])
            each.grid(False)
    return figure
