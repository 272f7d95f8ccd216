"""Single objects through the stages."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from dimaskdino.data.painting import CYCLE, data_label
from dimaskdino.inspection.look import Look
from dimaskdino.inspection.objects import ObjectTrack
from dimaskdino.viz.curves import short_name
from dimaskdino.viz.detections import draw_instances
from dimaskdino.viz.style import BOX, MASK, NotebookFigure, style
from dimaskdino.viz.tokens import draw_image


def draw_objects(look: Look, track: ObjectTrack, stage: str, threshold: float = 0.3) -> Figure:
    """Draw the true objects, the detections of one stage, and box and mask IoU of every object per stage."""
    objects = len(look.sample.labels)
    with style():
        figure = NotebookFigure(figsize=(13.5, 4.4), layout="constrained")
        truth, detected, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])
        draw_image(look, truth, "1 true object" if objects == 1 else f"{objects} true objects")
        for number, (x0, y0, x1, y1) in enumerate(look.sample.boxes.tolist()):
            colour = CYCLE[number % len(CYCLE)]
            truth.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=1.8))
            name = f"{number + 1} {data_label(look.classes[int(look.sample.labels[number])])}"
            patch = {"facecolor": colour, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
            truth.text(x0, y0, name, color="white", fontsize=9, bbox=patch, va="bottom", clip_on=True)
        instances = look.instances(stage)
        title = f"{short_name(stage)}: score at least {threshold:g}".replace("\n", " ")
        draw_instances(look.sample.image, instances, look.classes, threshold, detected, title)
        place = range(len(track.stages))
        for number in range(objects):
            colour = CYCLE[number % len(CYCLE)]
            right.plot(place, track.box_iou[:, number], "-s", color=colour, label=f"object {number + 1}", markersize=5)
            right.plot(place, track.mask_iou[:, number], "--o", color=colour, markersize=5, markerfacecolor="white")
        if stage in track.stages:
            right.axvline(track.stages.index(stage), color="black", linewidth=0.8, linestyle=":")
        right.set(ylim=(-0.03, 1.03), ylabel="IoU with the true object", title="— ■ box    - - ○ mask")
        right.set_xticks(list(place), [short_name(name) for name in track.stages], fontsize=9)
        if objects:
            right.legend(loc="lower right", fontsize=9)
    return figure


def draw_object_stages(look: Look, stages: Sequence[str], track: ObjectTrack) -> Figure:
    """Draw the true objects and each object's best detection at some stages, one colour per object throughout.

    Args:
        look: an image with its objects.
        stages: names of the stages, in the order of the columns.
        track: `track_objects(look, stages)`: which detection belongs to each object.
    """
    image, sample = look.sample.image, look.sample
    with style():
        figure = NotebookFigure(figsize=(3.1 * (len(stages) + 1), 3.5), layout="constrained")
        columns = figure.subplots(1, len(stages) + 1)
        names = [data_label(look.classes[label]) for label in sample.labels.tolist()]
        _draw_numbered(columns[0], image, sample.masks.bool(), sample.boxes, dict(enumerate(names)))
        columns[0].set_title("ground truth")
        for axes, stage, rows in zip(columns[1:], stages, track.detection, strict=True):
            instances = look.instances(stage)
            detected = {number: row for number, row in enumerate(rows.tolist()) if row >= 0}
            texts = {number: f"{names[number]} {float(instances.scores[row]):.2f}" for number, row in detected.items()}
            keep = list(detected.values())
            masks = None if instances.query_masks is None else instances.masks[keep]
            _draw_numbered(axes, image, masks, instances.boxes[keep], texts)
            lost = len(names) - len(detected)
            axes.set_title(short_name(stage).replace("\n", " ") + (f", {lost} not found" if lost else ""))
    return figure


def _draw_numbered(axes: Axes, image: Tensor, masks: Tensor | None, boxes: Tensor, texts: Mapping[int, str]) -> None:
    """Masks and boxes in the colours of their objects' numbers, with labels that do not overlap."""
    height, width = image.shape[-2:]
    canvas = image.permute(1, 2, 0).numpy().astype(np.float64) / 255
    colours = [CYCLE[number % len(CYCLE)] for number in texts]
    if masks is not None:
        for mask, colour in zip(masks.numpy(), colours, strict=True):
            canvas[mask] = 0.45 * canvas[mask] + 0.55 * np.array(to_rgb(colour))
    axes.imshow(canvas, extent=(0, width, height, 0))
    taken: list[tuple[float, float, float, float]] = []
    for (x0, y0, x1, y1), colour, text in zip(boxes.tolist(), colours, texts.values(), strict=True):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=1.8))
        size = (0.027 * width * (len(text) + 1), 0.062 * height)
        x, y = _free_place((x0, y0, x1, y1), size, (width, height), taken)
        taken.append((x, y, x + size[0], y + size[1]))
        patch = {"facecolor": colour, "edgecolor": "none", "pad": 1.2, "alpha": 0.92}
        axes.text(x, y + size[1], text, color="white", fontsize=8, bbox=patch, va="bottom")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _free_place(
    box: tuple[float, float, float, float],
    size: tuple[float, float],
    image: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float]:
    """Upper left corner of a label at a box that overlaps no other label: above, inside, below, then further down."""
    x0, y0, x1, y1 = box
    rows = [y0 - size[1], y0, y1 - size[1], y1, *(y0 + k * size[1] for k in range(1, 20))]
    for y, x in itertools.product(rows, (x0, x1 - size[0])):
        x, y = min(max(x, 0), image[0] - size[0]), min(max(y, 0), image[1] - size[1])
        if all(x + size[0] <= a or x >= c or y + size[1] <= b or y >= d for a, b, c, d in taken):
            return x, y
    return x0, y0


def plot_mean_ious(tracks: list[ObjectTrack]) -> Figure:
    """Plot mean box and mask IoU over the objects of several images, per stage.

    Objects that nothing of their class was detected for count with 0.
    """
    stages = tracks[0].stages
    with style():
        figure = NotebookFigure(figsize=(7.5, 3.8), layout="constrained")
        axes = figure.subplots()
        for kind, colour, marker in (("box", BOX, "s"), ("mask", MASK, "o")):
            sums = sum(getattr(t, f"{kind}_iou").sum(1) for t in tracks)
            mean = sums / sum(t.box_iou.shape[1] for t in tracks)
            axes.plot(range(len(stages)), mean, marker=marker, color=colour, label=f"{kind} IoU")
        axes.set(ylabel="mean IoU", title="How well objects are located, stage by stage")
        axes.set_xticks(range(len(stages)), [short_name(name) for name in stages])
        axes.legend(loc="lower right")
    return figure
