"""Pictures of what is wrong with an answer: where it differs from the package's."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from dimaskdino.data.painting import BLUE, ORANGE
from dimaskdino.inspection.look import Look
from dimaskdino.viz.style import NotebookFigure, show_image, style

YOURS, PACKAGE = "yours", "the package's"


def draw_errors(look: Look, places: Float[Tensor, "n 2"], errors: Float[Tensor, " n"], title: str) -> Figure:
    """How far an answer is from the package's, at places (x, y) relative to the padded input."""
    with style():
        figure = NotebookFigure(figsize=(5.4, 4.6), layout="constrained")
        axes = figure.subplots()
        show_image(axes, look.sample.image, title, dim=0.6)
        x, y = look.pixels(places).T.numpy()
        dots = axes.scatter(x, y, s=26, c=errors.numpy(), cmap="viridis_r", edgecolors="white", linewidths=0.3)
        figure.colorbar(dots, label="distance from the package's", shrink=0.8)
    return figure


def draw_choices(look: Look, groups: Sequence[tuple[str, Float[Tensor, "n 2"]]], title: str) -> Figure:
    """Groups of places (x, y), relative to the padded input, over the image."""
    with style():
        figure = NotebookFigure(figsize=(4.8, 4.9), layout="constrained")
        axes = figure.subplots()
        show_image(axes, look.sample.image, title, dim=0.6)
        looks = (("o", "none", BLUE, 90), ("x", ORANGE, ORANGE, 40))
        for (label, places), (marker, face, edge, size) in zip(groups, looks, strict=True):
            x, y = look.pixels(places).T.numpy()
            colours = {"color": edge} if marker == "x" else {"facecolors": face, "edgecolors": edge}
            axes.scatter(x, y, s=size, marker=marker, linewidths=1.6, label=label, **colours)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def draw_tables(yours: Float[np.ndarray, "n m"], expected: Float[np.ndarray, "n m"], rows: str, columns: str) -> Figure:
    """Two tables of numbers and their difference."""
    with style():
        figure = NotebookFigure(figsize=(10, 3.6), layout="constrained")
        panels = ((YOURS, yours), (PACKAGE, expected), ("difference", yours - expected))
        limits = min(yours.min(), expected.min()), max(yours.max(), expected.max())
        for axes, (title, values) in zip(figure.subplots(1, 3), panels, strict=True):
            if title == "difference":
                largest = abs(values).max()
                image = axes.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
            else:
                image = axes.imshow(values, cmap="cividis_r", vmin=limits[0], vmax=limits[1], aspect="auto")
            figure.colorbar(image)
            axes.set(title=title, xlabel=columns, ylabel=rows)
            axes.grid(False)
    return figure


def draw_bars(names: Sequence[str], yours: Sequence[float], expected: Sequence[float], label: str) -> Figure:
    """Two rows of numbers with names, side by side."""
    with style():
        figure = NotebookFigure(figsize=(8, 3.4), layout="constrained")
        axes = figure.subplots()
        x = np.arange(len(names))
        axes.bar(x - 0.2, yours, 0.38, color=BLUE, label=YOURS)
        axes.bar(x + 0.2, expected, 0.38, color=ORANGE, label=PACKAGE)
        axes.set_xticks(x, names, rotation=20, ha="right", fontsize=9)
        axes.set(ylabel=label, title=f"{label[0].upper()}{label[1:]}, yours beside the package's")
        axes.legend()
    return figure


def draw_intervals(
    names: Sequence[str],
    yours: Sequence[tuple[float, float, float]],
    expected: Sequence[tuple[float, float, float]],
    label: str,
) -> Figure:
    """Estimates with intervals (estimate, low, high), yours above the package's."""
    with style():
        figure = NotebookFigure(figsize=(8, 1.4 + 0.6 * len(names)), layout="constrained")
        axes = figure.subplots()
        for values, offset, colour, whose in ((yours, -0.14, BLUE, YOURS), (expected, 0.14, ORANGE, PACKAGE)):
            for i, (estimate, low, high) in enumerate(values):
                axes.plot([low, high], [i + offset] * 2, color=colour, linewidth=3, solid_capstyle="butt")
                axes.plot(estimate, i + offset, "o", color=colour, label=whose if i == 0 else None)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlabel=label, title="Differences with their intervals")
        figure.legend(loc="outside lower center", ncols=2)
    return figure
