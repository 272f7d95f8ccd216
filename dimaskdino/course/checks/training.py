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
from dimaskdino.course.checks.pictures import draw_bars, draw_tables
from dimaskdino.course.checks.verdicts import (
    CheckResult,
    box_pairs,
    called,
    compared,
    difference,
    random,
    right,
    seed_of_cases,
    wrong,
)
from dimaskdino.modeling import Detector, ImageBatch
from dimaskdino.modeling.structures import Stage, Targets
from dimaskdino.training.criterion import Losses, criterion
from dimaskdino.training.matcher import matching_costs
from dimaskdino.training.optimizer import build_optimizer
from dimaskdino.training.points import sample_maps, sample_masks


def check_cheapest(function: Callable[[Tensor], tuple[Tensor, bool]]) -> CheckResult:
    """The cheapest query of each object (M,) from costs (Q, M), and whether two objects share one."""
    shared = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    cases = [(random(6, 3, seed=1),), (shared,), (random(4, 1, seed=2),)]

    def expected(cost: Tensor) -> tuple[Tensor, bool]:
        queries = cost.min(0).indices
        return queries, len(set(queries.tolist())) < len(queries)

    return compared(
        function, cases, expected, "look down each column for its least cost; return the pair (queries, shared)"
    )


def check_matching_cost(
    function: Callable[..., Tensor], stage: Stage, targets: Targets, settings: config.Loss
) -> CheckResult:
    """To build: the cost of every query for every object of a real image.

    Args:
        function: the student's, from (logits, boxes, masks, labels, true_boxes, true_masks, giou) to (Q, M).
        stage: predictions for a batch of this image.
        targets: its objects.
        settings: weights of the costs, and number of points.
    """
    labels, true_boxes = targets.labels[0, : targets.counts[0]], targets.boxes[0, : targets.counts[0]]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed_of_cases())
        points = torch.rand(1, settings.points, 2)  # the first that `matching_costs` draws, too

        def cost(**weights: float) -> Tensor:
            torch.manual_seed(seed_of_cases())
            chosen = config.Weights(**(dict.fromkeys(config.Weights.model_fields, 0.0) | weights))
            return matching_costs([stage], targets, settings.model_copy(update={"cost": chosen}))[0][0]

        weights = settings.cost.model_dump()
        parts = {name: cost(**{name: weight}) for name, weight in weights.items()}
        masks = stage.mask_embedding[0] @ sample_maps(stage.mask_features, points)[0]  # type: ignore[index, arg-type]
        rows = torch.arange(len(labels))
        true_masks = sample_masks(targets.masks[0], rows, points.expand(len(labels), -1, -1))
        giou = -cost(giou=1.0)
    expected = sum(parts.values())
    hint = (
        "p = logits.sigmoid()[:, labels]; softplus(x) − t·x is the cross-entropy of x = masks; cdist(…, p=1) for boxes"
    )
    given = (stage.class_logits[0], stage.boxes[0], masks, labels, true_boxes, true_masks, giou)
    answer = called(function, given, hint)
    if answer is None:
        return CheckResult(False)
    problem = difference(answer, expected)
    if problem is None:
        return right(function, f"gives the model's {len(expected)} × {len(labels)} costs")
    if not isinstance(answer, Tensor) or answer.shape != expected.shape:
        return wrong(function, problem, hint)
    picture = draw_tables(answer.numpy(), expected.numpy(), "query", "object")
    for name, part in parts.items():
        if difference(answer, expected - part) is None:
            return wrong(function, f"everything but the {name} cost is there", hint, picture)
        factor = float(((answer - expected) * part).sum() / part.square().sum()) + 1
        if difference(answer, expected + (factor - 1) * part) is None:
            return wrong(function, f"the {name} cost counts {factor:.2g} times", hint, picture)
    return wrong(function, problem, hint, picture)


def check_giou(function: Callable[[Tensor, Tensor], float]) -> CheckResult:
    """Generalised IoU of two boxes, xyxy, as a number."""
    hint = "the hull runs from the smaller of the two left ends to the larger of the two right ends"
    return compared(function, box_pairs(), lambda a, b: float(generalized_box_iou(a[None], b[None])), hint)


def check_dice_loss(function: Callable[[Tensor, Tensor], Tensor]) -> CheckResult:
    """Dice loss of one mask from probabilities and true values (P,)."""
    cases = [(random(7, seed=i), (random(7, seed=i + 5) > 0.4).float()) for i in range(3)]
    hint = "the sums run over the points; the ones above and below keep empty masks from dividing by zero"
    return compared(function, cases, lambda p, t: float(1 - (2 * p @ t + 1) / (p.sum() + t.sum() + 1)), hint)


def check_training_step(
    function: Callable[..., float], detector: Detector, images: ImageBatch, targets: Targets, settings: Config
) -> CheckResult:
    """To build: a training step with denoising on a batch of one image.

    Args:
        function: the student's, from (detector, optimizer, images, targets, settings of the loss, clip_norm) to the
            loss before the step. It changes a copy of the detector, whose parameters have old gradients.
        detector: the model.
        images: the batch.
        targets: its objects.
        settings: of the training.
    """
    hint = "predictions, matches, known pairs of the denoising queries, losses; zero_grad, backward, clip, step"

    def trained(step: Callable[..., Any]) -> tuple[Any, dict[str, float], Detector]:
        """What the function returns, the gradients' norms by module, and the model after the step."""
        model = copy.deepcopy(detector).train()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer = build_optimizer(model, settings.optimizer)
        with torch.random.fork_rng():
            torch.manual_seed(seed_of_cases())
            given = (model, optimizer, images, targets, settings.loss, settings.optimizer.clip_norm)
            returned = called(step, given, hint, copied=False)
        return returned, {name: _norm(module) for name, module in model.named_children()}, model

    def packages(
        model: Detector, optimizer: Any, images: ImageBatch, targets: Targets, loss: config.Loss, clip_norm: float
    ) -> Losses:
        losses = criterion(model(images, targets), targets, loss, sum(targets.counts))
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        return losses

    answer, mine, after = trained(function)
    if answer is None:
        return CheckResult(False)
    losses, norms, model = trained(packages)
    expected = float(losses.total.detach())
    picture = draw_bars(list(norms), list(mine.values()), list(norms.values()), "norm of the gradient")
    problem = difference(answer.detach() if isinstance(answer, Tensor) else answer, expected)
    if problem:
        groups = detector.cfg.denoising.queries // max(targets.counts)
        denoising = sum(float(value.detach()) for name, value in losses.terms.items() if name.startswith("denoising."))
        mistakes = {
            "the denoising queries have no loss": expected - denoising,
            "the denoising losses are not divided by the number of groups": expected + (groups - 1) * denoising,
            "the losses are not divided by the number of objects": expected * sum(targets.counts),
        }
        known = (text for text, then in mistakes.items() if difference(answer, then) is None)
        return wrong(function, f"the loss: {next(known, problem)}", hint, picture)
    moved, model_moved = (
        torch.cat([(a - b).detach().flatten() for a, b in zip(m.parameters(), detector.parameters(), strict=True)])
        for m in (after, model)
    )
    if not moved.any():
        return wrong(function, "the loss is right, but no parameter moves: optimizer.step() is missing", hint)
    if math.hypot(*mine.values()) > 2 * math.hypot(*norms.values()):
        return wrong(function, "the loss is right, but the gradients are not clipped before the step", hint, picture)
    if not torch.allclose(moved, model_moved, atol=1e-6):
        text = "the loss is right, the step is not: are the old gradients gone before backward (zero_grad)?"
        return wrong(function, text, hint, picture)
    return right(function, f"moves every parameter as the package does, with a loss of {expected:.1f}")


def _norm(module: torch.nn.Module) -> float:
    """Norm of the gradients of a module."""
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return float(torch.cat(gradients).norm()) if gradients else 0.0
