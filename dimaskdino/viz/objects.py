"""Objects and detections over their images, and how well each object is found at every stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from dimaskdino.data.coco import Sample
from dimaskdino.data.painting import NO_MASKS, blend_masks, colours_of, data_label, label, masks_of
from dimaskdino.evaluation.upper_bounds import coverage, true_stage, with_boxes_around_masks
from dimaskdino.inspection.look import Look
from dimaskdino.inspection.objects import ObjectTrack
from dimaskdino.modeling import CroppedMasks, Instances
from dimaskdino.modeling.structures import padded_size
from dimaskdino.viz.curves import stage_ticks, stage_title
from dimaskdino.viz.style import BOX, KINDS, MASK, add_boxes, add_labels, panels, show_image, style


@style()
def draw_instances(image: Tensor, instances: Instances, classes: Sequence[str], threshold: float = 0.3) -> Figure:
    """Draw masks, boxes, class names and scores over an image.

    Args:
        image: (3, h, w) uint8 RGB.
        instances: detections at the image's size.
        classes: class names.
        threshold: detections with a lower score are left out.
    """
    height, width = image.shape[-2:]
    scale = 7.0 / max(height, width)
    figure, [axes] = panels(1, 1, max(2.0, width * scale), max(2.0, height * scale))
    shown = int((instances.scores >= threshold).sum())
    title = f"{shown} detection{'s' * (shown != 1)}" + (f" with a score of at least {threshold:g}" * (threshold > 0))
    _draw_detections(axes, image, instances, classes, threshold, title)
    return figure


def _draw_detections(
    axes: Axes, image: Tensor, instances: Instances, classes: Sequence[str], threshold: float, title: str
) -> None:
    """The detections with a score of at least `threshold`, a colour each."""
    kept = (instances.scores >= threshold).nonzero().flatten().tolist()
    texts = [label(instances, classes, i) for i in kept]
    _draw(axes, image, masks_of(instances, kept), instances.boxes[kept], colours_of(range(len(kept))), texts, title)


def _draw(
    axes: Axes,
    image: Tensor,
    masks: CroppedMasks,
    boxes: Tensor,
    colours: Sequence[str],
    texts: Sequence[str],
    title: str,
) -> None:
    """An image with masks (none, or one for each box), boxes (n, 4) xyxy in pixels, and their labels."""
    show_image(axes, blend_masks(image, masks, colours[: len(masks)]), title)
    add_boxes(axes, boxes, colours)
    add_labels(axes, boxes, texts, colours)


@style()
def draw_stages(
    image: Tensor, stages: Mapping[str, Instances], classes: Sequence[str], threshold: float = 0.3
) -> Figure:
    """Draw one image with the detections of several stages, by stage name, as `draw_instances` draws them."""
    figure, grid = _image_grid(len(stages), 3.4, 3.4 * image.shape[-2] / image.shape[-1] + 0.4)
    for axes, (name, instances) in zip(grid, stages.items(), strict=False):
        _draw_detections(axes, image, instances, classes, threshold, stage_title(name))
    return figure


def _image_grid(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with at least `count` panels of `width` × `height` inches, four in a row."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure, grid = panels(rows, columns, width * columns, height * rows)
    for axes in grid:
        axes.set_axis_off()
    return figure, grid


@style()
def draw_samples(samples: Sequence[Sample], classes: Sequence[str]) -> Figure:
    """Draw annotated images in a grid: masks, boxes and class names in the colours of the classes."""
    figure, grid = _image_grid(len(samples), 3.0, 3.2)
    for axes, sample in zip(grid, samples, strict=False):
        labels, masks = sample.labels.tolist(), CroppedMasks.of(sample.masks.bool())
        names = [data_label(classes[number]) for number in labels]
        title = data_label(Path(sample.file).name, 24)
        _draw(axes, sample.image, masks, sample.boxes, colours_of(labels), names, title)
    return figure


@style()
def draw_objects(look: Look, track: ObjectTrack, stage: str, threshold: float = 0.3) -> Figure:
    """Draw the true objects, the detections of one stage, and box and mask IoU of every object per stage.

    `track` is `track_objects(look)`; detections with a score below `threshold` are left out.
    """
    sample, objects = look.sample, len(look.sample.labels)
    colours = colours_of(range(objects))
    figure, (truth, detected, curves) = panels(1, 3, 13.5, 4.4, width_ratios=[1, 1, 1.25])
    texts = [f"{i + 1} {data_label(look.classes[number])}" for i, number in enumerate(sample.labels.tolist())]
    title = "1 true object" if objects == 1 else f"{objects} true objects"
    _draw(truth, sample.image, NO_MASKS, sample.boxes, colours, texts, title)
    title = f"{stage_title(stage)}: score at least {threshold:g}"
    _draw_detections(detected, sample.image, look.instances(stage), look.classes, threshold, title)
    place, chosen = range(len(track.stages)), track.stages.index(stage)
    for number, colour in enumerate(colours):
        box, mask = track.box_iou[:, number], track.mask_iou[:, number]
        text = f"object {number + 1}: box {box[chosen]:.2f}, mask {mask[chosen]:.2f}"
        curves.plot(place, box, "-s", color=colour, label=text, markersize=5)
        curves.plot(place, mask, "--o", color=colour, markersize=5, markerfacecolor="white")
    curves.axvline(chosen, color="black", linewidth=0.8, linestyle=":")
    curves.set(ylim=(-0.03, 1.03), ylabel="IoU with the true object", title="— ■ box    - - ○ mask")
    stage_ticks(curves, track.stages)
    if objects:
        curves.legend(loc="lower right", fontsize=9)
    return figure


@style()
def draw_object_stages(look: Look, stages: Sequence[str], track: ObjectTrack) -> Figure:
    """Draw the true objects and each object's best detection at some stages, one colour per object throughout.

    `track` is `track_objects(look, stages)`.
    """
    sample = look.sample
    names = [data_label(look.classes[number]) for number in sample.labels.tolist()]
    figure, columns = panels(1, len(stages) + 1, 3.1 * (len(stages) + 1), 3.5)
    colours = colours_of(range(len(names)))
    masks = CroppedMasks.of(sample.masks.bool())
    _draw(columns[0], sample.image, masks, sample.boxes, colours, names, "ground truth")
    for axes, stage, rows in zip(columns[1:], stages, track.detection.tolist(), strict=True):
        found = look.instances(stage)
        kept, texts, own = [], [], []
        for number, row in enumerate(rows):
            if row >= 0:  # −1 where nothing was detected
                kept.append(row)
                texts.append(f"{names[number]} {float(found.scores[row]):.2f}")
                own.append(colours[number])
        lost = len(names) - len(kept)
        title = stage_title(stage) + (f", {lost} not found" if lost else "")
        _draw(axes, sample.image, masks_of(found, kept), found.boxes[kept], own, texts, title)
    return figure


@style()
def plot_mean_ious(tracks: Sequence[ObjectTrack]) -> Figure:
    """Plot mean box and mask IoU over the objects of several images, per stage; 0 for an object that is not found."""
    stages = tracks[0].stages
    figure, [axes] = panels(1, 1, 7.5, 3.8)
    for kind, colour, marker in KINDS:
        values = torch.cat([track.box_iou if kind == "box" else track.mask_iou for track in tracks], dim=1)
        axes.plot(range(len(stages)), values.mean(1), marker=marker, color=colour, label=f"{kind} IoU")
    axes.set(ylabel="mean IoU", title="How well objects are located, stage by stage")
    stage_ticks(axes, stages, 11)
    axes.legend(loc="lower right")
    return figure


Formula = Literal["mask2box", "bitmask", "no"]


@style()
def draw_true_boxes(sample: Sample, formula: Formula) -> Figure:
    """Draw the boxes that a formula makes of true masks at a quarter of the resolution, beside the true boxes.

    The formulas are those of `model.selection.mask_to_box`; `no` leaves the true boxes.
    """
    size = (sample.image.shape[-2], sample.image.shape[-1])
    height, width = padded_size([size])
    boxes = sample.boxes
    if formula != "no":
        stage = with_boxes_around_masks(
            true_stage(sample.labels, sample.masks, size, int(sample.labels.max()) + 1), formula
        )
        boxes = box_convert(stage.boxes[0], "cxcywh", "xyxy") * boxes.new_tensor([width, height, width, height])
    ious = ", ".join(f"{iou:.2f}" for iou in box_iou(boxes, sample.boxes).diagonal().tolist())
    cells = (coverage(sample.masks, size) > 0.5).any(0)
    seen = cells.repeat_interleave(4, 0).repeat_interleave(4, 1)[: size[0], : size[1]]
    figure, [axes] = panels(1, 1, 5.6, 5.9)
    blended = blend_masks(sample.image, CroppedMasks.of(seen[None]), [MASK])
    show_image(axes, blended, f"{formula}: IoU of the boxes {ious}", fontsize=10)
    add_boxes(axes, sample.boxes, "black", 2.4)
    add_boxes(axes, boxes, BOX, 1.8)
    return figure
