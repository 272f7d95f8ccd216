"""Pictures of what is wrong with an answer: where it differs from the package's."""

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from dimaskdino.data.painting import BLUE, ORANGE
from dimaskdino.inspection.look import Look
from dimaskdino.viz.style import panels, show_image, style


@style()
def draw_errors(
    look: Look, places: Float[Tensor, "n 2"], yours: Float[Tensor, "n C"], expected: Float[Tensor, "n C"], title: str
) -> Figure:
    """Draw the distance of vectors from the package's, at places (x, y) relative to the padded input."""
    figure, [axes] = panels(1, 1, 5.4, 4.6)
    show_image(axes, look.sample.image, title, dim=0.6)
    x, y = look.pixels(places).T.numpy()
    lengths = (yours - expected).detach().norm(dim=1).numpy()
    dots = axes.scatter(x, y, s=26, c=lengths, cmap="viridis_r", edgecolors="white", linewidths=0.3)
    figure.colorbar(dots, label="distance from the package's", shrink=0.8)
    return figure


@style()
def draw_choices(look: Look, expected: Float[Tensor, "n 2"], yours: Float[Tensor, "m 2"]) -> Figure:
    """Draw the tokens that are kept, at places (x, y) relative to the padded input."""
    figure, [axes] = panels(1, 1, 4.8, 4.9)
    show_image(axes, look.sample.image, "Tokens that are kept", dim=0.6)
    x, y = look.pixels(expected).T.numpy()
    axes.scatter(x, y, s=90, facecolors="none", edgecolors=BLUE, linewidths=1.6, label="kept by the model")
    x, y = look.pixels(yours).T.numpy()
    axes.scatter(x, y, s=40, marker="x", color=ORANGE, linewidths=1.6, label="kept by your function")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


@style()
def draw_tables(yours: Float[Tensor, "n m"], expected: Float[Tensor, "n m"], rows: str, columns: str) -> Figure:
    """Draw two tables of numbers and their difference."""
    figure, axes = panels(1, 3, 10, 3.6)
    left, right = yours.detach().numpy(), expected.detach().numpy()
    low, high, largest = min(left.min(), right.min()), max(left.max(), right.max()), abs(left - right).max()
    images = (
        axes[0].imshow(left, cmap="cividis_r", aspect="auto", vmin=low, vmax=high),
        axes[1].imshow(right, cmap="cividis_r", aspect="auto", vmin=low, vmax=high),
        axes[2].imshow(left - right, cmap="RdBu", aspect="auto", vmin=-largest, vmax=largest),
    )
    for each, image, title in zip(axes, images, ("yours", "the package's", "difference"), strict=True):
        figure.colorbar(image)
        each.set(title=title, xlabel=columns, ylabel=rows)
        each.grid(False)
    return figure
