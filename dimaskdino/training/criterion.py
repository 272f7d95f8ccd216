"""The loss (section 7): predictions of every stage against the objects they are matched to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from dimaskdino import config
from dimaskdino.modeling.structures import Predictions, Stage, Targets
from dimaskdino.training.matcher import ALPHA, GAMMA, Matches, generalized_iou, match
from dimaskdino.training.points import sample_maps, sample_masks, uncertain_points
from dimaskdino.utils import plugins

LOSS_TERMS = ("label", "l1", "giou", "mask", "dice")

# a CPU is slower with all masks at once (2.1 s instead of 1.1 s per step), since temporaries leave its caches
ROWS_AT_A_TIME = {"cpu": 64, "cuda": 1024}

Pair = tuple[Stage, Matches]


@dataclass(frozen=True)
class Losses:
    """Weighted losses by `stage/term`, such as `decoder.6/giou` or `denoising.decoder.0/mask`."""

    terms: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()


def criterion(predictions: Predictions, targets: Targets, cfg: config.Loss, objects: float | Tensor) -> Losses:
    """Compute all weighted losses of a batch.

    Args:
        predictions: every stage, and the denoising part.
        targets: the objects.
        cfg: weights, mask points and additional terms.
        objects: divisor of the sums: number of objects in the global batch / number of processes; at least 1.

    Raises:
        UserError: an additional term or matching cost cannot be used.
    """
    n = (torch.ones((), device=targets.boxes.device) * objects).clamp(min=1)
    groups = predictions.denoising_groups
    terms: dict[str, Tensor] = {}
    with torch.autocast(targets.boxes.device.type, enabled=False):
        stages = list(predictions.stages.values())
        # one matching per stage: layers may disagree about which query stands for an object
        pairs: list[Pair] = list(zip(stages, match(stages, targets, cfg), strict=True))
        names, divisors = list(predictions.stages), [n] * len(stages)
        # denoising queries know their objects, and there are `groups` of them for each
        if groups:
            restored = denoising_matches(targets, groups)
            for name, stage in predictions.denoising.items():
                pairs.append((stage, restored))
                names.append(f"denoising.{name}")
                divisors.append(n * groups)
        # all stages in one call, since the masks of all of them are compared at the same random points
        sums = stage_losses(pairs, targets, cfg)
    # means over the objects, weighted
    for name, losses, divisor in zip(names, sums, divisors, strict=True):
        for term, value in losses.items():
            terms[f"{name}/{term}"] = _weight(term, cfg) * value / divisor
    if not groups:  # without objects nothing is denoised, but every parameter stays part of the graph
        for name, stage in predictions.denoising.items():
            for term in LOSS_TERMS:
                terms[f"denoising.{name}/{term}"] = stage.class_logits.sum()
    return Losses(terms)


def _weight(term: str, cfg: config.Loss) -> float:
    return cfg.terms[term].weight if term in cfg.terms else getattr(cfg.weights, term)


def denoising_matches(targets: Targets, groups: int) -> Matches:
    """Match the denoising queries: by construction, query g·M + j stands for object j."""
    M = targets.labels.shape[1]
    pairs = []
    for count in targets.counts:
        target = np.tile(np.arange(count), groups)
        pairs.append((target + M * np.repeat(np.arange(groups), count), target))
    return Matches.from_lists(pairs, targets.labels.device)


def stage_losses(pairs: Sequence[Pair], targets: Targets, cfg: config.Loss) -> list[dict[str, Tensor]]:
    """Compute the unweighted sums of the losses of every stage.

    Args:
        pairs: stages with their matches.
        targets: the objects.
        cfg: number of mask points and their choice, and additional terms.

    Returns:
        For each stage label, l1 and giou, with masks also mask and dice, and the additional terms of `loss.terms`.
    """
    losses = []
    for stage, matches in pairs:
        # (R, 4) boxes of the matched queries, and of their objects
        boxes = stage.boxes[matches.image, matches.query].float()
        wanted = targets.boxes[matches.image, matches.target]
        losses.append(
            {
                "label": label_loss(stage, matches, targets),
                "l1": (boxes - wanted).abs().sum(),
                "giou": (1 - generalized_iou(boxes, wanted)).sum(),
            }
        )
    # token-interaction stages predict no masks
    with_masks = [i for i, (stage, _) in enumerate(pairs) if stage.has_masks]
    if with_masks:
        mask, dice = mask_losses([pairs[i] for i in with_masks], targets, cfg)
        for row, i in enumerate(with_masks):
            losses[i] |= {"mask": mask[row], "dice": dice[row]}
    for name, term in cfg.terms.items():
        function = plugins.resolve(term.type, f"loss.terms.{name}.type")
        for (stage, matches), found in zip(pairs, losses, strict=True):
            value = function(stage, matches, targets, **term.options)
            found[name] = plugins.check_shape(value, (), f"loss.terms.{name}")
    return losses


def label_loss(stage: Stage, matches: Matches, targets: Targets) -> Float[Tensor, ""]:
    """Focal loss summed over queries and classes. Queries without an object have no class."""
    # (B, Q, K), (B, Q, K)
    logits = stage.class_logits.float()
    wanted = torch.zeros_like(logits)
    # the number 1 itself would be copied from the host, which waits for the copy
    wanted[matches.image, matches.query, targets.labels[matches.image, matches.target]] = wanted.new_ones(())
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    # focal loss: the probability of the wrong answer to the power of gamma, and alpha for the rarer positives
    p = logits.sigmoid()
    wrong = wanted * (1 - p) + (1 - wanted) * p
    balance = wanted * ALPHA + (1 - wanted) * (1 - ALPHA)
    return (balance * wrong**GAMMA * cross_entropy).sum()


def mask_losses(pairs: Sequence[Pair], targets: Targets, cfg: config.Loss) -> tuple[Tensor, Tensor]:
    """BCE averaged over points, and dice, summed over the matched masks of each stage.

    The masks of all stages form one batch: they share random points, and a GPU prefers few large operations.

    Args:
        pairs: stages with masks, and their matches.
        targets: the objects.
        cfg: number of mask points and their choice.

    Returns:
        Two tensors with one value per stage.
    """
    B, M, H, W = targets.masks.shape
    # stages that share their mask features are multiplied with them in one operation per image
    sharing: dict[int, list[int]] = {}
    for i, (stage, _) in enumerate(pairs):
        sharing.setdefault(id(stage.mask_features), []).append(i)
    embedded = [cast(Tensor, stage.mask_embedding) for stage, _ in pairs]
    queries = [matches.query.split(list(matches.counts)) for _, matches in pairs]
    objects = [matches.target.split(list(matches.counts)) for _, matches in pairs]
    logits, rows, owners = [], [], []
    for group in sharing.values():
        features = cast(Tensor, pairs[group[0]][0].mask_features)
        for b in range(B):
            # (R, C) of this image and all stages of the group, and (R, h, w)
            embeddings = torch.cat([embedded[i][b, queries[i][b]].float() for i in group])
            logits.append(torch.einsum("rc,chw->rhw", embeddings, features[b].float()))
            for i in group:
                rows.append(b * M + objects[i][b])
                owners += [i] * pairs[i][1].counts[b]
    # (R, h, w) mask logits of all stages, and (R,) the rows of their objects in the batch
    x, row = torch.cat(logits), torch.cat(rows)
    if not len(x):  # nothing matched: zero, but part of the graph
        zeros = x.sum().expand(len(pairs))
        return zeros, zeros
    masks, size = targets.masks.reshape(B * M, H, W), ROWS_AT_A_TIME.get(x.device.type, len(x))
    bce, dice = [], []
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        part_bce, part_dice = _compare(x[part], row[part], masks, cfg)
        bce.append(part_bce)
        dice.append(part_dice)
    # (stages, masks), 1 where the mask belongs to the stage: a sum in a fixed order
    member = torch.from_numpy(np.arange(len(pairs))[:, None] == np.array(owners))
    member = member.to(x.device, non_blocking=True).float()
    return member @ torch.cat(bce), member @ torch.cat(dice)


def _compare(
    logits: Float[Tensor, "R h w"], rows: Int[Tensor, " R"], masks: UInt8[Tensor, "N H W"], cfg: config.Loss
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """BCE and dice of mask logits against the masks `rows`."""
    # (R, P, 2), then target t and prediction x at these points, (R, P)
    points = uncertain_points(logits, cfg)
    t = sample_masks(masks, rows, points)
    x = sample_maps(logits.unsqueeze(1), points).squeeze(1)
    # (R,), (R,): means over the points; 1 is added to both parts of the dice, as published
    bce = functional.binary_cross_entropy_with_logits(x, t, reduction="none").mean(-1)
    p = x.sigmoid()
    return bce, 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)
