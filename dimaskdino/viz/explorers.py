"""Explorers: figures with controls, for notebooks.

Each explorer is a drawing function and widgets for its arguments. Where widgets cannot run, in a printed or exported
notebook, it is shown as a picture.
"""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import anywidget
import ipywidgets as widgets
import numpy as np
import torch
import traitlets
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from scipy.optimize import linear_sum_assignment

from dimaskdino import config
from dimaskdino.data.coco import Sample
from dimaskdino.evaluation.coco_ap import Kind, Truth, precision_curves
from dimaskdino.evaluation.detections import Detections
from dimaskdino.inspection.look import Look
from dimaskdino.inspection.objects import ObjectTrack, track_objects
from dimaskdino.modeling.structures import Predictions, Targets
from dimaskdino.training.matcher import matching_costs
from dimaskdino.viz.curves import plot_precision_recall, stage_title
from dimaskdino.viz.objects import Formula, draw_objects, draw_true_boxes
from dimaskdino.viz.style import NotebookFigure
from dimaskdino.viz.tokens import draw_guidance, draw_sampling, draw_selection
from dimaskdino.viz.training import draw_matching


class Picture(anywidget.AnyWidget):
    """A PNG with alternative text that reports clicks.

    Attributes:
        png: the picture.
        alt: its alternative text.
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

    The alternative text of the picture has the chosen values, then the titles and legends of the figure.

    Args:
        draw: makes the figure from the values of the controls, given by name.
        controls: widgets by the name of the argument they set.
    """

    def __init__(self, draw: Callable[..., Figure], controls: Mapping[str, widgets.ValueWidget]) -> None:
        self.draw, self.controls = draw, dict(controls)
        self.picture = Picture()
        self._places: dict[tuple[float, ...], list[Bbox]] = {}
        for control in self.controls.values():
            control.observe(self._update, names="value")
        self._update()
        self.widget = widgets.VBox([widgets.HBox(list(self.controls.values()), layout=_WRAP), self.picture])

    @property
    def values(self) -> dict[str, Any]:
        """The values of the controls, by argument."""
        return {name: control.value for name, control in self.controls.items()}

    def on_click(self, act: Callable[[float, float], None]) -> None:
        """Call a function for every click on a panel, with the place in the panel's coordinates."""

        def clicked(change: Any) -> None:
            width, height = self.figure.bbox.size
            place = (change["new"][0] * width, (1 - change["new"][1]) * height)
            for axes in self.figure.axes:
                if axes.bbox.contains(*place):
                    act(*axes.transData.inverted().transform(place).tolist())

        self.picture.observe(clicked, names="clicked")

    def _update(self, change: Any = None) -> None:
        self.figure = cast(NotebookFigure, self.draw(**self.values))
        buffer = io.BytesIO()
        self.figure.set_dpi(80)
        self._arrange(self.figure)
        FigureCanvasAgg(self.figure).print_png(buffer, pil_kwargs={"compress_level": 1})
        with self.picture.hold_sync():
            self.picture.alt = self._words()
            self.picture.png = buffer.getvalue()

    def _words(self) -> str:
        chosen = []
        for control in self.controls.values():
            label = getattr(control, "label", control.value)
            shown = ", ".join(label) if isinstance(label, tuple) else label
            chosen.append(f"{control.description} {shown}".replace("$", ""))
        return f"{', '.join(chosen)}. {self.figure.alt}"

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
    chosen = options[0][1] if value is None else value
    return widgets.Dropdown(options=options, value=chosen, description=label, style=_STYLE)


def _slider(label: str, low: int, high: int, value: int) -> widgets.IntSlider:
    return widgets.IntSlider(value, low, high, description=label, style=_STYLE, continuous_update=False)


def _images(shown: Sequence[Look] | Sequence[Sample]) -> widgets.Dropdown:
    samples = [item.sample if isinstance(item, Look) else item for item in shown]
    return _dropdown("image", [(f"{i}: {Path(sample.file).name}", i - 1) for i, sample in enumerate(samples, start=1)])


def _stages(names: Sequence[str], value: str) -> widgets.Dropdown:
    return _dropdown("stage", [(stage_title(name), name) for name in names], value)


def explore_layers(looks: Sequence[Look]) -> Explorer:
    """Choose an image, a stage and a score threshold: detections, objects and their IoUs through the stages."""

    @functools.cache
    def track(image: int, threshold: float) -> ObjectTrack:
        return track_objects(looks[image], threshold=threshold)

    def draw(image: int, stage: str, threshold: float) -> Figure:
        return draw_objects(looks[image], track(image, threshold), stage, threshold)

    names = list(looks[0].predictions.stages)
    settings = {"description": "score ≥", "style": _STYLE, "continuous_update": False}
    threshold = widgets.FloatSlider(value=0.3, min=0.05, max=0.95, step=0.05, **settings)
    controls = {"image": _images(looks), "stage": _stages(names, names[-1]), "threshold": threshold}
    return Explorer(draw, controls)


def explore_selection(looks: Sequence[Look]) -> Explorer:
    """From T_s1 to T_s2 over the image; sliders set how many of the best tokens of each are shown."""

    def draw(image: int, **k: int) -> Figure:
        return draw_selection(looks[image], list(k.values()))

    controls = {"image": _images(looks)}
    for number, tokens in enumerate(looks[0].trace.T_s, start=1):
        size = tokens.scores.shape[1]
        controls[f"k{number}"] = _slider(f"$k_{number}$", 1, size, size)
    return Explorer(draw, controls)


def explore_sampling(looks: Sequence[Look]) -> Explorer:
    """Where a query samples the feature levels. Choose it by number, or click: the query nearest to the click."""
    locations = looks[0].trace.sampling[0][0]
    layers, queries, heads = len(looks[0].trace.sampling), locations.shape[1], locations.shape[2]

    def draw(image: int, layer: int, query: int, head: int) -> Figure:
        return draw_sampling(looks[image], layer, query, None if head < 0 else head)

    controls = {
        "image": _images(looks),
        "layer": _dropdown("decoder layer", [(str(i + 1), i) for i in range(layers)]),
        "query": _slider("query", 0, queries - 1, 0),
        "head": _dropdown("head", [("all", -1), *((str(i + 1), i) for i in range(heads))]),
    }
    explorer = Explorer(draw, controls)

    def click(x: float, y: float) -> None:
        look = looks[controls["image"].value]
        centres = look.pixels(look.trace.references[controls["layer"].value][0, :, :2])
        controls["query"].value = int((centres - torch.tensor([x, y])).norm(dim=1).argmin())

    explorer.on_click(click)
    return explorer


def explore_guidance(looks: Sequence[Look]) -> Explorer:
    """Choose a guiding token of BATO: how much of it every feature token takes."""
    attention = looks[0].trace.guidance_attention
    if attention is None:
        raise ValueError("this model has no BATO, so there are no guiding tokens")

    def draw(image: int, token: int) -> Figure:
        return draw_guidance(looks[image], token - 1)

    token = _slider("guiding token", 1, attention.shape[-1], 1)
    return Explorer(draw, {"image": _images(looks), "token": token})


def explore_precision(found: Mapping[str, Detections], truth: Truth, classes: Sequence[str]) -> Explorer:
    """Precision-recall curves of boxes and masks: choose a class, a stage and an IoU threshold."""

    @functools.cache
    def curves(stage: str, kind: Kind, threshold: float) -> Float[np.ndarray, "K 101"]:
        return precision_curves(truth, found[stage].results(kind), kind, threshold)

    def draw(label: int, stage: str, threshold: float) -> Figure:
        shown = {"box": curves(stage, "box", threshold)[label]}
        if found[stage].has_masks:
            shown["mask"] = curves(stage, "mask", threshold)[label]
        return plot_precision_recall(shown, f"{classes[label]}, {stage_title(stage)}, IoU ≥ {threshold:g}")

    names, thresholds = list(found), (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)
    controls = {
        "label": _dropdown("class", [(name, i) for i, name in enumerate(classes)]),
        "stage": _stages(names, names[-1]),
        "threshold": _dropdown("IoU ≥", [(f"{t:.2f}", t) for t in thresholds], 0.75),
    }
    return Explorer(draw, controls)


def explore_matching(predictions: Predictions, targets: Targets, sample: Sample, cfg: config.Loss) -> Explorer:
    """The costs and the matching of one image at a stage."""
    names = list(predictions.stages)
    costs = dict(zip(names, matching_costs(list(predictions.stages.values()), targets, cfg), strict=True))

    def draw(stage: str) -> Figure:
        cost, boxes = costs[stage][0], predictions.stages[stage].boxes[0]
        queries, objects = linear_sum_assignment(cost.numpy())
        pairs = list(zip(queries.tolist(), objects.tolist(), strict=True))
        return draw_matching(sample.image, targets.boxes[0], boxes, cost, pairs)

    return Explorer(draw, {"stage": _stages(names, names[0])})


def explore_true_boxes(samples: Sequence[Sample]) -> Explorer:
    """True objects as a model sees them, and the boxes that each formula makes of their masks."""

    def draw(image: int, formula: Formula) -> Figure:
        return draw_true_boxes(samples[image], formula)

    formulas = [("mask2box, as published", "mask2box"), ("bitmask, with the last cell", "bitmask"), ("none", "no")]
    return Explorer(draw, {"image": _images(samples), "formula": _dropdown("formula", formulas)})
