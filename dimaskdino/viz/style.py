"""The style of all figures: light grids, readable sizes. The colours are those of `dimaskdino.data.painting`."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.figure import Figure

from dimaskdino.data.painting import BLUE, ORANGE

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


@contextmanager
def style() -> Iterator[None]:
    """Apply the look inside a `with` block."""
    with mpl.rc_context(_SETTINGS):
        yield
