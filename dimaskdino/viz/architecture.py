"""The architecture as a picture: figure 2 of the paper, redrawn."""

from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from dimaskdino.data.painting import BLUE, GREEN, GREY, ORANGE, PINK
from dimaskdino.viz.style import NotebookFigure, style

_Kind = Literal["image", "tokens", "queries", "masks", "module"]
_COLOURS: dict[_Kind, str] = {"image": PINK, "tokens": BLUE, "queries": GREEN, "masks": ORANGE, "module": GREY}
_HEIGHT = 0.62  # of a box of the picture


@dataclass(frozen=True)
class _Box:
    """A box of the picture: a module, or data that flow between modules. (x, y) is its centre."""

    text: str
    x: float
    y: float
    width: float
    kind: _Kind = "module"


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
    axes.set(xlim=(0, 15.9), ylim=(0.35, 4.2))
    axes.set_axis_off()
    left, bottom, right, top = _DE_IMBALANCE
    size = (right - left, top - bottom)
    frame = FancyBboxPatch((left, bottom), *size, "round,pad=0.03", fill=False, edgecolor=GREY, linestyle=":")
    axes.add_patch(frame)
    axes.text(right, top + 0.08, "De-Imbalance", ha="right", va="bottom", color=GREY, fontsize=9)
    lit = set(parts or _BOXES)
    for ends in _ARROWS:
        if set(ends) & set(parts):
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
        axes.add_patch(arrow)
    title = ", ".join(_BOXES[part].text.replace("\n", " ") for part in parts)
    axes.set_title(f"Where this chapter is: {title}" if parts else "DI-MaskDINO")
    return figure


def _draw_box(axes: Axes, box: _Box, lit: bool, strong: bool) -> FancyBboxPatch:
    colour = _COLOURS[box.kind]
    corner = (box.x - box.width / 2 + 0.05, box.y - _HEIGHT / 2 + 0.05)
    patch = FancyBboxPatch(
        corner,
        box.width - 0.1,
        _HEIGHT - 0.1,
        "round,pad=0.05" if box.kind == "module" else "round,pad=0.05,rounding_size=0.25",
        facecolor=colour if strong else f"{colour}{'33' if lit else '12'}",
        edgecolor=colour if lit else f"{colour}55",
        linewidth=2.2 if strong else 1.2,
    )
    axes.add_patch(patch)
    ink = "white" if strong else "black" if lit else "#9A9A9A"
    middle: dict[str, Any] = {"ha": "center", "va": "center", "linespacing": 1.05}
    axes.text(box.x, box.y, box.text, fontsize=9, color=ink, parse_math=True, **middle)
    return patch
