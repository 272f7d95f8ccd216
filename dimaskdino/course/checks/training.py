"""Chapter 6: matching, losses and a training step."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou

from dimaskdino import config
from dimaskdino.config import Config
from dimaskdino.course.checks.compare import Wrong, box_pairs, called, check, compared, expect, random
from dimaskdino.course.checks.pictures import draw_tables
from dimaskdino.modeling import Detector, ImageBatch
from dimaskdino.modeling.structures import Stage, Targets
from dimaskdino.training.criterion import Losses, criterion
from dimaskdino.training.matcher import matching_costs
from dimaskdino.training.optimizer import build_optimizer
from dimaskdino.training.points import sample_maps, sample_masks


@check("look down each column for its least cost; return the pair (queries, shared)")
def check_cheapest(function: Callable[[Tensor], tuple[Tensor, bool]]) -> str:
    """The cheapest query of each object (M,) from costs (Q, M), and whether two objects share one."""
    shared = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    cases = [(random(6, 3, seed=1),), (shared,), (random(4, 1, seed=2),)]

    def expected(cost: Tensor) -> tuple[Tensor, bool]:
        queries = cost.min(0).indices
        return queries, len(set(queries.tolist())) < len(queries)

    return compared(function, cases, expected)


@check("p = logits.sigmoid()[:, labels]; softplus(x) − t·x is the cross-entropy of x = masks; cdist(…, p=1) for boxes")
def check_matching_cost(function: Callable[..., Tensor], stage: Stage, targets: Targets, cfg: config.Loss) -> str:
    """To build: the costs (Q, M) of a real image, from (logits, boxes, masks, labels, true_boxes, true_masks, giou).

    `stage` has the predictions for a batch of this image, `targets` its objects.
    """
    labels, true_boxes = targets.labels[0, : targets.counts[0]], targets.boxes[0, : targets.counts[0]]

    def cost(**weights: float) -> Tensor:
        torch.manual_seed(0)
        chosen = config.Weights(**(dict.fromkeys(config.Weights.model_fields, 0.0) | weights))
        return matching_costs([stage], targets, cfg.model_copy(update={"cost": chosen}))[0][0]

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        points = torch.rand(1, cfg.points, 2)  # the first that `matching_costs` draws, too
        parts = {name: cost(**{name: weight}) for name, weight in cfg.cost.model_dump().items()}
        giou = -cost(giou=1.0)
        # a stage with masks
        assert stage.mask_embedding is not None
        assert stage.mask_features is not None
        masks = stage.mask_embedding[0] @ sample_maps(stage.mask_features, points)[0]
        rows = torch.arange(len(labels))
        true_masks = sample_masks(targets.masks[0], rows, points.expand(len(labels), -1, -1))
    expected = torch.stack(list(parts.values())).sum(0)
    given = (stage.class_logits[0], stage.boxes[0], masks, labels, true_boxes, true_masks, giou)
    answer = called(function, given)
    mistakes = {}
    for name, part in parts.items():
        mistakes[f"the {name} cost is missing"] = expected - part
        if isinstance(answer, Tensor) and answer.shape == expected.shape:
            factor = float(((answer - expected) * part).sum() / part.square().sum()) + 1
            mistakes[f"the {name} cost counts {factor:.2g} times"] = expected + (factor - 1) * part
    expect(answer, expected, mistakes, lambda: draw_tables(answer, expected, "query", "object"))
    return f"{len(expected)} × {len(labels)} costs"


@check("the hull runs from the smaller of the two left ends to the larger of the two right ends")
def check_giou(function: Callable[[Tensor, Tensor], float]) -> str:
    """Generalised IoU of two boxes, xyxy, as a number."""
    return compared(function, box_pairs(), lambda a, b: float(generalized_box_iou(a[None], b[None])))


@check("the sums run over the points; the ones above and below keep empty masks from dividing by zero")
def check_dice_loss(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Dice loss of one mask from probabilities and true values (P,)."""
    cases = [(random(7, seed=i), (random(7, seed=i + 5) > 0.4).float()) for i in range(3)]
    return compared(function, cases, lambda p, t: float(1 - (2 * p @ t + 1) / (p.sum() + t.sum() + 1)))


@check("predictions, matches, known pairs of the denoising queries, losses; zero_grad, backward, clip, step")
def check_training_step(
    function: Callable[..., float], detector: Detector, images: ImageBatch, targets: Targets, cfg: Config
) -> str:
    """To build: a training step with denoising on a batch of one image.

    The student's function takes (detector, optimizer, images, targets, settings of the loss, clip_norm) and returns the
    loss before the step. It changes a copy of the detector, whose parameters have old gradients.
    """

    def trained(step: Callable[..., Any]) -> tuple[Any, float, Tensor]:
        """The result of a step, the norm of the gradients after it, and the change of the parameters."""
        model = copy.deepcopy(detector).train()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer = build_optimizer(model, cfg.optimizer)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            given = (model, optimizer, images, targets, cfg.loss, cfg.optimizer.clip_norm)
            returned = called(step, given, copied=False)
        squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
        return returned, math.sqrt(squares), _parameters(model) - _parameters(detector)

    def packages(
        model: Detector, optimizer: Any, images: ImageBatch, targets: Targets, loss: config.Loss, clip_norm: float
    ) -> Losses:
        losses = criterion(model(images, targets), targets, loss, sum(targets.counts))
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        return losses

    answer, norm, moved = trained(function)
    losses, expected_norm, expected_move = trained(packages)
    expected = float(losses.total.detach())
    denoising = sum(float(value.detach()) for name, value in losses.terms.items() if name.startswith("denoising."))
    groups = detector.cfg.denoising.queries // max(targets.counts)
    mistakes = {
        "the denoising queries have no loss": expected - denoising,
        "the denoising losses are not divided by the number of groups": expected + (groups - 1) * denoising,
        "the losses are not divided by the number of objects": expected * sum(targets.counts),
    }
    expect(answer.detach() if isinstance(answer, Tensor) else answer, expected, mistakes, where="the loss: ")
    if not moved.any():
        raise Wrong("the loss is right, but no parameter moves: optimizer.step() is missing")
    if norm > 2 * expected_norm:
        raise Wrong("the loss is right, but the gradients are not clipped before the step")
    if not torch.allclose(moved, expected_move, atol=1e-6):
        raise Wrong("the loss is right, the step is not: are the old gradients gone before backward (zero_grad)?")
    return f"the loss, {expected:.1f}, and every parameter after the step"


def _parameters(module: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
