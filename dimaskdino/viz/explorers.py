"""Explorers: figures with controls, for notebooks.

Each explorer is a drawing function and widgets for its arguments. Where widgets cannot run, in a printed or exported
notebook, its figure stands there as a picture.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
import torch
import traitlets
from hotcoco import COCO
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from scipy.optimize import linear_sum_assignment

from dimaskdino import config
from dimaskdino.data.coco import Sample
from dimaskdino.evaluation.coco_ap import Kind, precision_curves
from dimaskdino.evaluation.detections import Detections
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.inspection.look import Look
from dimaskdino.inspection.objects import track_objects
from dimaskdino.modeling.structures import Predictions, Targets
from dimaskdino.training.matcher import matching_costs
from dimaskdino.utils.collection import without_collection
from dimaskdino.viz.architecture import FLOWS, describe_flow, draw_flow, place_of
from dimaskdino.viz.curves import plot_layerwise_ap, plot_precision_recall, short_name
from dimaskdino.viz.detections import Formula, boxes_of_true_masks, draw_true_boxes
from dimaskdino.viz.objects import draw_objects
from dimaskdino.viz.studies import plot_ablation
from dimaskdino.viz.tokens import draw_guidance, draw_sampling, draw_selection
from dimaskdino.viz.training import draw_matching


class Picture(anywidget.AnyWidget):
    """A PNG with alternative text that reports clicks.

    Attributes:
        png: the picture.
        alt: what it shows, in words.
        clicked: (x, y) of the last click, as parts of width and height.
    """

    _esm = """
    function render({ model, el }) {
      const image = document.createElement("img");
      image.style.maxWidth = "100%";
      let url = null;
      function show() {
        if (url) URL.revokeObjectURL(url);
        url = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
        image.src = url;
        image.alt = model.get("alt");
      }
      image.addEventListener("click", (event) => {
        const box = image.getBoundingClientRect();
        const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
        model.set("clicked", [x, y]);
        model.save_changes();
      });
      model.on("change:png", show);
      show();
      el.appendChild(image);
    }
    export default { render };
    """
    png = traitlets.Bytes().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)
    clicked = traitlets.List(traitlets.Float()).tag(sync=True)


class Explorer:
    """A figure and the widgets that change it.

    Args:
        draw: makes the figure from the controls' values, given by name.
        describe: says in words what the figure shows, from the same values.
        controls: widgets by the name of the argument they set.
    """

    def __init__(
        self, draw: Callable[..., Figure], describe: Callable[..., str], controls: Mapping[str, widgets.ValueWidget]
    ) -> None:
        self.draw, self.describe, self.controls = draw, describe, dict(controls)
        self.figure: Figure | None = None
        self.picture = Picture()
        self._places: dict[tuple[float, ...], list[Bbox]] = {}
        for control in self.controls.values():
            control.observe(self._update, names="value")
        self._update()
        self.widget = widgets.VBox([widgets.HBox(list(self.controls.values()), layout=_WRAP), self.picture])

    @property
    def values(self) -> dict[str, Any]:
        """What the controls say, by argument."""
        return {name: control.value for name, control in self.controls.items()}

    def _update(self, change: Any = None) -> None:
        with without_collection():  # until the picture is out
            self.figure = self.draw(**self.values)
            buffer = io.BytesIO()
            self.figure.set_dpi(80)
            self._arrange(self.figure)
            FigureCanvasAgg(self.figure).print_png(buffer, pil_kwargs={"compress_level": 1})
            with self.picture.hold_sync():
                self.picture.alt = self.describe(**self.values)
                self.picture.png = buffer.getvalue()

    def _arrange(self, figure: Figure) -> None:
        """Put the axes where the first figure of this kind has them: computing the layout takes half of a drawing."""
        kind = (*figure.get_size_inches(), len(figure.axes))
        if kind not in self._places:
            figure.draw_without_rendering()
            self._places[kind] = [axes.get_position(original=True) for axes in figure.axes]
        figure.set_layout_engine("none")
        for axes, place in zip(figure.axes, self._places[kind], strict=True):
            axes.set_position(place)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        live = self.widget._repr_mimebundle_(**kwargs)
        data, metadata = live if isinstance(live, tuple) else (live, {})
        still = {"image/png": self.picture.png, "text/plain": self.picture.alt}
        return data | still, metadata | {"image/png": {"alt": self.picture.alt}}


_WRAP = widgets.Layout(flex_flow="row wrap")
_STYLE = {"description_width": "initial"}


def _dropdown(label: str, options: Sequence[tuple[str, Any]], value: Any = None) -> widgets.Dropdown:
    return widgets.Dropdown(
        options=options, value=options[0][1] if value is None else value, description=label, style=_STYLE
    )


def _slider(label: str, low: int, high: int, value: int) -> widgets.IntSlider:
    return widgets.IntSlider(value, low, high, description=label, style=_STYLE, continuous_update=False)


def _images(looks: Sequence[Look]) -> widgets.Dropdown:
    return _dropdown("image", [(f"{i + 1}: {look.sample.file.split('/')[-1]}", i) for i, look in enumerate(looks)])


def explore_layers(looks: Sequence[Look]) -> Explorer:
    """Choose an image, a stage and a score threshold: detections, objects and their IoUs through the stages."""
    stages = list(looks[0].predictions.stages)
    tracks: dict[tuple[int, float], Any] = {}

    def track(image: int, threshold: float) -> Any:
        key = (image, threshold)
        if key not in tracks:
            tracks[key] = track_objects(looks[image], threshold=threshold)
        return tracks[key]

    def draw(image: int, stage: str, threshold: float) -> Figure:
        return draw_objects(looks[image], track(image, threshold), stage, threshold)

    def describe(image: int, stage: str, threshold: float) -> str:
        detected = track(image, threshold)
        row = detected.stages.index(stage)
        parts = [
            f"object {i + 1}: box IoU {box:.2f}, mask IoU {mask:.2f}"
            for i, (box, mask) in enumerate(zip(detected.box_iou[row], detected.mask_iou[row], strict=True))
        ]
        return f"Image {image + 1} at stage {stage}, score at least {threshold:g}. " + "; ".join(parts)

    controls = {
        "image": _images(looks),
        "stage": _dropdown("stage", [(short_name(s).replace("\n", " "), s) for s in stages], stages[-1]),
        "threshold": widgets.FloatSlider(
            value=0.3, min=0.05, max=0.95, step=0.05, description="score ≥", style=_STYLE, continuous_update=False
        ),
    }
    return Explorer(draw, describe, controls)


def explore_selection(looks: Sequence[Look]) -> Explorer:
    """From T_s1 to T_s2 over the image, with as many of the best tokens of each as the sliders say."""
    sizes = [tokens.scores.shape[1] for tokens in looks[0].trace.T_s]
    names = [f"k{i + 1}" for i in range(len(sizes))]

    def draw(image: int, **k: int) -> Figure:
        return draw_selection(looks[image], range(len(sizes)), [k[name] for name in names])

    def describe(image: int, **k: int) -> str:
        kept = ", ".join(f"{k[name]} tokens of selection {i + 1}" for i, name in enumerate(names))
        return f"Image {image + 1} with the places and boxes of the best {kept}."

    sliders = {
        name: _slider(f"$k_{i + 1}$", 1, size, size) for i, (name, size) in enumerate(zip(names, sizes, strict=True))
    }
    return Explorer(draw, describe, {"image": _images(looks), **sliders})


def explore_sampling(looks: Sequence[Look]) -> Explorer:
    """Where a query samples the feature levels. Choose it by number, or click: the nearest query answers."""
    locations = looks[0].trace.sampling[0][0]
    layers, queries, heads = len(looks[0].trace.sampling), locations.shape[1], locations.shape[2]

    def draw(image: int, layer: int, query: int, head: int) -> Figure:
        return draw_sampling(looks[image], layer, query, None if head < 0 else head)

    def describe(image: int, layer: int, query: int, head: int) -> str:
        which = "all heads" if head < 0 else f"head {head + 1}"
        return f"Sampling points of query {query} in decoder layer {layer + 1}, {which}, over image {image + 1}."

    controls = {
        "image": _images(looks),
        "layer": _dropdown("decoder layer", [(str(i + 1), i) for i in range(layers)], 0),
        "query": _slider("query", 0, queries - 1, 0),
        "head": _dropdown("head", [("all", -1), *((str(i + 1), i) for i in range(heads))], -1),
    }
    explorer = Explorer(draw, describe, controls)

    def click(change: Any) -> None:
        look, at = looks[explorer.values["image"]], _in_panel(explorer.figure, *change["new"])
        if at is not None:
            centres = look.pixels(look.trace.references[explorer.values["layer"]][0, :, :2])
            controls["query"].value = int((centres - torch.tensor(at)).norm(dim=1).argmin())

    explorer.picture.observe(click, names="clicked")
    return explorer


def _in_panel(figure: Figure | None, x: float, y: float, panels: int | None = None) -> tuple[float, float] | None:
    """Data coordinates of a place in a figure, given from its left and top; None outside its (first) panels."""
    assert figure is not None
    width, height = figure.bbox.size
    for axes in figure.axes[:panels]:
        if axes.bbox.contains(x * width, (1 - y) * height):
            across, down = axes.transData.inverted().transform((x * width, (1 - y) * height))
            return float(across), float(down)
    return None


def explore_guidance(looks: Sequence[Look]) -> Explorer:
    """Choose a guiding token of BATO: what every feature token takes from it."""
    attention = looks[0].trace.guidance_attention
    if attention is None:
        raise ValueError("this model has no BATO, so there are no guiding tokens")

    def draw(image: int, token: int) -> Figure:
        return draw_guidance(looks[image], token - 1)

    def describe(image: int, token: int) -> str:
        return f"How much each feature token of image {image + 1} takes from guiding token {token}."

    controls = {"image": _images(looks), "token": _slider("guiding token", 1, attention.shape[-1], 1)}
    return Explorer(draw, describe, controls)


def explore_architecture(looks: Sequence[Look]) -> Explorer:
    """Choose a place of the architecture, or click on it: what flows there for an image, and its shape."""
    trace = looks[0].trace
    missing = {"T_bal"} if trace.bato is None else set()
    missing |= {"T_s2"} if len(trace.T_s) < 2 else set()
    places = [(name, name) for name in FLOWS if name not in missing]

    def draw(image: int, place: str) -> Figure:
        return draw_flow(looks[image], place)

    def describe(image: int, place: str) -> str:
        return f"Image {image + 1}, {place}: {describe_flow(looks[image], place)}."

    controls = {"image": _images(looks), "place": _dropdown("place", places, "T_i")}
    explorer = Explorer(draw, describe, controls)

    def click(change: Any) -> None:
        at = _in_panel(explorer.figure, *change["new"], panels=1)
        name = None if at is None else place_of(*at)
        if name in dict(places):
            controls["place"].value = name

    explorer.picture.observe(click, names="clicked")
    return explorer


def explore_precision(found: Mapping[str, Detections], truth: COCO, classes: Sequence[str]) -> Explorer:
    """Precision-recall curves of boxes and masks: choose a class, a stage and an IoU threshold."""
    known: dict[tuple[str, Kind, float], Float[np.ndarray, "K 101"]] = {}

    def curves(label: int, stage: str, threshold: float) -> dict[str, Float[np.ndarray, "101"]]:
        kinds: tuple[Kind, ...] = ("box", "mask") if found[stage].has_masks else ("box",)
        for kind in kinds:
            if (stage, kind, threshold) not in known:
                detections = found[stage].boxes if kind == "box" else found[stage].masks
                known[stage, kind, threshold] = precision_curves(truth, detections, kind, threshold)
        return {kind: known[stage, kind, threshold][label] for kind in kinds}

    def draw(label: int, stage: str, threshold: float) -> Figure:
        return plot_precision_recall(curves(label, stage, threshold), f"{classes[label]}, {stage}, IoU ≥ {threshold:g}")

    def describe(label: int, stage: str, threshold: float) -> str:
        areas = (f"{kind} AP {100 * curve.mean():.1f}" for kind, curve in curves(label, stage, threshold).items())
        return f"{classes[label]} at {stage}, IoU at least {threshold:g}: {', '.join(areas)}."

    controls = {
        "label": _dropdown("class", [(name, i) for i, name in enumerate(classes)], 0),
        "stage": _dropdown("stage", [(short_name(s).replace("\n", " "), s) for s in found], list(found)[-1]),
        "threshold": _dropdown("IoU ≥", [(f"{t:.2f}", t) for t in (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)], 0.75),
    }
    return Explorer(draw, describe, controls)


def explore_matching(predictions: Predictions, targets: Targets, sample: Sample, settings: config.Loss) -> Explorer:
    """The costs and the matching of one image at a stage."""
    costs = dict(
        zip(predictions.stages, matching_costs(list(predictions.stages.values()), targets, settings), strict=True)
    )

    def pairs(stage: str) -> list[tuple[int, int]]:
        return list(zip(*(part.tolist() for part in linear_sum_assignment(costs[stage][0].numpy())), strict=True))

    def draw(stage: str) -> Figure:
        boxes = predictions.stages[stage].boxes[0]
        return draw_matching(sample.image, targets.boxes[0], boxes, costs[stage][0], pairs(stage))

    def describe(stage: str) -> str:
        matched = ", ".join(f"object {number + 1} to query {query}" for query, number in pairs(stage))
        return f"Matching at {stage}: {matched}."

    stages = list(predictions.stages)
    names = [(short_name(name).replace("\n", " "), name) for name in stages]
    return Explorer(draw, describe, {"stage": _dropdown("stage", names, stages[0])})


def explore_true_boxes(samples: Sequence[Sample]) -> Explorer:
    """True objects as a model sees them, and the boxes that each formula makes of their masks."""

    def draw(image: int, formula: Formula) -> Figure:
        return draw_true_boxes(samples[image], formula)

    def describe(image: int, formula: Formula) -> str:
        _, ious = boxes_of_true_masks(samples[image], formula)
        return f"Image {image + 1}, {formula}: IoU of the boxes {', '.join(f'{iou:.2f}' for iou in ious)}."

    formulas = [("mask2box, as published", "mask2box"), ("bitmask, with the last cell", "bitmask"), ("none", "no")]
    images = _dropdown("image", [(f"{i + 1}: {s.file.split('/')[-1]}", i) for i, s in enumerate(samples)])
    return Explorer(draw, describe, {"image": images, "formula": _dropdown("formula", formulas)})


def explore_curves(runs: Mapping[str, LayerwiseAP]) -> Explorer:
    """Box and mask AP at every stage of the runs that are chosen, side by side."""
    chosen = widgets.SelectMultiple(options=list(runs), value=list(runs), description="runs", style=_STYLE)

    def draw(names: tuple[str, ...]) -> Figure:
        return plot_layerwise_ap({name: runs[name] for name in names or runs})

    def describe(names: tuple[str, ...]) -> str:
        return "Last stage: " + "; ".join(f"{n} box AP {runs[n].last.box.AP:.1f}" for n in names or runs)

    return Explorer(draw, describe, {"names": chosen})


def explore_studies(
    labels: Mapping[str, Mapping[str, str]],
    columns: Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]],
) -> Explorer:
    """Explore studies: box and mask AP of their variants, published and measured.

    Args:
        labels: for each study's title the labels by name of the variant.
        columns: for each study's title what `plot_ablation` takes.
    """

    def draw(study: str) -> Figure:
        return plot_ablation(labels[study], columns[study], study)

    def describe(study: str) -> str:
        parts = []
        for column, detected in columns[study].items():
            values = (
                f"{labels[study][name]} box AP {sum(p[0] for p in pairs) / len(pairs):.1f}, "
                f"mask AP {sum(p[1] for p in pairs) / len(pairs):.1f}"
                for name, pairs in detected.items()
            )
            parts.append(f"{column}: {'; '.join(values) or 'nothing measured'}")
        return f"{study}. {'. '.join(parts)}."

    return Explorer(draw, describe, {"study": _dropdown("study", [(title, title) for title in labels])})
