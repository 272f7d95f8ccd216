"""Detections drawn over their image."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from dimaskdino.modeling import Instances
from dimaskdino.viz.curves import short_name
from dimaskdino.viz.style import CYCLE, NotebookFigure, style


def draw_instances(
    image: Tensor,
    instances: Instances,
    classes: Sequence[str],
    threshold: float = 0.3,
    axes: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """Masks, boxes, class names and scores over an image.

    Args:
        image: (3, h, w) uint8 RGB.
        instances: detections at the image's size.
        classes: class names.
        threshold: detections with a lower score are left out.
        axes: where to draw; a new figure at the image's aspect if None.
        title: above the image.
    """
    height, width = image.shape[-2:]
    with style():
        if axes is None:
            shown = 7.0
            scale = shown / max(height, width)
            figure = NotebookFigure(figsize=(max(2.0, width * scale), max(2.0, height * scale)), layout="constrained")
            axes = figure.subplots()
        canvas = image.permute(1, 2, 0).cpu().numpy().astype(np.float64) / 255
        kept = (instances.scores >= threshold).nonzero().flatten().tolist()
        size = 9 if max(height, width) >= 64 else 7
        for number, i in reversed(list(enumerate(kept))):  # the best on top
            colour = np.array(to_rgb(CYCLE[number % len(CYCLE)]))
            if instances.query_masks is not None:
                mask = instances.query_masks[instances.mask_index[i]].cpu().numpy()
                canvas[mask] = 0.5 * canvas[mask] + 0.5 * colour
        axes.imshow(canvas, extent=(0, width, height, 0))
        for number, i in reversed(list(enumerate(kept))):
            colour = CYCLE[number % len(CYCLE)]
            x0, y0, x1, y1 = instances.boxes[i].tolist()
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=1.6))
            text = f"{classes[int(instances.labels[i])]} {float(instances.scores[i]):.2f}"
            box = {"facecolor": colour, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
            x, y = min(max(x0, 0), width), min(max(y0, 0.065 * height), height)
            axes.text(x, y, text, fontsize=size, color="white", bbox=box, va="bottom", clip_on=True)
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        axes.grid(False)
        axes.set_title(title or f"{len(kept)} of {len(instances.scores)} detections score at least {threshold:g}")
    figure_of = axes.get_figure()
    assert isinstance(figure_of, Figure)
    return figure_of


def draw_stages(
    image: Tensor, found: Mapping[str, Instances], classes: Sequence[str], threshold: float = 0.3
) -> Figure:
    """One image with the detections of several stages side by side.

    Args:
        image: (3, h, w) uint8 RGB.
        found: detections at the image's size by stage name.
        classes: class names.
        threshold: detections with a lower score are left out.
    """
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    aspect = image.shape[-2] / image.shape[-1]
    figure = NotebookFigure(figsize=(3.4 * columns, (3.4 * aspect + 0.4) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for each in axes[len(found) :]:
        each.set_axis_off()
    for each, (name, instances) in zip(axes, found.items(), strict=False):
        draw_instances(image, instances, classes, threshold, each, short_name(name).replace("\n", " "))
    return figure
