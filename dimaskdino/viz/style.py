"""The style of all figures, and what they are made of: panels, images, boxes and labels.

The colours are those of `dimaskdino.data.painting`.
"""

import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from torch import Tensor

from dimaskdino.data.painting import BLUE, ORANGE

BOX, MASK = BLUE, ORANGE  # detection and segmentation, in every figure
KINDS = (("box", BOX, "s"), ("mask", MASK, "o"))  # name, colour and marker
LINES = ("-", "--", ":", "-.")

_SETTINGS: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "text.parse_math": False,  # names from data may hold $, _ and ^; the figures' own formulas ask for it
}


class NotebookFigure(Figure):
    """A figure that shows itself in notebooks, without pyplot's global state or a backend."""

    @property
    def alt(self) -> str:
        """Alternative text: the titles, the line below the panels, and the legends."""
        texts = [self.get_suptitle()]
        legends = list(self.legends)
        for axes in self.axes:
            texts.append(axes.get_title())
            own = axes.get_legend()
            if own is not None:
                legends.append(own)
        texts.append(self.get_supxlabel())
        for legend in legends:
            texts.append(", ".join(text.get_text() for text in legend.get_texts()))
        return "Figure: " + "; ".join(filter(None, texts)).replace("\n", " ").replace("$", "")

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight")
        return buffer.getvalue(), {"alt": self.alt}


@contextmanager
def style() -> Iterator[None]:
    """Apply the style inside a `with` block, or to a function with `@style()`."""
    with mpl.rc_context(_SETTINGS):
        yield


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[NotebookFigure, list[Axes]]:
    """Make a figure of `width` × `height` inches, and its axes, row by row."""
    figure = NotebookFigure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def show_image(axes: Axes, image: Tensor | np.ndarray, title: str = "", dim: float = 0.0, **options: Any) -> None:
    """Show an image with its pixels as coordinates.

    Args:
        axes: where to show it.
        image: RGB from 0 to 255, a tensor (3, h, w) or an array (h, w, 3).
        title: above the image.
        dim: how far it fades towards white, from 0 to 1.
        **options: of the title, such as `fontsize`.
    """
    pixels = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else image
    height, width = pixels.shape[:2]
    faded = pixels if dim == 0 else (pixels + (255 - pixels) * dim) / 255
    axes.imshow(faded, extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.set_title(title, **options)


def add_boxes(
    axes: Axes, boxes: Float[Tensor, "n 4"], colours: str | Sequence[str], width: float = 1.6, **options: Any
) -> None:
    """Draw boxes (xyxy in the coordinates of the axes), the first on top, in one colour or in one for each."""
    x0, y0, x1, y1 = boxes.double().flip(0).unbind(1)
    outlines = torch.stack([x0, y0, x1, y0, x1, y1, x0, y1], dim=1).view(-1, 4, 2).numpy()
    edges = colours if isinstance(colours, str) else list(colours)[::-1]
    drawn = PolyCollection(list(outlines), facecolors="none", edgecolors=edges, linewidths=width, **options)
    axes.add_collection(drawn, autolim=False)


def add_labels(axes: Axes, boxes: Float[Tensor, "n 4"], texts: Sequence[str], colours: Sequence[str]) -> None:
    """Write a text at each box (xyxy in pixels) of an image, so that no two overlap."""
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    line = axes.figure.dpi / 9 * max(width / axes.bbox.width, height / axes.bbox.height)  # of 8 points, in pixels
    taken: list[tuple[float, float, float, float]] = []
    for box, text, colour in zip(boxes.tolist(), texts, colours, strict=True):
        size = (0.6 * line * (len(text) + 1), 1.4 * line)
        x, y = free_place(box, size, (width, height), taken)
        taken.append((x, y, x + size[0], y + size[1]))
        patch = {"facecolor": colour, "edgecolor": "none", "pad": 1.2, "alpha": 0.9}
        axes.text(x, y + size[1], text, color="white", fontsize=8, bbox=patch, va="bottom", clip_on=True)


def free_place(
    box: Sequence[float],
    size: tuple[float, float],
    image: tuple[float, float],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float]:
    """Upper left corner of a label at a box that overlaps no other label: above, inside, below, then further down."""
    x0, y0, x1, y1 = box
    further = [y0 + k * size[1] for k in range(1, 20)]
    for y, x in itertools.product([y0 - size[1], y0, y1 - size[1], y1, *further], (x0, x1 - size[0])):
        x, y = max(0, min(x, image[0] - size[0])), max(0, min(y, image[1] - size[1]))
        if all(x + size[0] <= a or x >= c or y + size[1] <= b or y >= d for a, b, c, d in taken):
            return x, y
    return max(0, x0), max(0, y0)


def bar_places(places: Sequence[float], number: int, count: int) -> tuple[np.ndarray, float]:
    """Places of the bars of group `number` of `count` groups side by side, and the width of a bar."""
    width = 0.8 / count
    return np.asarray(places) + (number - (count - 1) / 2) * width, width
