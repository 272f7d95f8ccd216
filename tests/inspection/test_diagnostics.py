"""Diagnostics, each on a case worked out by hand."""

import json
import math

import pytest
import torch
from small import trained_file
from torch import nn

from dimaskdino import config, load
from dimaskdino.evaluation.coco_ap import AveragePrecision
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP, StageAP, evaluate_layers
from dimaskdino.inspection.diagnostics import (
    MatchedObjects,
    effective_rank,
    gradient_conflict,
    imbalance_by_group,
    match_objects,
    query_stability,
    selection_recall,
    summary,
    survey,
)
from dimaskdino.modeling import Predictions, Stage, Targets
from dimaskdino.modeling.structures import FeatureLevels, SelectedTokens
from dimaskdino.training.criterion import Losses
from dimaskdino.utils.errors import UserError


def test_imbalance_of_groups():
    def ap(small, large, disk):
        return AveragePrecision(0.0, 0.0, 0.0, small, None, large, {"disk": disk, "ring": None})

    result = LayerwiseAP(
        {"decoder.0": StageAP(ap(1.0, 5.0, 3.0), ap(4.0, 4.0, 10.0)), "ti": StageAP(ap(1.0, 1.0, 1.0), None)}, 1, ""
    )
    assert imbalance_by_group(result, "size") == {"small": {"decoder.0": 3}, "large": {"decoder.0": -1}}
    assert imbalance_by_group(result, "class") == {"disk": {"decoder.0": 7}}


def bands(*columns):
    """Masks (M, 32, 32) of the first columns."""
    masks = torch.zeros(len(columns), 32, 32, dtype=torch.uint8)
    for mask, count in zip(masks, columns, strict=True):
        mask[:, :count] = 1
    return masks


def test_matched_queries_and_how_they_fit():
    """Query 2 finds object 0 exactly; query 0 is object 1's, with half its box and twice its mask; query 1 is junk."""
    targets = Targets(
        torch.tensor([[0, 1]]), torch.tensor([[[0.5, 0.5, 1, 1], [0.125, 0.5, 0.25, 1]]]), bands(32, 8)[None], (2,)
    )
    wide = torch.where(torch.arange(8) < 4, 5.0, -5.0).expand(8, 8)  # 16 of 32 columns at stride 4
    features = torch.stack([wide, torch.full((8, 8), -5.0), torch.full((8, 8), 5.0)])[None]
    stage = Stage(
        "decoder.1",
        torch.tensor([[[-9.0, 9], [-9, -9], [9, -9]]]),
        torch.tensor([[[0.0625, 0.5, 0.125, 1], [0.9, 0.9, 0.1, 0.1], [0.5, 0.5, 1, 1]]]),
        torch.eye(3)[None],
        features,
    )
    boxes_only = Stage("token_interaction.0", stage.class_logits[:, [2]], stage.boxes[:, [2]])
    found = match_objects(
        Predictions({"token_interaction.0": boxes_only, "decoder.1": stage}), targets, config.Loss(points=64)
    )
    assert found.stages == ("token_interaction.0", "decoder.1")
    assert found.query.tolist() == [[0, -1], [2, 0]]  # one query cannot stand for two objects
    torch.testing.assert_close(found.box_iou, torch.tensor([[1.0, 0.0], [1.0, 0.5]]))
    assert found.mask_iou[0].isnan().all()
    torch.testing.assert_close(found.mask_iou[1], torch.tensor([1.0, 0.5]))


def test_objects_that_keep_their_query():
    nothing = torch.zeros(4, 3)
    query = torch.tensor([[7, 7, 7], [1, 2, 3], [1, 5, -1], [4, 5, 3]])
    matched = MatchedObjects(("first_selection", "decoder.0", "decoder.1", "decoder.2"), query, nothing, nothing)
    assert query_stability(matched) == {"decoder.1": 0.5, "decoder.2": 0.5}
    assert query_stability(MatchedObjects.joined([matched, matched])) == {"decoder.1": 0.5, "decoder.2": 0.5}


def test_objects_that_a_selection_keeps():
    """Levels of 1 and 2x2 cells over 32x32 pixels: tokens at (16, 16), then (8, 8), (24, 8), (8, 24), (24, 24)."""
    masks = torch.zeros(2, 2, 32, 32, dtype=torch.uint8)
    masks[0, 0, 6:10, 6:10] = 1  # holds token 1
    masks[0, 1, 0:4, 0:4] = 1  # holds none
    masks[1, 0, 14:26, 14:26] = 1  # holds tokens 0 and 4
    targets = Targets(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, 4), masks, (2, 1))
    levels = FeatureLevels(torch.zeros(2, 5, 1), ((1, 1), (2, 2)), (32, 16))

    def tokens(*indices):
        k = len(indices[0])
        return SelectedTokens(torch.zeros(2, k, 1), torch.zeros(2, k, 4), torch.tensor(indices), torch.zeros(2, k))

    kept = selection_recall(levels, [tokens([1, 2], [4, 3]), tokens([2], [4])], targets)
    assert {name: objects.tolist() for name, objects in kept.items()} == {
        "T_i": [True, False, True],
        "T_s1": [True, False, True],
        "T_s2": [False, False, True],
    }


def test_effective_rank():
    same = torch.full((6, 4), 0.25)
    own = torch.eye(4).repeat(2, 1)
    two = torch.diag(torch.tensor([1.0, 1, 0, 0]))
    torch.testing.assert_close(
        effective_rank(torch.stack([same, torch.cat([two, two[:2] * 0])])), torch.tensor([1.0, 2])
    )
    assert effective_rank(own).item() == pytest.approx(4)


def test_gradients_that_conflict():
    """Part a: (3, 0) for boxes and (−1, 1) for masks. Part b: boxes alone."""
    model = nn.ModuleDict({"a": nn.Linear(1, 2), "b": nn.Linear(1, 1)})
    x, alone = model["a"].weight[:, 0], model["b"].weight.sum()
    terms = {
        "decoder.1/l1": 2 * x[0],
        "denoising.decoder.1/giou": x[0] + alone,
        "decoder.1/mask": -x[0],
        "decoder.1/dice": x[1],
        "decoder.1/label": 100 * x.sum(),
    }
    (part, found), *others = gradient_conflict(Losses(terms), model).items()
    assert (part, others) == ("a", [])
    assert (found.box_norm, found.mask_norm) == pytest.approx((3, math.sqrt(2)))
    assert found.cosine == pytest.approx(-1 / math.sqrt(2))


def test_a_survey_of_a_model(shapes_data, tmp_path):
    model = load(trained_file(tmp_path / "model.safetensors", shapes_data))
    state = torch.get_rng_state()
    found = survey(model, images=3, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    N = found.matched.query.shape[1]
    content = json.loads((shapes_data / "annotations" / "val.json").read_text())
    counts = [sum(a["image_id"] == i["id"] for a in content["annotations"]) for i in content["images"]]
    assert sum([count for count in counts if count][:3]) == N
    assert found.matched.stages[0] == "first_selection"
    assert {name: len(kept) for name, kept in found.recall.items()} == {"T_i": N, "T_s1": N, "T_s2": N}
    assert bool((found.recall["T_s2"] <= found.recall["T_s1"]).all())
    assert len(found.guidance_rank) == 3
    assert ((found.guidance_rank >= 1) & (found.guidance_rank <= 4)).all()
    assert {"backbone", "pixel_decoder", "decoder", "de_imbalance", "bato"} <= set(found.conflict)
    for batches in found.conflict.values():
        assert len(batches) == 2
        for c in batches:  # an untrained box head passes no gradient on
            assert math.isnan(c.cosine) if 0 in (c.box_norm, c.mask_norm) else abs(c.cosine) <= 1
    written = json.loads(json.dumps(summary(evaluate_layers(model), found)))
    assert written["objects"] == N
    other = load(trained_file(tmp_path / "other.safetensors", shapes_data, "model.classes=3"))
    with pytest.raises(UserError, match="has 3 classes"):
        survey(other, images=1)
