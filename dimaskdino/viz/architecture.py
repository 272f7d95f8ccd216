"""The architecture as a picture: figure 2 of the paper, redrawn."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor
from torchvision.ops import box_convert

from dimaskdino.data.painting import BLUE, GREEN, GREY, ORANGE, PINK
from dimaskdino.inspection.look import Look
from dimaskdino.viz.style import NotebookFigure, style
from dimaskdino.viz.tokens import draw_image

Kind = Literal["image", "tokens", "queries", "masks", "module"]
COLOURS: dict[Kind, str] = {"image": PINK, "tokens": BLUE, "queries": GREEN, "masks": ORANGE, "module": GREY}
Part = Literal[
    "backbone", "pixel_decoder", "first_selection", "token_interaction", "decoder_1", "bato", "decoder", "heads"
]


@dataclass(frozen=True)
class _Box:
    """A box of the picture: a module, or data that flow between modules."""

    text: str
    x: float
    y: float
    width: float
    kind: Kind = "module"

    @property
    def sides(self) -> dict[str, tuple[float, float]]:
        half = self.width / 2
        return {
            "left": (self.x - half, self.y),
            "right": (self.x + half, self.y),
            "top": (self.x, self.y + HEIGHT / 2),
            "bottom": (self.x, self.y - HEIGHT / 2),
        }


HEIGHT = 0.62
_BOXES = {
    "image": _Box("image", 0.6, 2.0, 0.95, "image"),
    "backbone": _Box("backbone", 2.0, 2.0, 1.2),
    "pixel_decoder": _Box("pixel\ndecoder", 3.6, 2.0, 1.2),
    "T_i": _Box("$T_i$", 5.05, 2.0, 0.7, "tokens"),
    "F": _Box("$F$", 5.05, 0.9, 0.7, "masks"),
    "first_selection": _Box("first selection\n(Eq. 1)", 5.05, 3.3, 1.75),
    "T_s1": _Box("$T_{s1}$", 6.7, 3.3, 0.7, "tokens"),
    "token_interaction": _Box("interaction, second\nselection (Eq. 2–3)", 8.5, 3.3, 2.2),
    "T_s2": _Box("$T_{s2}$", 10.25, 3.3, 0.7, "queries"),
    "decoder_1": _Box("decoder layer 1\n(Eq. 4)", 8.1, 2.0, 1.75),
    "Q_bal": _Box("$Q_{bal}$", 9.75, 2.0, 0.8, "queries"),
    "bato": _Box("BATO\n(Eq. 5–8)", 8.1, 0.9, 1.4),
    "T_bal": _Box("$T_{bal}$, $F'$", 9.75, 0.9, 1.0, "tokens"),
    "decoder": _Box("decoder layers\n2 … L", 11.6, 2.0, 1.6),
    "heads": _Box("heads, at\nevery stage", 13.45, 2.0, 1.25),
    "answers": _Box("classes\nboxes, masks", 15.1, 2.0, 1.35, "masks"),
}
# from box and side, to box and side
_ARROWS = (
    ("image right", "backbone left"),
    ("backbone right", "pixel_decoder left"),
    ("pixel_decoder right", "T_i left"),
    ("pixel_decoder bottom", "F left"),
    ("T_i top", "first_selection bottom"),
    ("first_selection right", "T_s1 left"),
    ("T_s1 right", "token_interaction left"),
    ("token_interaction right", "T_s2 left"),
    ("T_s2 bottom", "decoder_1 top"),
    ("T_i right", "decoder_1 left"),
    ("decoder_1 right", "Q_bal left"),
    ("Q_bal right", "decoder left"),
    ("Q_bal bottom", "bato top"),
    ("T_i bottom", "bato left"),
    ("F right", "bato left"),
    ("bato right", "T_bal left"),
    ("T_bal right", "decoder bottom"),
    ("decoder right", "heads left"),
    ("heads right", "answers left"),
)
_DE_IMBALANCE = (4.0, 2.85, 10.75, 3.78)  # the frame around its two selections: left, bottom, right, top


def draw_architecture(*parts: Part) -> Figure:
    """Draw the model as figure 2 of the paper does, with some parts lit.

    Args:
        parts: the modules to light, with the arrows that enter and leave them; everything is lit without any.
    """
    with style():
        figure = NotebookFigure(figsize=(11.5, 3.1), layout="constrained")
        _draw_boxes(figure.subplots(), parts)
        title = ", ".join(_BOXES[part].text.replace("\n", " ") for part in parts)
        figure.axes[0].set_title(f"Where this chapter is: {title}" if parts else "DI-MaskDINO")
    return figure


FLOWS = tuple(name for name, box in _BOXES.items() if box.kind != "module")


def draw_flow(look: Look, name: str) -> Figure:
    """Draw the model, and below it what flows at one place for an image: its shape, and where it lies in the image.

    Args:
        look: an image and what the model made of it.
        name: one of `FLOWS`, such as `T_s1`.

    Raises:
        ValueError: there is no such place, or this model does not have it.
    """
    if name not in FLOWS:
        raise ValueError(f"nothing is called {name}; there are {', '.join(FLOWS)}")
    with style():
        figure = NotebookFigure(figsize=(11.5, 6.4))  # without a layout engine, which takes a third of the time
        top, bottom = figure.add_axes((0.0, 0.55, 1.0, 0.45)), figure.add_axes((0.3, 0.02, 0.4, 0.47))
        _draw_boxes(top, (name,))
        draw_image(look, bottom, describe_flow(look, name), dim=0.0 if name == "image" else 0.35)
        _over_image(look, bottom, name)
    return figure


def describe_flow(look: Look, name: str) -> str:
    """What flows at one place, with its shape for this image.

    Raises:
        ValueError: this model does not have it.
    """
    trace, last = look.trace, look.predictions.last
    if (name == "T_bal" and trace.bato is None) or (name == "T_s2" and len(trace.T_s) < 2):
        raise ValueError(f"this model has no {name}")
    tensor, what = {
        "image": (look.batch.pixels, "the image, normalised and padded"),
        "T_i": (trace.T_i.tokens, f"feature tokens of {len(trace.T_i.shapes)} levels; colour: length, finest level"),
        "F": (trace.mask_features, "mask features; colour: length"),
        "T_s1": (trace.T_s[0].content, "tokens of the first selection, with their boxes"),
        "T_s2": (trace.T_s[-1].content, "tokens of the second selection, with their boxes"),
        "Q_bal": (trace.Q_bal.content, "balanced queries, with their boxes"),
        "T_bal": (trace.T_bal.tokens if trace.T_bal else None, "tokens after BATO; colour: how much changed"),
        "answers": (last.class_logits, "class logits of the last layer; its detections, score at least 0.3"),
    }[name]
    assert tensor is not None
    return f"{what}, shape {tuple(tensor.shape)}"


def _over_image(look: Look, axes: Axes, name: str) -> None:
    trace = look.trace
    finest = min(trace.T_i.strides)
    if name in ("T_i", "T_bal"):
        before = trace.T_i.map(finest)[0]
        values = before.norm(dim=0) if name == "T_i" else (trace.T_bal.map(finest)[0] - before).norm(dim=0)
        _heat(look, axes, values)
    elif name == "F":
        _heat(look, axes, trace.mask_features[0].norm(dim=0))
    elif name in ("T_s1", "T_s2", "Q_bal"):
        tokens = {"T_s1": trace.T_s[0], "T_s2": trace.T_s[-1], "Q_bal": trace.Q_bal}[name]
        _outline(look, axes, tokens.boxes[0], COLOURS[_BOXES[name].kind])
    elif name == "answers":
        found = look.instances(look.predictions.last.name)
        for x0, y0, x1, y1 in found.boxes[found.scores >= 0.3].tolist():
            axes.add_artist(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=ORANGE, linewidth=2))


def _heat(look: Look, axes: Axes, values: Float[Tensor, "h w"]) -> None:
    """Values of a map over the part of the input that the image fills."""
    right, bottom = look.pixels(torch.ones(2)).tolist()
    shown = axes.imshow(values, extent=(0, right, bottom, 0), cmap="viridis", alpha=0.7, interpolation="nearest")
    axes.figure.colorbar(shown, cax=axes.figure.add_axes((0.72, 0.06, 0.012, 0.38)))


def _outline(look: Look, axes: Axes, boxes: Float[Tensor, "k 4"], colour: str) -> None:
    corners = look.pixels(box_convert(boxes, "cxcywh", "xyxy").view(-1, 2, 2)).tolist()
    for (x0, y0), (x1, y1) in corners:
        axes.add_artist(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=0.9, alpha=0.7))


def place_of(x: float, y: float) -> str | None:
    """The box of the picture at these coordinates of its axes, None between the boxes."""
    for name, box in _BOXES.items():
        if abs(x - box.x) <= box.width / 2 and abs(y - box.y) <= HEIGHT / 2:
            return name
    return None


def _draw_boxes(axes: Axes, lit_parts: Collection[str]) -> None:
    # artists instead of patches: the axes have their limits, and do not have to look for them
    axes.set(xlim=(0, 15.9), ylim=(0.35, 4.2))
    axes.set_axis_off()
    left, bottom, right, top = _DE_IMBALANCE
    frame = FancyBboxPatch(
        (left, bottom), right - left, top - bottom, "round,pad=0.03", fill=False, edgecolor=GREY, linestyle=":"
    )
    axes.add_artist(frame)
    axes.text(right, top + 0.08, "De-Imbalance", ha="right", va="bottom", color=GREY, fontsize=9)
    near = {end.split()[0] for arrow in _ARROWS if _touches(arrow, lit_parts) for end in arrow} | set(lit_parts)
    for start, end in _ARROWS:
        lit = not lit_parts or _touches((start, end), lit_parts)
        (a, side_a), (b, side_b) = start.split(), end.split()
        arrow = FancyArrowPatch(
            _BOXES[a].sides[side_a],
            _BOXES[b].sides[side_b],
            arrowstyle="-|>",
            mutation_scale=11,
            color="black" if lit else "#C8C8C8",
            linewidth=1.6 if lit and lit_parts else 1.1,
            shrinkA=1,
            shrinkB=1,
        )
        axes.add_artist(arrow)
    for name, box in _BOXES.items():
        _draw_box(axes, box, lit=not lit_parts or name in near, strong=name in lit_parts)


def _touches(arrow: tuple[str, str], parts: Collection[str]) -> bool:
    return any(end.split()[0] in parts for end in arrow)


def _draw_box(axes: Axes, box: _Box, lit: bool, strong: bool) -> None:
    colour = COLOURS[box.kind]
    x, y = box.x - box.width / 2, box.y - HEIGHT / 2
    patch = FancyBboxPatch(
        (x + 0.05, y + 0.05),
        box.width - 0.1,
        HEIGHT - 0.1,
        "round,pad=0.05" if box.kind == "module" else "round,pad=0.05,rounding_size=0.25",
        facecolor=colour if strong else f"{colour}{'33' if lit else '12'}",
        edgecolor=colour if lit else f"{colour}55",
        linewidth=2.2 if strong else 1.2,
    )
    axes.add_artist(patch)
    text = "white" if strong else "black" if lit else "#9A9A9A"
    axes.text(
        box.x, box.y, box.text, ha="center", va="center", fontsize=9, color=text, parse_math=True, linespacing=1.05
    )
