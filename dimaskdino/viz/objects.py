"""Single objects through the stages."""

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dimaskdino.inspection.look import Look
from dimaskdino.inspection.objects import ObjectTrack
from dimaskdino.viz.curves import short_name
from dimaskdino.viz.detections import draw_instances
from dimaskdino.viz.style import BOX, CYCLE, MASK, NotebookFigure, style
from dimaskdino.viz.tokens import draw_image


def draw_objects(look: Look, track: ObjectTrack, stage: str, threshold: float = 0.3) -> Figure:
    """The true objects, one stage's detections, and box and mask IoU of every object through the stages."""
    objects = len(look.sample.labels)
    with style():
        figure = NotebookFigure(figsize=(15, 4.9), layout="constrained")
        truth, found, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])
        draw_image(look, truth, "1 true object" if objects == 1 else f"{objects} true objects")
        for number, (x0, y0, x1, y1) in enumerate(look.sample.boxes.tolist()):
            colour = CYCLE[number % len(CYCLE)]
            truth.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=1.8))
            name = f"{number + 1} {look.classes[int(look.sample.labels[number])]}"
            patch = {"facecolor": colour, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
            truth.text(x0, y0, name, color="white", fontsize=9, bbox=patch, va="bottom", clip_on=True)
        instances = look.instances(stage)
        title = f"{short_name(stage)}: score at least {threshold:g}".replace("\n", " ")
        draw_instances(look.sample.image, instances, look.classes, threshold, found, title)
        place = range(len(track.stages))
        for number in range(objects):
            colour = CYCLE[number % len(CYCLE)]
            right.plot(place, track.box_iou[:, number], "-s", color=colour, label=f"object {number + 1}", markersize=5)
            right.plot(place, track.mask_iou[:, number], "--o", color=colour, markersize=5, markerfacecolor="white")
        if stage in track.stages:
            right.axvline(track.stages.index(stage), color="black", linewidth=0.8, linestyle=":")
        right.set(ylim=(-0.03, 1.03), ylabel="IoU with the true object", title="— ■ box    - - ○ mask")
        right.set_xticks(list(place), [short_name(name) for name in track.stages])
        if objects:
            right.legend(loc="lower right", fontsize=9)
    return figure


def plot_mean_ious(tracks: list[ObjectTrack]) -> Figure:
    """Mean box and mask IoU over the objects of several images, stage by stage.

    Objects that nothing of their class was found for count with 0.
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
