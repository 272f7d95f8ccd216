"""The loss: every stage's predictions against the objects they are matched to (section 7)."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dimaskdino import config
from dimaskdino.modeling.records import Predictions, Stage, Targets
from dimaskdino.training.boxes import generalized_iou
from dimaskdino.training.matcher import ALPHA, GAMMA, Matches, match
from dimaskdino.training.points import sample_maps, sample_masks, uncertain_points


@dataclass(frozen=True)
class Losses:
    """Weighted losses by `stage/term`, such as `decoder.6/giou` or `denoising.decoder.0/mask`."""

    terms: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()


def criterion(predictions: Predictions, targets: Targets, settings: config.Loss, objects: float | Tensor) -> Losses:
    """All weighted losses of a batch.

    Args:
        predictions: every stage, and the denoising part.
        targets: the objects.
        settings: weights and mask points.
        objects: what sums are divided by: objects in the global batch / processes; at least 1 is used.
    """
    stages = list(predictions.stages.values())
    n = torch.as_tensor(objects, dtype=torch.float32, device=targets.boxes.device).clamp(min=1)
    terms: dict[str, Tensor] = {}
    with torch.autocast(targets.boxes.device.type, enabled=False):
        for stage, matches in zip(stages, match(stages, targets, settings), strict=True):
            terms |= _weighted(stage.name, stage_losses(stage, matches, targets, settings), n, settings)
        groups = predictions.denoising_groups
        if groups:
            matches = denoising_matches(targets, groups)
            for name, stage in predictions.denoising.items():
                losses = stage_losses(stage, matches, targets, settings)
                terms |= _weighted(f"denoising.{name}", losses, n * groups, settings)
        else:  # nothing to restore, but every parameter keeps its place in the graph
            for name, stage in predictions.denoising.items():
                zeros = dict.fromkeys(("label", "l1", "giou", "mask", "dice"), stage.class_logits.sum())
                terms |= {f"denoising.{name}/{term}": zero for term, zero in zeros.items()}
    return Losses(terms)


def _weighted(name: str, sums: dict[str, Tensor], n: Tensor, settings: config.Loss) -> dict[str, Tensor]:
    return {f"{name}/{term}": getattr(settings.weights, term) * value / n for term, value in sums.items()}


def denoising_matches(targets: Targets, groups: int) -> Matches:
    """Denoising query g·M + j stands for object j, by construction."""
    M = targets.labels.shape[1]
    pairs = []
    for count in targets.counts:
        target = np.tile(np.arange(count), groups)
        pairs.append((target + M * np.repeat(np.arange(groups), count), target))
    return Matches.from_lists(pairs, targets.labels.device)


def stage_losses(stage: Stage, matches: Matches, targets: Targets, settings: config.Loss) -> dict[str, Tensor]:
    """Unweighted sums of one stage's losses: label, l1, giou, and mask and dice where the stage has masks."""
    image, query, target = matches.image, matches.query, matches.target
    boxes, target_boxes = stage.boxes[image, query].float(), targets.boxes[image, target]
    losses = {
        "label": label_loss(stage, matches, targets),
        "l1": functional.l1_loss(boxes, target_boxes, reduction="sum"),
        "giou": (1 - generalized_iou(boxes, target_boxes)).sum(),
    }
    if stage.mask_embedding is not None and stage.mask_features is not None:
        # (rows of one image, C) · (C, h, w), image after image
        embeddings = stage.mask_embedding[image, query].float().split(list(matches.counts))
        features = stage.mask_features.float()
        logits = torch.cat([torch.einsum("rc,chw->rhw", e, f) for e, f in zip(embeddings, features, strict=True)])
        losses |= mask_losses(logits, targets.masks[image, target], settings)
    return losses


def label_loss(stage: Stage, matches: Matches, targets: Targets) -> Float[Tensor, ""]:
    """Focal loss summed over queries and classes; queries without an object have no class."""
    logits = stage.class_logits.float()
    wanted = torch.zeros_like(logits)
    wanted[matches.image, matches.query, targets.labels[matches.image, matches.target]] = 1
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    p = logits.sigmoid()
    wrong = wanted * (1 - p) + (1 - wanted) * p
    balance = wanted * ALPHA + (1 - wanted) * (1 - ALPHA)
    return (balance * wrong**GAMMA * cross_entropy).sum()


def mask_losses(logits: Float[Tensor, "R h w"], masks: Tensor, settings: config.Loss) -> dict[str, Tensor]:
    """BCE averaged over points and dice, summed over the masks.

    Args:
        logits: mask logits at stride 4.
        masks: (R, H, W) uint8, at the size of the input.
        settings: number and choice of the points.
    """
    if not len(logits):  # nothing matched: zero, but part of the graph
        return {"mask": logits.sum(), "dice": logits.sum()}
    points = uncertain_points(logits, settings)
    x = sample_maps(logits.unsqueeze(1), points).squeeze(1)
    t = sample_masks(masks, points)
    bce = functional.binary_cross_entropy_with_logits(x, t, reduction="none").mean(-1)
    p = x.sigmoid()
    dice = 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)
    return {"mask": bce.sum(), "dice": dice.sum()}
