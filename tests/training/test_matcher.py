"""Matching against a slow and obvious reading of section 7."""

import itertools
import math

import torch
from torchvision.ops import box_convert, generalized_box_iou

from dimaskdino import config
from dimaskdino.modeling import Stage, Targets
from dimaskdino.training import matcher
from dimaskdino.training.matcher import generalized_iou, match
from dimaskdino.training.points import sample_maps, sample_masks, uncertain_points

LOSS = config.Loss(points=200)


def synthetic(Q: int = 6, counts: tuple[int, ...] = (3, 1), seed: int = 0) -> tuple[list[Stage], Targets]:
    g = torch.Generator().manual_seed(seed)
    B, M, K, C = len(counts), max(counts), 4, 8
    features = torch.randn(B, C, 16, 16, generator=g)

    def stage(name: str, masks: bool) -> Stage:
        logits, boxes = torch.randn(B, Q, K, generator=g), torch.rand(B, Q, 4, generator=g)
        if not masks:
            return Stage(name, logits, boxes)
        return Stage(name, logits, boxes, torch.randn(B, Q, C, generator=g), features)

    keep = torch.arange(M) < torch.tensor(counts)[:, None]
    targets = Targets(
        torch.randint(0, K, (B, M), generator=g) * keep,
        torch.rand(B, M, 4, generator=g) * keep[..., None],
        (torch.rand(B, M, 64, 64, generator=g) > 0.6).byte() * keep[..., None, None].byte(),
        counts,
    )
    return [stage("decoder.0", True), stage("token_interaction.0", False), stage("decoder.1", True)], targets


def slow_cost(stage: Stage, targets: Targets, b: int, q: int, j: int, points: torch.Tensor) -> float:
    """One entry of the cost matrix, term by term."""
    label, weights = int(targets.labels[b, j]), LOSS.cost
    p = float(stage.class_logits[b, q, label].sigmoid())
    focal = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8)
    cost = weights.label * focal
    cost += weights.l1 * float((stage.boxes[b, q] - targets.boxes[b, j]).abs().sum())
    xyxy = [box_convert(x[None], "cxcywh", "xyxy") for x in (stage.boxes[b, q], targets.boxes[b, j])]
    cost -= weights.giou * float(generalized_box_iou(*xyxy))
    if stage.has_masks:
        logits = stage.mask_logits()[b, q][None, None]
        x = sample_maps(logits, points[b][None])[0, 0]
        t = sample_maps(targets.masks[b, j].float()[None, None], points[b][None])[0, 0]
        cost += weights.mask * float(torch.nn.functional.binary_cross_entropy_with_logits(x, t))
        s = x.sigmoid()
        cost += weights.dice * float(1 - (2 * (s * t).sum() + 1) / (s.sum() + t.sum() + 1))
    return cost


def test_the_cheapest_assignment_of_all(monkeypatch):
    stages, targets = synthetic(Q=5, counts=(3, 1))
    points = torch.rand(2, LOSS.points, 2, generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(matcher.torch, "rand", lambda *shape, device: points)
    for stage, found in zip(stages, match(stages, targets, LOSS), strict=True):
        for b, count in enumerate(targets.counts):
            best = min(
                itertools.permutations(range(5), count),
                key=lambda queries: sum(slow_cost(stage, targets, b, q, j, points) for j, q in enumerate(queries)),
            )
            rows = (found.image == b).nonzero().flatten()
            pairs = {int(found.target[r]): int(found.query[r]) for r in rows}
            assert [pairs[j] for j in range(count)] == list(best), stage.name


def test_more_objects_than_queries():
    stages, targets = synthetic(Q=2, counts=(5, 1))
    for found in match(stages, targets, LOSS):
        assert found.counts == (2, 1)
        assert sorted(found.query[found.image == 0].tolist()) == [0, 1]


def test_no_objects_at_all():
    stages, _ = synthetic(Q=4, counts=(1, 1))
    empty = Targets(
        torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, 4), torch.zeros(2, 0, 64, 64, dtype=torch.uint8), (0, 0)
    )
    assert all(found.counts == (0, 0) for found in match(stages, empty, LOSS))


def test_costs_that_are_not_numbers_do_not_break_matching():
    stages, targets = synthetic()
    stages[0].class_logits[0, 2] = torch.nan
    found = match(stages, targets, LOSS)[0]
    assert found.counts == (3, 1)
    assert 2 not in found.query[found.image == 0].tolist()


def test_giou_is_torchvisions_up_to_the_added_epsilon():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(6, 4, generator=g) * 0.5 + 0.2, torch.rand(4, 4, generator=g) * 0.5 + 0.2
    expected = generalized_box_iou(box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy"))
    torch.testing.assert_close(generalized_iou(a[:, None], b[None]), expected, atol=1e-4, rtol=0)


def test_masks_are_sampled_like_maps():
    g = torch.Generator().manual_seed(0)
    masks = (torch.rand(3, 20, 31, generator=g) > 0.5).byte()
    points = torch.rand(3, 100, 2, generator=g) * 1.4 - 0.2  # also beyond the border
    rows = torch.tensor([2, 0, 2])
    expected = sample_maps(masks[rows].float()[:, None], points)[:, 0]
    torch.testing.assert_close(sample_masks(masks, rows, points), expected, atol=1e-5, rtol=0)


def test_uncertain_points_lie_where_the_mask_is_unsure():
    columns = torch.linspace(-8, 8, 64).expand(1, 64, 64)  # unsure in the middle columns
    settings = config.Loss(points=1000, uncertain_fraction=1.0)
    x = uncertain_points(columns.contiguous(), settings)[0, :, 0]
    assert float((x - 0.5).abs().mean()) < 0.5 * float((torch.rand(1000) - 0.5).abs().mean())


def test_each_mask_chooses_its_own_points():
    columns = torch.linspace(-8, 8, 64).expand(64, 64)  # unsure in the middle columns, its transpose in the middle rows
    points = uncertain_points(torch.stack([columns, columns.T]), config.Loss(points=1000, uncertain_fraction=0.75))
    middle = ((points - 0.5).abs() < 0.13).float().mean(1)  # parts of the points in a quarter of the image
    assert middle[0, 0] > 0.7 > 0.4 > middle[0, 1]
    assert middle[1, 1] > 0.7 > 0.4 > middle[1, 0]
