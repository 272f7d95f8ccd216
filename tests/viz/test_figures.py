"""Figures show the numbers they are given."""

import torch

from dimaskdino.evaluation.coco_ap import AveragePrecision
from dimaskdino.evaluation.layers import LayerwiseAP, StageAP
from dimaskdino.modeling import Instances
from dimaskdino.viz import draw_instances, draw_stages, layerwise_ap, loss_curves


def ap(value: float) -> AveragePrecision:
    return AveragePrecision(value, value, value, None, None, None, {})


RESULT = LayerwiseAP(
    {
        "first_selection": StageAP(ap(10.0), ap(20.0)),
        "token_interaction.0": StageAP(ap(15.0), None),
        "decoder.0": StageAP(ap(16.0), ap(21.0)),
        "decoder.1": StageAP(ap(30.0), ap(28.0)),
    },
    4,
    "made up",
)


def test_layerwise_curves_hold_every_value_at_its_stage():
    top, bottom = layerwise_ap({"a": RESULT}).axes
    box, mask = top.lines
    assert (list(box.get_xdata()), list(box.get_ydata())) == ([0, 1, 2, 3], [10, 15, 16, 30])
    assert (list(mask.get_xdata()), list(mask.get_ydata())) == ([0, 2, 3], [20, 21, 28])
    assert [bar.get_height() for bar in bottom.patches] == [10, 5, -2]
    assert [t.get_text() for t in bottom.get_xticklabels()] == [
        *("first\nselection", "token\ninter. 1", "decoder\ninput", "layer 1")
    ]
    assert "10.0" in [text.get_text() for text in top.texts]


def test_two_runs_of_different_depth_share_the_axis():
    shallow = LayerwiseAP({"first_selection": StageAP(ap(1), ap(2)), "decoder.1": StageAP(ap(3), ap(4))}, 4, "")
    top, _ = layerwise_ap({"a": RESULT, "b": shallow}).axes
    assert list(top.lines[2].get_xdata()) == [0, 3]
    assert {text.get_text() for text in top.get_legend().get_texts()} == {"a: box", "a: mask", "b: box", "b: mask"}


def test_loss_curves():
    losses = {f"decoder.{i}/{t}": 1.0 + i for i in (1, 2) for t in ("label", "l1", "giou", "mask", "dice")}
    records = [{"step": s, "loss": 9.0 / s, "losses": losses} for s in (1, 2, 3)] + [{"step": 3, "skipped": "x"}]
    left, right = loss_curves({"a": records, "empty": []}).axes
    assert list(left.lines[0].get_ydata()) == [9.0, 4.5, 3.0]
    assert all(set(line.get_ydata()) == {3.0} for line in right.lines)  # of the last layer


def test_instances_above_the_threshold_are_drawn():
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[0, 5:10, 5:10] = True
    boxes = torch.tensor([[5.0, 5, 10, 10], [0, 0, 3, 3]])
    found = Instances(boxes, torch.tensor([0.9, 0.1]), torch.tensor([1, 0]), masks, torch.tensor([0, 1]))
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    axes = draw_instances(image, found, ["cup", "key"], threshold=0.5).axes[0]
    assert [text.get_text() for text in axes.texts] == ["key 0.90"]
    shown = axes.images[0].get_array()
    assert (shown.sum(-1) > 0).sum() == 25  # the mask, and nothing else, is coloured
    figure = draw_stages(image, {"decoder.0": found, "decoder.1": found}, ["cup", "key"])
    assert [a.get_title() for a in figure.axes] == ["decoder input", "layer 1"]
    assert figure._repr_png_().startswith(b"\x89PNG")
