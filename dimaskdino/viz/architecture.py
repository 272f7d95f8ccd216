"""The architecture as a picture: figure 2 of the paper, redrawn."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

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

    def side(self, name: str) -> tuple[float, float]:
        """The middle of a side."""
        across, up = {"left": (-1, 0), "right": (1, 0), "top": (0, 1), "bottom": (0, -1)}[name]
        return self.x + across * self.width / 2, self.y + up * HEIGHT / 2


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
    ("image", "right", "backbone", "left"),
    ("backbone", "right", "pixel_decoder", "left"),
    ("pixel_decoder", "right", "T_i", "left"),
    ("pixel_decoder", "bottom", "F", "left"),
    ("T_i", "top", "first_selection", "bottom"),
    ("first_selection", "right", "T_s1", "left"),
    ("T_s1", "right", "token_interaction", "left"),
    ("token_interaction", "right", "T_s2", "left"),
    ("T_s2", "bottom", "decoder_1", "top"),
    ("T_i", "right", "decoder_1", "left"),
    ("decoder_1", "right", "Q_bal", "left"),
    ("Q_bal", "right", "decoder", "left"),
    ("Q_bal", "bottom", "bato", "top"),
    ("T_i", "bottom", "bato", "left"),
    ("F", "right", "bato", "left"),
    ("bato", "right", "T_bal", "left"),
    ("T_bal", "right", "decoder", "bottom"),
    ("decoder", "right", "heads", "left"),
    ("heads", "right", "answers", "left"),
)
_DE_IMBALANCE = (4.0, 2.85, 10.75, 3.78)  # the frame around the two selections: left, bottom, right, top

FLOWS = {
    "image": "the image, normalised and padded",
    "T_i": "feature tokens of all levels; colour: length of the vectors of the finest level",
    "F": "mask features; colour: length of the vectors",
    "T_s1": "tokens of the first selection and their boxes",
    "T_s2": "tokens of the second selection and their boxes",
    "Q_bal": "balanced queries and their boxes",
    "T_bal": "tokens after BATO; colour: how far those of the finest level moved",
    "answers": "class logits of the last layer, and its detections with a score of at least 0.3",
}


@style()
def draw_architecture(*parts: str) -> Figure:
    """Draw the model as figure 2 of the paper does, with some parts lit.

    Args:
        *parts: the modules to light, such as `bato`, with the arrows that enter and leave them; without any,
            everything is lit.
    """
    figure = NotebookFigure(figsize=(11.5, 3.1), layout="constrained")
    axes = figure.subplots()
    _draw_boxes(axes, parts)
    title = ", ".join(_BOXES[part].text.replace("\n", " ") for part in parts)
    axes.set_title(f"Where this chapter is: {title}" if parts else "DI-MaskDINO")
    return figure


@style()
def draw_flow(look: Look, name: str) -> Figure:
    """Draw the model, and below it the data that flow at one place for an image, with their shape.

    Args:
        look: an image and the model's predictions for it.
        name: one of `FLOWS`, such as `T_s1`.

    Raises:
        ValueError: there is no such place, or this model does not have it.
    """
    flows = flows_of(look)
    if name not in flows:
        raise ValueError(f"this model has no {name}; choose one of {', '.join(flows)}")
    figure = NotebookFigure(figsize=(11.5, 6.4))  # a layout engine would take a third of the time
    top, bottom = figure.add_axes((0.0, 0.55, 1.0, 0.45)), figure.add_axes((0.3, 0.02, 0.4, 0.47))
    _draw_boxes(top, (name,))
    title = f"{FLOWS[name]}, shape {tuple(flows[name].shape)}"
    show_image(bottom, look.sample.image, title, dim=0.0 if name == "image" else 0.35)
    trace = look.trace
    finest = min(trace.T_i.strides)
    values = None
    if name == "F":
        values = trace.mask_features[0].norm(dim=0)
    elif name == "T_i":
        values = trace.T_i.map(finest)[0].norm(dim=0)
    elif name == "T_bal":
        values = (trace.T_bal.map(finest) - trace.T_i.map(finest))[0].norm(dim=0)
    elif name == "answers":
        found = look.instances(look.predictions.last.name)
        add_boxes(bottom, found.boxes[found.scores >= 0.3], ORANGE, 2)
    elif name != "image":
        tokens = {"T_s1": trace.T_s[0], "T_s2": trace.T_s[-1], "Q_bal": trace.Q_bal}[name]
        add_boxes(bottom, boxes_in_pixels(look, tokens.boxes[0]), COLOURS[_BOXES[name].kind], 0.9, alpha=0.7)
    if values is not None:
        shown = show_map(bottom, look, values, alpha=0.7, interpolation="nearest")
        figure.colorbar(shown, cax=figure.add_axes((0.72, 0.06, 0.012, 0.38)))
    return figure


def flows_of(look: Look) -> dict[str, Tensor]:
    """The tensors that flow between the modules, by their names in `FLOWS`.

    A model without De-Imbalance has no T_s2, one without BATO no T_bal.
    """
    trace = look.trace
    flows = {
        "image": look.batch.pixels,
        "T_i": trace.T_i.tokens,
        "F": trace.mask_features,
        "T_s1": trace.T_s[0].content,
        "Q_bal": trace.Q_bal.content,
        "answers": look.predictions.last.class_logits,
    }
    if len(trace.T_s) > 1:
        flows["T_s2"] = trace.T_s[-1].content
    if trace.T_bal is not None:
        flows["T_bal"] = trace.T_bal.tokens
    return flows


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
    lit_boxes = set(parts)
    for start, start_side, end, end_side in _ARROWS:
        touched = start in parts or end in parts
        if touched:
            lit_boxes |= {start, end}
        arrow = FancyArrowPatch(
            _BOXES[start].side(start_side),
            _BOXES[end].side(end_side),
            arrowstyle="-|>",
            mutation_scale=11,
            color="black" if touched or not parts else "#C8C8C8",
            linewidth=1.6 if touched else 1.1,
            shrinkA=1,
            shrinkB=1,
        )
        axes.add_artist(arrow)
    for name, box in _BOXES.items():
        _draw_box(axes, box, lit=not parts or name in lit_boxes, strong=name in parts)


def _draw_box(axes: Axes, box: _Box, lit: bool, strong: bool) -> None:
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
    middle = {"ha": "center", "va": "center", "linespacing": 1.05}
    axes.text(box.x, box.y, box.text, fontsize=9, color=ink, parse_math=True, **middle)
