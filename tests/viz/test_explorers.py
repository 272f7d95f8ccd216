"""Figures of the intermediates and the explorers, operated through their controls."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small import trained_file

from dimaskdino import load
from dimaskdino.data.coco import CocoDataset, Sample
from dimaskdino.data.dataloader import collate, training_dataset
from dimaskdino.evaluation.coco_ap import precision_curves, read_truth
from dimaskdino.evaluation.layerwise_ap import detect_layers
from dimaskdino.inspection.look import look_at
from dimaskdino.inspection.objects import track_objects
from dimaskdino.modeling import ImageBatch
from dimaskdino.training.matcher import match
from dimaskdino.viz import draw_architecture, draw_interaction, draw_mask_features, draw_token_maps, plot_mean_ious
from dimaskdino.viz.explorers import (
    explore_guidance,
    explore_layers,
    explore_matching,
    explore_precision,
    explore_sampling,
    explore_selection,
    explore_true_boxes,
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
        (explore_layers, "stage", "decoder.0", "stage decoder input"),
        (explore_layers, "image", 2, "image 3: "),
        (explore_selection, "k1", 5, "k_1 5, k_2 12. Figure: T_{s1}: 5 tokens and their boxes"),
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


def test_lit_parts_stand_out():
    def strong(*parts):
        return {patch.get_linewidth() for patch in draw_architecture(*parts).axes[0].patches}

    assert 2.2 not in strong()
    assert 2.2 in strong("bato")
    assert draw_architecture("bato").axes[0].get_title() == "Where this chapter is: BATO (Eq. 5–8)"


def test_precision_explorer_shows_the_librarys_curves(looks, shapes_data, tmp_path):
    model = load(trained_file(tmp_path / "model.safetensors", shapes_data))
    found, truth = detect_layers(model), read_truth(shapes_data / "annotations" / "val.json")
    explorer = explore_precision(found, truth, model.classes)
    explorer.controls["threshold"].value, explorer.controls["stage"].value = 0.5, "decoder.1"
    box, mask = (line.get_ydata() for line in explorer.figure.axes[0].lines)
    assert np.array_equal(box, precision_curves(truth, found["decoder.1"].boxes, "box", 0.5)[0])
    assert np.array_equal(mask, precision_curves(truth, found["decoder.1"].masks, "mask", 0.5)[0])
    explorer.controls["stage"].value = "token_interaction.0"
    assert len(explorer.figure.axes[0].lines) == 1  # no masks there


def test_boxes_of_true_masks():
    """A square of 16 pixels becomes 12 without the last cell: IoU 144/256; with it, and predicted, it stays."""
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, 8:24, 20:36] = 1
    sample = Sample(torch.zeros(3, 64, 64, dtype=torch.uint8), torch.tensor([2]), masks, 0, "a.png", (64, 64))
    explorer = explore_true_boxes([sample])
    for formula, iou in (("mask2box", "0.56"), ("bitmask", "1.00"), ("no", "1.00")):
        explorer.controls["formula"].value = formula
        assert explorer.picture.alt.endswith(f"{formula}: IoU of the boxes {iou}")
        true, made = (drawn.get_paths()[0].get_extents() for drawn in explorer.figure.axes[0].collections)
        assert (true.x0, true.y1) == (20, 24)
        assert made.width == pytest.approx(12 if formula == "mask2box" else 16)


def test_matching_explorer_shows_the_matching(shapes_data, tmp_path):
    model = load(trained_file(tmp_path / "model.safetensors", shapes_data))
    sample = training_dataset(model.config)[0]
    targets, settings = collate([sample]).targets, model.config.loss
    with torch.no_grad():
        predictions = model.detector(ImageBatch.from_images([sample.image]), targets)
    torch.manual_seed(3)  # of the points at which masks are compared
    explorer = explore_matching(predictions, targets, sample, settings)
    torch.manual_seed(3)
    expected = match(list(predictions.stages.values()), targets, settings)
    for (stage, _), matches in zip(predictions.stages.items(), expected, strict=True):
        explorer.controls["stage"].value = stage
        table = explorer.figure.axes[1]
        queries = [int(text.get_text()) for text in table.get_xticklabels()]
        framed = set()
        for frame in table.collections[0].get_paths():
            column, row = (round(x + 0.5) for x in frame.vertices.min(0))
            framed.add((row, queries[column]))
        assert framed == set(zip(matches.target.tolist(), matches.query.tolist(), strict=True))


def test_where_widgets_cannot_run_there_is_a_picture(looks):
    data, metadata = explore_guidance(looks)._repr_mimebundle_()
    assert metadata["image/png"]["alt"].startswith("image 1: 000000.jpg, guiding token 1. Figure: ")
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


def test_guidance_needs_bato(looks):
    trace = replace(looks[0].trace, bato=None)
    without = replace(looks[0], predictions=replace(looks[0].predictions, trace=trace))
    with pytest.raises(ValueError, match="no BATO"):
        explore_guidance([without])


def test_other_figures_of_the_intermediates(looks):
    figures = [draw_interaction(looks[1]), draw_token_maps(looks[1]), draw_mask_features(looks[1], 3)]
    for figure in [*figures, plot_mean_ious([track_objects(looks[1])])]:
        assert np.asarray(Image.open(io.BytesIO(figure._repr_png_()[0]))).std() > 5  # something is drawn
