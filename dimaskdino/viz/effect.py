"""The effect of De-Imbalance and BATO in one figure: AP at every stage, and one object followed through the stages."""

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dimaskdino.data.painting import blend_masks, masks_of
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.inspection.look import Look
from dimaskdino.inspection.objects import ObjectTrack, track_objects
from dimaskdino.modeling.stages import is_decoder
from dimaskdino.viz.curves import stage_ticks, stage_title
from dimaskdino.viz.style import BOX, KINDS, MASK, NotebookFigure, add_boxes, show_image, style

MARGIN = 0.35  # of the object's longer side, around it


@style()
def plot_effect(results: Mapping[str, LayerwiseAP], looks: Mapping[str, Look], number: int) -> Figure:
    """Plot models side by side: box and mask AP at every stage of the decoder, and one object at each of them.

    Arrows between the curves of boxes and masks mark the imbalance at the decoder's input and after its first layer.

    Args:
        results: AP of every stage by the name of the model.
        looks: the same image, as each model sees it, by the name of the model.
        number: the object that is followed.
    """
    count, stages = len(results), [name for name in next(iter(results.values())).stages if is_decoder(name)]
    figure = NotebookFigure(figsize=(4.6 * count, 5.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.4, 1])
    above, below = parts
    curves = above.subplots(1, count, sharey=True, squeeze=False)[0]
    pictures = [part.subplots(1, len(stages)) for part in below.subfigures(1, count, wspace=0.06, squeeze=False)[0]]
    for axes, row, (label, result) in zip(curves, pictures, results.items(), strict=True):
        _draw_curves(axes, result, stages, label)
        track = track_objects(looks[label], stages)
        for picture, stage in zip(row, stages, strict=True):
            _draw_object(picture, looks[label], track, stage, number)
    curves[0].set_ylabel("AP (%)")
    curves[0].margins(y=0.12)
    title = "numbers with arrows: imbalance,\nmask AP − box AP"
    curves[0].legend(loc="lower right", title=title, title_fontsize=9)
    below.suptitle(
        "One object: its best detection at each stage with the IoU of box and mask; its true box is dashed", fontsize=10
    )
    return figure


def _draw_curves(axes: Axes, result: LayerwiseAP, stages: list[str], title: str) -> None:
    for kind, colour, marker in KINDS:
        values = [getattr(result.stages[name], kind).AP for name in stages]
        axes.plot(range(len(stages)), values, color=colour, marker=marker, label=f"{kind} AP")
        last, offset = (len(stages) - 1, values[-1]), (7, -12 if kind == "box" else 3)
        axes.annotate(f"{values[-1]:.1f}", last, offset, textcoords="offset points", color=colour)
    for place, name in enumerate(stages[:2]):
        stage = result.stages[name]
        low, high = sorted((stage.box.AP or 0.0, stage.mask.AP if stage.mask and stage.mask.AP else 0.0))
        axes.annotate("", (place, low), (place, high), arrowprops={"arrowstyle": "<->", "shrinkA": 4, "shrinkB": 4})
        text, at = f"{stage.imbalance:+.1f}", (place, high)
        axes.annotate(text, at, (0, 9), textcoords="offset points", ha="center", weight="bold")
    stage_ticks(axes, stages)
    axes.set(title=title, xlim=(-0.3, len(stages) - 0.5))


def _draw_object(axes: Axes, look: Look, track: ObjectTrack, stage: str, number: int) -> None:
    """A crop of the image around an object, with its best detection at a stage."""
    found, row = look.instances(stage), int(track.detection[track.stages.index(stage), number])
    kept = [row] if row >= 0 else []
    show_image(axes, blend_masks(look.sample.image, masks_of(found, kept), [MASK] * len(kept)))
    add_boxes(axes, look.sample.boxes[number : number + 1], "white", linestyles="--")
    add_boxes(axes, found.boxes[kept], BOX, width=2.2)
    x0, y0, x1, y1 = look.sample.boxes[number].tolist()
    half = (0.5 + MARGIN) * max(x1 - x0, y1 - y0)
    axes.set(xlim=((x0 + x1) / 2 - half, (x0 + x1) / 2 + half), ylim=((y0 + y1) / 2 + half, (y0 + y1) / 2 - half))
    place = track.stages.index(stage)
    box, mask = track.box_iou[place, number], track.mask_iou[place, number]
    fit = f"box {box:.2f}\nmask {mask:.2f}" if kept else "not\nfound"
    axes.set_title(f"{stage_title(stage)}\n{fit}", fontsize=8)


def object_to_follow(looks: Mapping[str, Look]) -> int:
    """The object whose box lags most behind its mask at the decoder's input of the first model.

    Among the objects that every model finds at its last stage with a box IoU of at least 0.75.
    """
    candidates, first = None, None
    for look in looks.values():
        stages = [name for name in look.predictions.stages if is_decoder(name)]
        track = track_objects(look, stages)
        first = track if first is None else first
        found = track.box_iou[-1] >= 0.75
        candidates = found if candidates is None else candidates & found
    assert first is not None
    assert candidates is not None
    gap = torch.where(candidates, first.mask_iou[0] - first.box_iou[0], -1.0)
    return int(gap.argmax())
