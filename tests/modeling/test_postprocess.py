"""Instances against a slow reading of the specification, section 8."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import interpolate

from dimaskdino.modeling import Stage, postprocess
from dimaskdino.modeling.postprocess import enlarge_inside, enlarge_whole
from dimaskdino.utils.errors import UserError


def synthetic_stage(B: int = 2, Q: int = 7, K: int = 3, C: int = 8) -> Stage:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Stage("decoder.1", random(B, Q, K), random(B, Q, 4).sigmoid(), random(B, Q, C), random(B, C, 16, 24))


def test_against_a_loop():
    stage, sizes, outputs = synthetic_stage(), [(60, 90), (64, 96)], [(120, 180), (64, 96)]
    results = postprocess(stage, sizes, (64, 96), outputs, detections=9)
    logits = stage.mask_logits()
    for b, found in enumerate(results):
        probability = stage.class_logits[b].sigmoid()
        ranked = sorted(((float(probability[q, k]), q, k) for q in range(7) for k in range(3)), reverse=True)[:9]
        expected = []
        for score, q, k in ranked:
            mask = interpolate(logits[b, q][None, None], (64, 96), mode="bilinear", align_corners=False)
            mask = mask[:, :, : sizes[b][0], : sizes[b][1]]
            mask = interpolate(mask, outputs[b], mode="bilinear", align_corners=False)[0, 0]
            inside = mask > 0
            quality = float(mask.sigmoid()[inside].sum() / (inside.sum() + 1e-6))
            cx, cy, w, h = (stage.boxes[b, q] * torch.tensor([96, 64, 96, 64])).tolist()
            scale = outputs[b][1] / sizes[b][1], outputs[b][0] / sizes[b][0]
            box = [(cx - w / 2) * scale[0], (cy - h / 2) * scale[1], (cx + w / 2) * scale[0], (cy + h / 2) * scale[1]]
            expected.append((score * quality, k, box, inside))
        expected.sort(key=lambda e: -e[0])
        torch.testing.assert_close(found.scores, torch.tensor([e[0] for e in expected]))
        assert found.labels.tolist() == [e[1] for e in expected]
        torch.testing.assert_close(found.boxes, torch.tensor([e[2] for e in expected]), atol=1e-3, rtol=1e-5)
        assert torch.equal(found.masks, torch.stack([e[3] for e in expected]))


def discs(count: int, h: int, w: int) -> torch.Tensor:
    """Mask logits of discs of all sizes and places, some empty, some beyond the border, and one that is everywhere."""
    g = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    centre = torch.rand(count, 2, 1, 1, generator=g) * 1.2 - 0.1
    distance = ((y - centre[:, 0] * h) ** 2 + (x - centre[:, 1] * w) ** 2) ** 0.5
    radius = torch.rand(count, 1, 1, generator=g) * h / 2 - 1
    logits = radius - distance + 0.2 * torch.randn(count, h, w, generator=g)
    logits[0] = 1
    return logits


@pytest.mark.parametrize("output", [(60, 90), (120, 180), (37, 41), (7, 400)])
@pytest.mark.parametrize("enlarge", [enlarge_inside, enlarge_whole])
def test_masks_are_enlarged_as_pytorch_does_it(enlarge, output):
    logits, padded, size = discs(60, 16, 24), (64, 96), (60, 90)
    masks, quality = enlarge(logits, padded, size, output)
    expected = interpolate(logits[None], padded, mode="bilinear", align_corners=False)[:, :, : size[0], : size[1]]
    expected = interpolate(expected, output, mode="bilinear", align_corners=False)[0]
    inside = expected > 0
    areas = inside.sum((1, 2))
    assert areas.min() == 0
    assert areas[0] == math.prod(output)
    assert torch.equal(masks.whole(), inside)
    torch.testing.assert_close(quality, (expected.sigmoid() * inside).sum((1, 2)) / (areas + 1e-6))


def test_only_the_detected_queries_masks_are_made():
    found = postprocess(synthetic_stage(Q=50), [(64, 96)] * 2, (64, 96), [(64, 96)] * 2, detections=5)
    assert all(len(f.query_masks) <= 5 for f in found)


def test_a_stage_without_masks_scores_by_class():
    stage = synthetic_stage()
    boxes_only = Stage(stage.name, stage.class_logits, stage.boxes)
    found = postprocess(boxes_only, [(64, 96)] * 2, (64, 96), [(64, 96)] * 2, detections=4)[0]
    assert found.query_masks is None
    torch.testing.assert_close(found.scores, stage.class_logits[0].sigmoid().flatten().topk(4).values)


def test_more_detections_than_pairs():
    assert len(postprocess(synthetic_stage(), [(64, 96)] * 2, (64, 96), [(64, 96)] * 2, detections=100)[0].scores) == 21


@pytest.mark.parametrize(("field", "value"), [("class_logits", math.nan), ("boxes", math.nan), ("boxes", math.inf)])
def test_values_that_are_not_finite_are_an_error(field, value):
    stage = synthetic_stage()
    broken = getattr(stage, field).clone()
    broken[1, 2, 0] = value
    with pytest.raises(UserError, match="scores or boxes are not finite"):
        postprocess(dataclasses.replace(stage, **{field: broken}), [(60, 90)] * 2, (64, 96), [(60, 90)] * 2)


def test_a_threshold_leaves_out_pairs_and_changes_no_other():
    stage, sizes = synthetic_stage(Q=50), [(64, 96)] * 2
    everything = postprocess(stage, sizes, (64, 96), sizes, detections=40)
    likely = postprocess(stage, sizes, (64, 96), sizes, detections=40, threshold=0.7)
    for found, wanted in zip(likely, everything, strict=True):
        assert 0 < len(found.scores) < 40
        above = wanted.scores >= 0.7  # final scores are not above class scores, so that these are all there
        keep = found.scores >= 0.7
        torch.testing.assert_close(found.scores[keep], wanted.scores[above])
        assert torch.equal(found.labels[keep], wanted.labels[above])
        assert torch.equal(found.masks[keep], wanted.masks[above])
    for found in postprocess(stage, sizes, (64, 96), sizes, threshold=1.0):
        assert len(found.scores) == 0
        assert found.masks.shape == (0, 64, 96)
