"""The style of all figures: a palette for colour-blind readers, light grids, readable sizes."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.figure import Figure

# Okabe and Ito's palette
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, YELLOW, GREY = "#56B4E9", "#E69F00", "#F0E442", "#666666"
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, YELLOW, GREY)
BOX, MASK = BLUE, ORANGE  # detection and segmentation, in every figure

_SETTINGS = {
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
LONGEST_NAME = 36  # characters


class NotebookFigure(Figure):
    """A figure that shows itself in notebooks, without pyplot's global state or a backend."""

    @property
    def alt(self) -> str:
        """Alternative text: the titles."""
        titles = [self.get_suptitle(), *(axes.get_title() for axes in self.axes)]
        return "Figure: " + "; ".join(title.replace("\n", " ").replace("$", "") for title in titles if title)

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight")
        return buffer.getvalue(), {"alt": self.alt}


def data_label(name: str) -> str:
    """A name from data, such as a class, on one line and not longer than a figure can take."""
    line = " ".join(name.split())
    return line if len(line) <= LONGEST_NAME else f"{line[: LONGEST_NAME - 1]}…"


@contextmanager
def style() -> Iterator[None]:
    """Apply the look inside a `with` block."""
    with mpl.rc_context(_SETTINGS):
        yield
