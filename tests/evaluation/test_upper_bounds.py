"""Upper bounds on AP against cases worked out by hand."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from small import overrides

from dimaskdino.config import load_config
from dimaskdino.data.coco import encode_masks
from dimaskdino.evaluation import upper_bounds as module
from dimaskdino.evaluation.coco_ap import AveragePrecision, Truth, read_truth
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP, StageAP
from dimaskdino.evaluation.upper_bounds import UpperBounds, coverage, upper_bounds
from dimaskdino.viz import plot_layerwise_ap


def squares(*sides):
    """The truth of one 32×32 image for each side, with a square of that side at (8, 8), of a class of its own."""
    images, annotations, categories = [], [], []
    for number, side in enumerate(sides, start=1):
        mask = np.zeros((1, 32, 32), bool)
        mask[0, 8 : 8 + side, 8 : 8 + side] = True
        square = {"image_id": number, "category_id": number, "bbox": [8, 8, side, side], "area": side**2, "iscrowd": 0}
        images.append({"id": number, "height": 32, "width": 32})
        annotations.append(square | {"segmentation": encode_masks(mask)[0]})
        categories.append({"id": number, "name": f"side {side}"})
    return Truth({"images": images, "annotations": annotations, "categories": categories})


def settings(model="dimaskdino", mask_to_box="mask2box"):
    resize = ["data.resize.shortest=32", "data.resize.longest=32"]
    return load_config(f"shapes/{model}_r18", [*resize, f"model.selection.mask_to_box={mask_to_box}"])


def test_squares_by_hand():
    """A square of 8 is 2×2 cells of 4 pixels. Without the last cell its box has side 4: IoU 16/64, below 0.5. A square
    of 16 becomes 12: IoU 144/256 = 0.5625, above 0.50 and 0.55, two of COCO's ten thresholds. Masks lose their four
    corner pixels when they are enlarged bilinearly: IoU 60/64 = 0.9375, nine thresholds, and 252/256, all ten.
    """
    found = upper_bounds(squares(8, 16), settings())
    assert found.box["mask2box"].per_class == pytest.approx({"side 8": 0, "side 16": 20})
    assert found.box["bitmask"].per_class == pytest.approx({"side 8": 100, "side 16": 100})
    assert found.mask.per_class == pytest.approx({"side 8": 90, "side 16": 100})
    assert (found.box["mask2box"].mean, found.mask.mean) == pytest.approx((10, 95))
    assert (found.mask.small, found.mask.medium) == (pytest.approx(95), None)  # both squares are small


def test_stages_with_an_upper_bound_of_boxes():
    truth = squares(16)
    # with De-Imbalance, token interaction predicts the boxes that enter the decoder
    assert upper_bounds(truth, settings("dimaskdino")).of_boxes("decoder.0") is None
    assert upper_bounds(truth, settings("maskdino")).of_boxes("decoder.0").mean == pytest.approx(20)
    assert upper_bounds(truth, settings("maskdino")).of_boxes("decoder.1") is None
    assert upper_bounds(truth, settings("maskdino", "bitmask")).of_boxes("decoder.0").mean == pytest.approx(100)
    assert upper_bounds(truth, settings("maskdino", "no")).boxes_from_masks == {}


def test_coverage_keeps_the_area():
    masks = torch.zeros(2, 30, 45, dtype=torch.uint8)
    masks[0, 3:17, 5:31] = 1
    masks[1, 29, 44] = 1
    found = coverage(masks, (30, 45))
    assert found.shape == (2, 8, 16)  # padded to 32×64
    torch.testing.assert_close(16 * found.sum((1, 2)), masks.sum((1, 2)).float())
    doubled = coverage(masks, (60, 90))
    torch.testing.assert_close(16 * doubled.sum((1, 2)), 4 * masks.sum((1, 2)).float(), rtol=0.01, atol=0.01)


def test_large_splits_are_sampled(monkeypatch):
    monkeypatch.setattr(module, "IMAGES", 2)
    found = upper_bounds(squares(8, 16, 8, 16), settings())  # the first and the third image
    assert [name for name, value in found.mask.per_class.items() if value is not None] == ["side 8"]
    assert found.mask.mean == pytest.approx(90)


def result(box, mask):
    """A result with these AP at `decoder.0` and `decoder.1`, with the upper bounds of a square of 16."""

    def ap(value):
        return AveragePrecision(**dict.fromkeys(AveragePrecision.__dataclass_fields__) | {"AP": value, "per_class": {}})

    limits = upper_bounds(squares(8, 16), settings("maskdino"))
    stages = {name: StageAP(ap(box), ap(mask)) for name in ("decoder.0", "decoder.1")}
    return LayerwiseAP(stages, 1, "by hand", limits)


def test_imbalance_relative_to_the_upper_bounds(tmp_path):
    """Upper bounds 10 (boxes that enter the decoder), 100 (predicted boxes) and 95 (masks)."""
    measured = result(box=5.0, mask=38.0)
    assert measured.relative_imbalance("decoder.0") == pytest.approx(40 - 50)
    assert measured.relative_imbalance("decoder.1") == pytest.approx(40 - 5)
    measured.save(tmp_path / "layers.json")
    assert LayerwiseAP.load(tmp_path / "layers.json") == measured
    without = LayerwiseAP(measured.stages, 1, "an older record")
    without.save(tmp_path / "layers.json")
    assert LayerwiseAP.load(tmp_path / "layers.json") == without
    assert without.relative_imbalance("decoder.0") is None


def test_upper_bounds_are_drawn():
    figure = plot_layerwise_ap({"model": result(5.0, 38.0)})
    drawn = {tuple(line.get_ydata()) for line in figure.axes[0].lines}
    assert any(value == pytest.approx([95, 95]) for value in drawn)
    assert any(value == pytest.approx([10, 10]) for value in drawn)


def test_evaluation_records_them(shapes_data):
    config = load_config("shapes/dimaskdino_r18", overrides(shapes_data))
    truth = read_truth(shapes_data / "annotations" / "val.json")
    found = upper_bounds(truth, config)
    assert UpperBounds.from_json(json.loads(json.dumps(asdict(found)))) == found
    # the looser convention is never below the tighter one here, and bounds of true masks are no perfect boxes
    assert found.box["mask2box"].mean < found.box["bitmask"].mean < 100
