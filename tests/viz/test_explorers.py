"""Figures of the intermediates and the explorers, operated through their controls."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from small import trained_file

from dimaskdino import load
from dimaskdino.data.coco import CocoDataset
from dimaskdino.evaluation.coco_ap import AveragePrecision
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP, StageAP
from dimaskdino.inspection.look import look_at
from dimaskdino.inspection.objects import track_objects
from dimaskdino.viz import draw_interaction, draw_mask_features, draw_token_maps, plot_mean_ious
from dimaskdino.viz.explorers import (
    explore_curves,
    explore_guidance,
    explore_layers,
    explore_sampling,
    explore_selection,
    explore_studies,
)


@pytest.fixture(scope="module")
def looks(shapes_data, tmp_path_factory):
    model = load(trained_file(tmp_path_factory.mktemp("model") / "model.safetensors", shapes_data))
    data = CocoDataset(shapes_data, "val")
    return [look_at(model, data[i]) for i in range(3)]


def pixels(explorer):
    return np.asarray(Image.open(io.BytesIO(explorer.picture.png)).convert("RGB"))


@pytest.mark.parametrize(
    ("explore", "control", "value", "words"),
    [
        (explore_layers, "stage", "decoder.0", "stage decoder.0"),
        (explore_layers, "image", 2, "Image 3"),
        (explore_selection, "k1", 5, "best 5 tokens of selection 1, 12 tokens of selection 2"),
        (explore_sampling, "layer", 1, "decoder layer 2"),
        (explore_sampling, "head", 3, "head 4"),
        (explore_guidance, "token", 2, "guiding token 2"),
    ],
)
def test_a_control_changes_picture_and_words(looks, explore, control, value, words):
    explorer = explore(looks)
    before = pixels(explorer)
    explorer.controls[control].value = value
    assert words in explorer.picture.alt
    assert explorer.values[control] == value
    after = pixels(explorer)
    assert before.shape != after.shape or (before != after).any()


def test_where_widgets_cannot_run_there_is_a_picture(looks):
    data, metadata = explore_guidance(looks)._repr_mimebundle_()
    assert metadata["image/png"]["alt"].startswith("How much each feature token")
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["image/png"].startswith(b"\x89PNG")
    assert "guiding token 1" in data["text/plain"]


def test_a_click_chooses_the_nearest_query(looks):
    explorer = explore_sampling(looks)
    centres = looks[0].pixels(looks[0].trace.references[0][0, :, :2])
    for query in (3, 7):
        axes = explorer.figure.axes[1]
        x, y = axes.transData.transform(centres[query].tolist()) / explorer.figure.bbox.size
        explorer.picture.clicked = [float(x), float(1 - y)]
        chosen = explorer.values["query"]
        assert (centres[chosen] - centres[query]).norm() < 1e-3
    explorer.picture.clicked = [0.001, 0.999]  # beside the panels
    assert explorer.values["query"] == chosen


def test_curves_of_the_chosen_runs():
    def run(value):
        ap = AveragePrecision(**dict.fromkeys(AveragePrecision.__dataclass_fields__, value))
        return LayerwiseAP({"decoder.1": StageAP(ap, ap)}, 1, "")

    explorer = explore_curves({"a": run(10.0), "b": run(20.0)})
    assert explorer.picture.alt == "Last stage: a box AP 10.0; b box AP 20.0"
    explorer.controls["names"].value = ("b",)
    assert explorer.picture.alt == "Last stage: b box AP 20.0"


def test_studies_by_their_titles():
    rows = {"one": {"a": "A"}, "two": {"b": "B"}}
    columns = {
        "one": {"COCO": {"a": [(30.0, 20.0)]}},
        "two": {"COCO": {"b": [(40.0, 41.0), (50.0, 43.0)]}, "shapes": {}},
    }
    explorer = explore_studies(rows, columns)
    assert explorer.picture.alt == "one. COCO: A box AP 30.0, mask AP 20.0."
    explorer.controls["study"].value = "two"
    assert explorer.picture.alt == "two. COCO: B box AP 45.0, mask AP 42.0. shapes: nothing measured."


def test_guidance_needs_bato(looks):
    trace = replace(looks[0].trace, bato=None)
    without = replace(looks[0], predictions=replace(looks[0].predictions, trace=trace))
    with pytest.raises(ValueError, match="no BATO"):
        explore_guidance([without])


def test_other_figures_of_the_intermediates(looks):
    figures = [draw_interaction(looks[1]), draw_token_maps(looks[1]), draw_mask_features(looks[1], 3)]
    for figure in [*figures, plot_mean_ious([track_objects(looks[1])])]:
        assert np.asarray(Image.open(io.BytesIO(figure._repr_png_()[0]))).std() > 5  # something is drawn
