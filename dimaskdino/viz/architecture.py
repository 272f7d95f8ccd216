"""The architecture as a picture: figure 2 of the paper, redrawn."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from dimaskdino.data.painting import BLUE, GREEN, GREY, ORANGE, PINK
from dimaskdino.inspection.look import Look
from dimaskdino.viz.style import NotebookFigure, add_boxes, show_image, style
from dimaskdino.viz.tokens import boxes_in_pixels, show_map

Kind = Literal["image", "tokens", "queries", "masks", "module"]
COLOURS: dict[Kind, str] = {"image": PINK, "tokens": BLUE, "queries": GREEN, "masks": ORANGE, "module": GREY}
HEIGHT = 0.62  # of a box of the picture


@dataclass(frozen=True)
class _Box:
    """A box of the picture: a module, or data that flow between modules. (x, y) is its centre."""

    text: str
    x: float
    y: float
    width: float
    kind: Kind = "module"


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
_ARROWS = (
    ("image", "backbone"),
    ("backbone", "pixel_decoder"),
    ("pixel_decoder", "T_i"),
    ("pixel_decoder", "F"),
    ("T_i", "first_selection"),
    ("first_selection", "T_s1"),
    ("T_s1", "token_interaction"),
    ("token_interaction", "T_s2"),
    ("T_s2", "decoder_1"),
    ("T_i", "decoder_1"),
    ("decoder_1", "Q_bal"),
    ("Q_bal", "decoder"),
    ("Q_bal", "bato"),
    ("T_i", "bato"),
    ("F", "bato"),
    ("bato", "T_bal"),
    ("T_bal", "decoder"),
    ("decoder", "heads"),
    ("heads", "answers"),
)
_DE_IMBALANCE = (4.0, 2.85, 10.75, 3.78)  # the frame around the two selections: left, bottom, right, top


@style()
def draw_architecture(*parts: str) -> Figure:
    """Draw the model as figure 2 of the paper does, with some modules lit, such as `bato`; all without any."""
    figure = NotebookFigure(figsize=(11.5, 3.1), layout="constrained")
    axes = figure.subplots()
    _draw_boxes(axes, parts)
    title = ", ".join(_BOXES[part].text.replace("\n", " ") for part in parts)
    axes.set_title(f"Where this chapter is: {title}" if parts else "DI-MaskDINO")
    return figure


@dataclass(frozen=True)
class Flow:
    """Data that flow between modules for an image.

    Attributes:
        text: what they are.
        tensor: the data.
        heat: a map (h, w) of the padded input to show over the image.
        boxes: (n, 4) cxcywh relative to the padded input, to show over the image.
    """

    text: str
    tensor: Tensor
    heat: Tensor | None = None
    boxes: Tensor | None = None


def flows_of(look: Look) -> dict[str, Flow]:
    """The data that flow at each place; a model without De-Imbalance has no T_s2, one without BATO no T_bal."""
    trace, last = look.trace, look.predictions.last
    finest = min(trace.T_i.strides)
    T_i, F, first, second, Q_bal = (
        trace.T_i.map(finest)[0],
        trace.mask_features,
        trace.T_s[0],
        trace.T_s[-1],
        trace.Q_bal,
    )
    detected = last.boxes[0][last.class_logits[0].amax(-1).sigmoid() >= 0.3]
    flows = {
        "image": Flow("the image, normalised and padded", look.batch.pixels),
        "T_i": Flow("feature tokens; colour: their length at the finest level", trace.T_i.tokens, heat=T_i.norm(dim=0)),
        "F": Flow("mask features; colour: their length", F, heat=F[0].norm(dim=0)),
        "T_s1": Flow("tokens of the first selection and their boxes", first.content, boxes=first.boxes[0]),
        "T_s2": Flow("tokens of the second selection and their boxes", second.content, boxes=second.boxes[0]),
        "Q_bal": Flow("balanced queries and their boxes", Q_bal.content, boxes=Q_bal.boxes[0]),
    }
    if len(trace.T_s) == 1:
        del flows["T_s2"]
    if trace.T_bal is not None:
        change = (trace.T_bal.map(finest)[0] - T_i).norm(dim=0)
        flows["T_bal"] = Flow("tokens after BATO; colour: how far they moved", trace.T_bal.tokens, heat=change)
    flows["answers"] = Flow("class logits of the last layer; boxes that score 0.3", last.class_logits, boxes=detected)
    return flows


@style()
def draw_flow(look: Look, name: str) -> Figure:
    """Draw the model, and below it the data that flow at one place for an image, with their shape.

    Raises:
        ValueError: the model has no such place.
    """
    flows = flows_of(look)
    if name not in flows:
        raise ValueError(f"this model has no {name}; choose one of {', '.join(flows)}")
    figure = NotebookFigure(figsize=(11.5, 6.4))  # a layout engine would take a third of the time
    top, bottom = figure.add_axes((0.0, 0.55, 1.0, 0.45)), figure.add_axes((0.3, 0.02, 0.4, 0.47))
    _draw_boxes(top, (name,))
    flow = flows[name]
    title = f"{flow.text}, shape {tuple(flow.tensor.shape)}"
    show_image(bottom, look.sample.image, title, dim=0.0 if name == "image" else 0.35)
    if flow.boxes is not None:
        add_boxes(bottom, boxes_in_pixels(look, flow.boxes), COLOURS[_BOXES[name].kind], 1.2, alpha=0.7)
    if flow.heat is not None:
        shown = show_map(bottom, look, flow.heat, alpha=0.7, interpolation="nearest")
        figure.colorbar(shown, cax=figure.add_axes((0.72, 0.06, 0.012, 0.38)))
    return figure


def place_of(x: float, y: float) -> str | None:
    """The box of the picture at these coordinates of its axes; None between the boxes."""
    for name, box in _BOXES.items():
        if abs(x - box.x) <= box.width / 2 and abs(y - box.y) <= HEIGHT / 2:
            return name
    return None


def _draw_boxes(axes: Axes, parts: Collection[str]) -> None:
    # artists instead of patches: the axes have their limits and need not search for them
    axes.set(xlim=(0, 15.9), ylim=(0.35, 4.2))
    axes.set_axis_off()
    left, bottom, right, top = _DE_IMBALANCE
    size = (right - left, top - bottom)
    frame = FancyBboxPatch((left, bottom), *size, "round,pad=0.03", fill=False, edgecolor=GREY, linestyle=":")
    axes.add_artist(frame)
    axes.text(right, top + 0.08, "De-Imbalance", ha="right", va="bottom", color=GREY, fontsize=9)
    lit = set(_BOXES) if not parts else set(parts)
    for ends in _ARROWS:
        if parts and set(ends) & set(parts):
            lit |= set(ends)
    patches = {}
    for name, box in _BOXES.items():
        patches[name] = _draw_box(axes, box, lit=name in lit, strong=name in parts)
    for start, end in _ARROWS:
        touched = start in parts or end in parts
        arrow = FancyArrowPatch(
            (_BOXES[start].x, _BOXES[start].y),
            (_BOXES[end].x, _BOXES[end].y),
            patchA=patches[start],
            patchB=patches[end],
            arrowstyle="-|>",
            mutation_scale=11,
            color="black" if touched or not parts else "#C8C8C8",
            linewidth=1.6 if touched else 1.1,
        )
        axes.add_artist(arrow)


def _draw_box(axes: Axes, box: _Box, lit: bool, strong: bool) -> FancyBboxPatch:
    colour = COLOURS[box.kind]
    corner = (box.x - box.width / 2 + 0.05, box.y - HEIGHT / 2 + 0.05)
    patch = FancyBboxPatch(
        corner,
        box.width - 0.1,
        HEIGHT - 0.1,
        "round,pad=0.05" if box.kind == "module" else "round,pad=0.05,rounding_size=0.25",
        facecolor=colour if strong else f"{colour}{'33' if lit else '12'}",
        edgecolor=colour if lit else f"{colour}55",
        linewidth=2.2 if strong else 1.2,
    )
    axes.add_artist(patch)
    ink = "white" if strong else "black" if lit else "#9A9A9A"
    middle: dict[str, Any] = {"ha": "center", "va": "center", "linespacing": 1.05}
    axes.text(box.x, box.y, box.text, fontsize=9, color=ink, parse_math=True, **middle)
    return patch
