"""Detections drawn over their image."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from dimaskdino.data.coco import Sample
from dimaskdino.data.painting import CYCLE, blend_masks, data_label, label, masks_of, paint_instances, paint_sample
from dimaskdino.evaluation.upper_bounds import coverage, true_stage, with_bounds
from dimaskdino.modeling import Instances
from dimaskdino.modeling.structures import padded_size
from dimaskdino.viz.curves import short_name
from dimaskdino.viz.style import BOX, MASK, NotebookFigure, style


def draw_instances(
    image: Tensor,
    instances: Instances,
    classes: Sequence[str],
    threshold: float = 0.3,
    axes: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """Draw masks, boxes, class names and scores over an image.

    Args:
        image: (3, h, w) uint8 RGB.
        instances: detections at the image's size.
        classes: class names.
        threshold: detections with a lower score are left out.
        axes: where to draw; a new figure with the image's aspect ratio by default.
        title: above the image.
    """
    height, width = image.shape[-2:]
    with style():
        if axes is None:
            scale = 7.0 / max(height, width)
            figure = NotebookFigure(figsize=(max(2.0, width * scale), max(2.0, height * scale)), layout="constrained")
            axes = figure.subplots()
        kept = (instances.scores >= threshold).nonzero().flatten().tolist()
        size = 9 if max(height, width) >= 64 else 7
        colours = [CYCLE[number % len(CYCLE)] for number in range(len(kept))]
        masks = masks_of(instances, kept)
        axes.imshow(blend_masks(image, masks, colours[: len(masks)]), extent=(0, width, height, 0))
        for i, colour in reversed(list(zip(kept, colours, strict=True))):  # the best on top
            x0, y0, x1, y1 = instances.boxes[i].tolist()
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=1.6))
            text = label(instances, classes, i)
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
    image: Tensor, stages: Mapping[str, Instances], classes: Sequence[str], threshold: float = 0.3
) -> Figure:
    """Draw one image with the detections of several stages side by side.

    Args:
        image: (3, h, w) uint8 RGB.
        stages: detections at the image's size by stage name.
        classes: class names.
        threshold: detections with a lower score are left out.
    """
    columns = min(4, len(stages))
    rows = -(-len(stages) // columns)
    aspect = image.shape[-2] / image.shape[-1]
    figure = NotebookFigure(figsize=(3.4 * columns, (3.4 * aspect + 0.4) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for each in axes[len(stages) :]:
        each.set_axis_off()
    for each, (name, instances) in zip(axes, stages.items(), strict=False):
        draw_instances(image, instances, classes, threshold, each, short_name(name).replace("\n", " "))
    return figure


def draw_samples(samples: Sequence[Sample], classes: Sequence[str]) -> Figure:
    """Draw annotated images in a grid: masks and boxes in the colour of their class.

    Args:
        samples: images with their objects.
        classes: class names. A legend has the ten most frequent ones of these images.
    """
    columns = min(4, len(samples))
    rows = -(-len(samples) // columns)
    counts = Counter(label for sample in samples for label in sample.labels.tolist())
    colours = {label: CYCLE[place % len(CYCLE)] for place, (label, _) in enumerate(counts.most_common())}
    with style():
        figure = NotebookFigure(figsize=(3.0 * columns, 3.0 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for each in axes:
            each.set_axis_off()
        for each, sample in zip(axes, samples, strict=False):
            _draw_objects(each, sample, colours)
            each.set_title(data_label(Path(sample.file).name), fontsize=7)
        shown = list(colours)[:10]
        patches = [Rectangle((0, 0), 1, 1, color=colours[label]) for label in shown]
        names = [data_label(classes[label]) for label in shown]
        figure.legend(patches, names, loc="outside lower center", ncols=min(5, len(shown) or 1))
    return figure


def draw_beside_truth(
    samples: Sequence[Sample], detections: Sequence[Instances], classes: Sequence[str], notes: Sequence[str]
) -> Figure:
    """Draw images with their objects on the left and with detections on the right, in the colours of the classes.

    Args:
        samples: images with their objects.
        detections: in each of them, at its size.
        classes: class names.
        notes: what to write above the detections of each image.
    """
    with style():
        figure = NotebookFigure(figsize=(7.2, 3.5 * len(samples)), layout="constrained")
        rows = figure.subplots(len(samples), 2, squeeze=False)
        for (left, right), sample, found, note in zip(rows, samples, detections, notes, strict=True):
            left.imshow(paint_sample(sample, classes))
            names = Counter(classes[label] for label in sample.labels.tolist())
            listed = ", ".join(f"{count} {data_label(name)}" for name, count in names.most_common(4)) or "no object"
            left.set_title(f"{data_label(Path(sample.file).name)}\n{listed}", fontsize=8)
            right.imshow(paint_instances(sample.image, found, classes))
            count = len(found.scores)
            right.set_title(f"{count} detection{'s' * (count != 1)}\n{note}", fontsize=8)
            for axes in (left, right):
                axes.set_axis_off()
    return figure


def _draw_objects(axes: Axes, sample: Sample, colours: Mapping[int, str]) -> None:
    own = [colours[number] for number in sample.labels.tolist()]
    canvas = blend_masks(sample.image, list(sample.masks.bool().numpy()), own)
    for colour, (x0, y0, x1, y1) in zip(own, sample.boxes.tolist(), strict=True):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=1.4))
    axes.imshow(canvas, extent=(0, canvas.shape[1], canvas.shape[0], 0))


Formula = Literal["mask2box", "bitmask", "no"]


def boxes_of_true_masks(sample: Sample, formula: Formula) -> tuple[Tensor, list[float]]:
    """The boxes (M, 4) xyxy that a formula makes of true masks, and the IoU of each with the true box."""
    true = sample.boxes
    if formula == "no":
        return true, [1.0] * len(true)
    size = (sample.image.shape[-2], sample.image.shape[-1])
    stage = with_bounds(true_stage(sample.labels, sample.masks, size, int(sample.labels.max()) + 1), formula)
    height, width = padded_size([size])
    made = box_convert(stage.boxes[0], "cxcywh", "xyxy") * true.new_tensor([width, height, width, height])
    return made, box_iou(made, true).diagonal().tolist()


def draw_true_boxes(sample: Sample, formula: Formula) -> Figure:
    """Draw what a formula makes of true masks at a quarter of the resolution, beside the true boxes.

    Args:
        sample: an image with its objects.
        formula: the convention of `model.selection.mask_to_box`; `no` leaves the true boxes.
    """
    size = (sample.image.shape[-2], sample.image.shape[-1])
    (height, width), true = padded_size([size]), sample.boxes
    made, ious = boxes_of_true_masks(sample, formula)
    cells = (coverage(sample.masks, size) > 0.5).any(0).numpy()
    with style():
        figure = NotebookFigure(figsize=(5.6, 5.9), layout="constrained")
        axes = figure.subplots()
        axes.imshow(sample.image.permute(1, 2, 0).numpy())
        shade = np.zeros((*cells.shape, 4))
        shade[cells] = (*to_rgb(MASK), 0.45)
        axes.imshow(shade, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
        for boxes, colour, line in ((true, "black", 2.4), (made, BOX, 1.8)):
            for x0, y0, x1, y1 in boxes.tolist():
                axes.add_patch(
                    Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=line)
                )
        axes.set(xlim=(-0.5, size[1] - 0.5), ylim=(size[0] - 0.5, -0.5), xticks=[], yticks=[])
        axes.grid(False)
        axes.set_title(f"{formula}: IoU of the boxes {', '.join(f'{iou:.2f}' for iou in ious)}", fontsize=10)
    return figure
