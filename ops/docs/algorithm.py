"""Draw algorithm.png, the picture of ops/README.md: `python ops/docs/algorithm.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"  # Okabe and Ito: safe for colour blindness
QUERY = np.array([0.56, 0.44])  # normalised (x, y)
LEVELS = [8, 4, 2]


def levels(axes: list[Axes]) -> None:
    """The samples of one query and head, over the grids of three levels."""
    rng = np.random.default_rng(3)
    for i, (axis, size) in enumerate(zip(axes, LEVELS, strict=True)):
        axis.set(xlim=(0, size), ylim=(size, 0), xticks=range(size + 1), yticks=range(size + 1), aspect="equal")
        axis.grid(color=GREY, linewidth=0.6)
        axis.tick_params(length=0, labelbottom=False, labelleft=False)
        samples = np.clip(QUERY * size + rng.normal(0, 1.1, (4, 2)), 0.2, size - 0.2)
        for x, y in samples:
            axis.plot(*zip(QUERY * size, (x, y), strict=True), color=BLUE, linewidth=0.8)
        axis.scatter(*samples.T, s=60, color=BLUE, zorder=3)
        axis.scatter(*(QUERY * size), marker="*", s=160, color=ORANGE, zorder=4)
        axis.set_title(f"level {i}: {size} × {size} cells", fontsize=11)


def corners(axis: Axes) -> None:
    """What one sample reads: four cells, with weights that depend on where it lies between their centres."""
    dx, dy = 0.68, 0.36
    axis.set(xlim=(-0.75, 1.75), ylim=(1.75, -0.75), aspect="equal", xticks=[], yticks=[])
    for edge in (-0.5, 0.5, 1.5):
        axis.plot([edge, edge], [-0.5, 1.5], color=GREY, linewidth=0.8)
        axis.plot([-0.5, 1.5], [edge, edge], color=GREY, linewidth=0.8)
    parts = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
    for x, y in parts.values():
        weight = (dx if x else 1 - dx) * (dy if y else 1 - dy)
        axis.scatter(x, y, s=900 * weight + 20, color=GREEN, alpha=0.7)
        at = (0, -26 if y else 26)
        axis.annotate(f"{weight:.2f}", (x, y), at, textcoords="offset points", ha="center", va="center")
    axis.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color=GREEN, linewidth=0.8, linestyle="--")
    axis.scatter(dx, dy, s=70, color=BLUE, zorder=3)
    axis.set_title("one sample: four cells,\nread D channels at a time", fontsize=11)
    axis.spines[:].set_visible(False)


def tasks(axis: Axes) -> None:
    """Who adds to what in the backward pass on the CPU: nobody shares a square."""
    heads, threads = 8, 4
    owner = np.arange(heads * len(LEVELS)).reshape(heads, -1) * threads // (heads * len(LEVELS))
    palette = [BLUE, ORANGE, GREEN, "#CC79A7"]
    for head in range(heads):
        for level in range(len(LEVELS)):
            square = plt.Rectangle((level, head), 0.94, 0.94, color=palette[owner[head, level]], alpha=0.8)
            axis.add_patch(square)
            axis.text(level + 0.47, head + 0.5, owner[head, level], ha="center", va="center", color="white", fontsize=9)
    axis.set(xlim=(0, len(LEVELS)), ylim=(heads, 0), aspect="equal")
    axis.set_xticks(np.arange(len(LEVELS)) + 0.47, [f"{i}" for i in range(len(LEVELS))])
    axis.set_yticks(np.arange(heads) + 0.5, [f"{i}" for i in range(heads)])
    axis.set(xlabel="level", ylabel="head")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title("backward on the CPU:\nthe thread of each task", fontsize=11)


def main() -> None:
    """Draw the picture beside this file."""
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.6), layout="constrained", width_ratios=[1, 1, 1, 1.05, 0.55])
    levels(list(axes[:3]))
    corners(axes[3])
    tasks(axes[4])
    text = "★ a query    ● its 4 samples in each level    the weighted sum of all samples is its output"
    figure.supxlabel(text, fontsize=12)
    figure.savefig(Path(__file__).with_name("algorithm.png"), dpi=110)


if __name__ == "__main__":
    main()
