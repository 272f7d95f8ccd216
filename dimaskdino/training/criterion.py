"""The loss (section 7): predictions of every stage against the objects they are matched to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dimaskdino import config
from dimaskdino.modeling.structures import Predictions, Stage, Targets
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
        objects: divisor of the sums: number of objects in the global batch / number of processes; at least 1.
    """
    stages = list(predictions.stages.values())
    n = (torch.ones((), device=targets.boxes.device) * objects).clamp(min=1)
    groups = predictions.denoising_groups
    with torch.autocast(targets.boxes.device.type, enabled=False):
        judged = list(zip(stages, match(stages, targets, settings), strict=True))
        names, divisors = [stage.name for stage in stages], [n] * len(stages)
        if groups:
            restored = denoising_matches(targets, groups)
            judged += [(stage, restored) for stage in predictions.denoising.values()]
            names += [f"denoising.{name}" for name in predictions.denoising]
            divisors += [n * groups] * len(predictions.denoising)
        sums = stage_losses(judged, targets, settings)
    terms = {
        f"{name}/{term}": getattr(settings.weights, term) * value / divisor
        for name, divisor, losses in zip(names, divisors, sums, strict=True)
        for term, value in losses.items()
    }
    if not groups:  # no denoising, but every parameter stays part of the graph
        for name, stage in predictions.denoising.items():
            zeros = dict.fromkeys(("label", "l1", "giou", "mask", "dice"), stage.class_logits.sum())
            terms |= {f"denoising.{name}/{term}": zero for term, zero in zeros.items()}
    return Losses(terms)


def denoising_matches(targets: Targets, groups: int) -> Matches:
    """Denoising query g·M + j stands for object j, by construction."""
    M = targets.labels.shape[1]
    pairs = []
    for count in targets.counts:
        target = np.tile(np.arange(count), groups)
        pairs.append((target + M * np.repeat(np.arange(groups), count), target))
    return Matches.from_lists(pairs, targets.labels.device)


# a CPU is slower with all masks at once (2.1 s instead of 1.1 s per step), since temporaries leave its caches
ROWS_AT_A_TIME = {"cpu": 64, "cuda": 1024}

Judged = Sequence[tuple[Stage, Matches]]


def stage_losses(judged: Judged, targets: Targets, settings: config.Loss) -> list[dict[str, Tensor]]:
    """Unweighted sums of the losses of every stage: label, l1, giou, and mask and dice where the stage has masks.

    All stages are computed together: on a GPU a few large operations take less time than many small ones.
    """
    counts = [sum(matches.counts) for _, matches in judged]
    boxes = torch.cat([stage.boxes[m.image, m.query].float() for stage, m in judged])
    wanted = torch.cat([targets.boxes[m.image, m.target] for _, m in judged])
    l1 = (boxes - wanted).abs().sum(-1).split(counts)
    giou = (1 - generalized_iou(boxes, wanted)).split(counts)
    losses = [
        {"label": label, "l1": a.sum(), "giou": b.sum()}
        for label, a, b in zip(label_losses(judged, targets), l1, giou, strict=True)
    ]
    with_masks = [i for i, (stage, _) in enumerate(judged) if stage.has_masks]
    if with_masks:
        found = mask_losses([judged[i] for i in with_masks], targets, settings)
        for i, mask, dice in zip(with_masks, *found, strict=True):
            losses[i] |= {"mask": mask, "dice": dice}
    return losses


def label_losses(judged: Judged, targets: Targets) -> list[Tensor]:
    """Focal loss per stage, summed over queries and classes. Queries without an object have no class."""
    losses: dict[int, Tensor] = {}
    for shape in {stage.class_logits.shape for stage, _ in judged}:
        alike = [i for i, (stage, _) in enumerate(judged) if stage.class_logits.shape == shape]
        logits = torch.stack([judged[i][0].class_logits.float() for i in alike])
        wanted = torch.zeros_like(logits)
        matches = [judged[i][1] for i in alike]
        image, query, target = (torch.cat([getattr(m, key) for m in matches]) for key in ("image", "query", "target"))
        place = torch.from_numpy(np.repeat(np.arange(len(matches)), [sum(m.counts) for m in matches]))
        place = place.to(logits.device, non_blocking=True)
        # the number 1 itself would be copied from the host, which waits for the copy
        wanted[place, image, query, targets.labels[image, target]] = wanted.new_ones(())
        cross_entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        p = logits.sigmoid()
        wrong = wanted * (1 - p) + (1 - wanted) * p
        balance = wanted * ALPHA + (1 - wanted) * (1 - ALPHA)
        losses |= dict(zip(alike, (balance * wrong**GAMMA * cross_entropy).flatten(1).sum(1), strict=True))
    return [losses[i] for i in range(len(judged))]


def mask_losses(judged: Judged, targets: Targets, settings: config.Loss) -> tuple[Tensor, Tensor]:
    """BCE averaged over points, and dice, summed over the masks of each stage: two tensors with one value per stage.

    Args:
        judged: stages with masks.
        targets: the objects.
        settings: number of points and their choice.
    """
    B, M, H, W = targets.masks.shape
    logits, objects, owners = [], [], []
    # stages that share their mask features are multiplied with them in one operation per image
    for features in {id(stage.mask_features): stage.mask_features for stage, _ in judged}.values():
        sharing = [i for i, (stage, _) in enumerate(judged) if stage.mask_features is features]
        queries = {i: judged[i][1].query.split(list(judged[i][1].counts)) for i in sharing}
        chosen = {i: judged[i][1].target.split(list(judged[i][1].counts)) for i in sharing}
        for b in range(B):
            embeddings = torch.cat([judged[i][0].mask_embedding[b, queries[i][b]].float() for i in sharing])
            logits.append(torch.einsum("rc,chw->rhw", embeddings, features[b].float()))
            objects += [b * M + chosen[i][b] for i in sharing]
            owners += [np.full(judged[i][1].counts[b], i) for i in sharing]
    x = torch.cat(logits)
    if not len(x):  # nothing matched: zero, but part of the graph
        zeros = x.sum().expand(len(judged))
        return zeros, zeros
    masks, size = targets.masks.reshape(B * M, H, W), ROWS_AT_A_TIME.get(x.device.type, len(x))
    parts = [
        _compare(*part, masks, settings) for part in zip(x.split(size), torch.cat(objects).split(size), strict=True)
    ]
    bce, dice = (torch.cat(values) for values in zip(*parts, strict=True))
    # (stages, masks), 1 where the mask belongs to the stage: a sum in a fixed order
    member = torch.from_numpy(np.arange(len(judged))[:, None] == np.concatenate(owners))
    member = member.to(x.device, non_blocking=True).float()
    return member @ bce, member @ dice


def _compare(logits: Tensor, rows: Tensor, masks: Tensor, settings: config.Loss) -> tuple[Tensor, Tensor]:
    """BCE and dice of mask logits (R, h, w) against the masks `rows` (R,) of (N, H, W), one value per row."""
    points = uncertain_points(logits, settings)
    t = sample_masks(masks, rows, points)
    x = sample_maps(logits.unsqueeze(1), points).squeeze(1)
    bce = functional.binary_cross_entropy_with_logits(x, t, reduction="none").mean(-1)
    p = x.sigmoid()
    return bce, 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)
