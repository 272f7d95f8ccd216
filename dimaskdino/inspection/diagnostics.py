"""Diagnostics: what happens inside a model, measured on its records.

Each is a function of `Predictions`, `Losses`, `LayerwiseAP` or `Detections`. `survey` applies those that need a forward
pass to some images of a split. Their figures are in `dimaskdino.viz.diagnostics`.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from hotcoco import COCO, COCOeval
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_convert, box_iou

from dimaskdino import config
from dimaskdino.checkpoints.model_files import TrainedModel
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.dataloader import batches, evaluation_loader
from dimaskdino.data.transforms import resize_with_objects
from dimaskdino.evaluation.coco_ap import IOU_TYPE, Kind
from dimaskdino.evaluation.detections import Detections
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.inspection.objects import mask_iou
from dimaskdino.modeling import Detector, ImageBatch, Predictions, Stage, Targets
from dimaskdino.modeling.structures import FeatureLevels, SelectedTokens
from dimaskdino.training.criterion import Losses, criterion
from dimaskdino.training.matcher import Matches, match
from dimaskdino.utils.progress import progress_bar

_SIZES = {"small": "APs", "medium": "APm", "large": "APl"}
_BOX_TERMS, _MASK_TERMS = ("l1", "giou"), ("mask", "dice")


def imbalance_by_group(result: LayerwiseAP, by: Literal["size", "class"]) -> dict[str, dict[str, float]]:
    """`AP_mask − AP_box` in points by group of objects and stage; undefined values are left out.

    Args:
        result: AP of the stages.
        by: `size`, COCO's size groups (below 32², up to 96², above, in pixels), or `class`.
    """
    groups: dict[str, dict[str, float]] = {}
    for name, stage in result.stages.items():
        if stage.mask is None:
            continue
        box, mask = (
            {label: getattr(ap, field) for label, field in _SIZES.items()} if by == "size" else ap.per_class
            for ap in (stage.box, stage.mask)
        )
        for group, value in box.items():
            other = mask.get(group)
            if value is not None and other is not None:
                groups.setdefault(group, {})[name] = other - value
    return groups


@dataclass(frozen=True)
class MatchedObjects:
    """The query that each object is matched to, at every stage, with the matching of training.

    Attributes:
        stages: names of the S stages.
        query: (S, N) row among the stage's queries, −1 for unmatched objects.
        box_iou: (S, N) IoU of the query's box with the object's; 0 for unmatched objects.
        mask_iou: (S, N) likewise, at the input's resolution; NaN at the stages without masks.
    """

    stages: tuple[str, ...]
    query: Int[Tensor, "S N"]
    box_iou: Float[Tensor, "S N"]
    mask_iou: Float[Tensor, "S N"]

    @classmethod
    def joined(cls, parts: Sequence["MatchedObjects"]) -> "MatchedObjects":
        """Concatenate the objects of several batches."""
        columns = ([getattr(part, name) for part in parts] for name in ("query", "box_iou", "mask_iou"))
        return cls(parts[0].stages, *(torch.cat(column, dim=1) for column in columns))


def match_objects(predictions: Predictions, targets: Targets, settings: config.Loss) -> MatchedObjects:
    """Match the queries of each stage to the objects, as the loss does, and measure their IoUs.

    Args:
        predictions: every stage.
        targets: the objects of the batch.
        settings: cost weights. Masks are compared at random points, so seed torch for reproducible results.
    """
    fits = [
        _fit(stage, matches, targets)
        for stage, matches in zip(
            predictions.stages.values(), match(list(predictions.stages.values()), targets, settings), strict=True
        )
    ]
    return MatchedObjects(tuple(predictions.stages), *(torch.stack(column) for column in zip(*fits, strict=True)))


def _fit(stage: Stage, matches: Matches, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """Query, box IoU and mask IoU (N,) of all objects, image by image."""
    starts = np.cumsum([0, *targets.counts])
    N, device = int(starts[-1]), targets.boxes.device
    place = torch.as_tensor(starts[:-1], device=device)[matches.image] + matches.target
    query, box = torch.full((N,), -1, device=device), torch.zeros(N, device=device)
    mask = torch.full((N,), 0.0 if stage.has_masks else torch.nan, device=device)
    query[place] = matches.query
    pairs = (stage.boxes[matches.image, matches.query].float(), targets.boxes[matches.image, matches.target])
    box[place] = torch.diagonal(box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in pairs)))
    if stage.mask_embedding is not None and stage.mask_features is not None:
        for row, (b, q, t) in zip(place, torch.stack([matches.image, matches.query, matches.target], 1), strict=True):
            logits = torch.einsum("c,chw->hw", stage.mask_embedding[b, q].float(), stage.mask_features[b].float())
            truth = targets.masks[b, t].bool()
            enlarged = functional.interpolate(logits[None, None], size=truth.shape, mode="bilinear")[0]
            mask[row] = mask_iou(enlarged > 0, truth[None])[0, 0]
    return query, box, mask


def query_stability(matched: MatchedObjects) -> dict[str, float]:
    """Fraction of the objects that keep the query of the previous decoder stage, by stage.

    Only the decoder's stages share their queries, so the first entry is `decoder.1`, compared with the decoder's input.
    Objects that are unmatched at either stage do not count.
    """
    rows = [i for i, name in enumerate(matched.stages) if name.startswith("decoder.")]
    shares = {}
    for before, after in itertools.pairwise(rows):
        both = (matched.query[before] >= 0) & (matched.query[after] >= 0)
        same = matched.query[before] == matched.query[after]
        shares[matched.stages[after]] = float(same[both].float().mean()) if both.any() else float("nan")
    return shares


def selection_recall(
    T_i: FeatureLevels, T_s: Sequence[SelectedTokens], targets: Targets
) -> dict[str, Bool[Tensor, " N"]]:
    """Which objects have at least one token whose centre lies on their mask: of `T_i` (all tokens), `T_s1`, `T_s2`.

    Args:
        T_i: the feature tokens of a forward pass.
        T_s: its selections, `trace.T_s`.
        targets: the objects of its batch.

    Returns:
        (N,) per set of tokens, for the objects of all images, image by image.
    """
    B, M, H, W = targets.masks.shape
    centres = T_i.centres() * torch.tensor([W, H], device=targets.masks.device)
    x, y = centres.long().unbind(-1)
    covered = targets.masks[:, :, y.clamp(max=H - 1), x.clamp(max=W - 1)].bool()  # (B, M, N tokens)
    chosen = {"T_i": torch.arange(len(x), device=x.device).expand(B, -1)}
    chosen |= {f"T_s{i}": tokens.indices for i, tokens in enumerate(T_s, start=1)}
    return {
        name: covered.gather(2, indices[:, None].expand(-1, M, -1)).any(-1)[targets.valid]
        for name, indices in chosen.items()
    }


def effective_rank(attention: Float[Tensor, "*B N G"]) -> Float[Tensor, "*B"]:
    """Effective rank: exp of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007).

    It is 1 if all rows attend alike, and up to G if they use the guiding tokens independently.
    """
    values = torch.linalg.svdvals(attention.float())
    p = values / values.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


def attention_entropy(attention: Float[Tensor, "*B N G"]) -> Float[Tensor, "*B"]:
    """Entropy of attention weights over its largest value, log G, as the mean over the N queries.

    It is 1 where every query attends to all keys alike, and 0 where each attends to one.
    """
    return torch.special.entr(attention.float()).sum(-1).mean(-1) / math.log(attention.shape[-1])


@dataclass(frozen=True)
class GradientConflict:
    """Gradients of the box and the mask losses on shared parameters.

    Attributes:
        box_norm, mask_norm: norm of each gradient.
        cosine: their cosine; below 0, a step for one is a step against the other. NaN where one is zero.
    """

    box_norm: float
    mask_norm: float
    cosine: float


def gradient_conflict(losses: Losses, detector: Detector) -> dict[str, GradientConflict]:
    """Compare the gradients of the box losses (l1, GIoU) and the mask losses (BCE, dice), per part of the model.

    Args:
        losses: of a forward pass, weighted as in training; their graph is kept.
        detector: the model.

    Returns:
        By the name of the detector's part. Parts that only one of the losses reaches are left out.
    """
    named = [(name.partition(".")[0], p) for name, p in detector.named_parameters() if p.requires_grad]
    sums = [
        torch.stack([loss for name, loss in losses.terms.items() if name.rpartition("/")[2] in terms]).sum()
        for terms in (_BOX_TERMS, _MASK_TERMS)
    ]
    gradients = [
        torch.autograd.grad(total, [p for _, p in named], retain_graph=True, allow_unused=True) for total in sums
    ]
    conflicts = {}
    for part in dict.fromkeys(name for name, _ in named):
        pairs = [
            (a.flatten(), b.flatten())
            for (name, _), a, b in zip(named, *gradients, strict=True)
            if name == part and a is not None and b is not None
        ]
        if pairs:
            box, mask = (torch.cat(side).double() for side in zip(*pairs, strict=True))
            norms = box.norm().item(), mask.norm().item()
            cosine = (box @ mask).item() / (norms[0] * norms[1]) if all(norms) else float("nan")
            conflicts[part] = GradientConflict(*norms, cosine)
    return conflicts


@dataclass(frozen=True)
class Calibration:
    """Calibration of the scores: of the detections with score s, a fraction s should be right.

    Attributes:
        score: (n,) mean score of the detections in each bin of equal width; empty bins are left out.
        precision: (n,) fraction of them that match an object.
        count: (n,) number of detections.
        error: expected calibration error: mean of |score − precision|, weighted by the counts.
    """

    score: Float[np.ndarray, " n"]
    precision: Float[np.ndarray, " n"]
    count: Int[np.ndarray, " n"]
    error: float


def calibration(detections: Detections, truth: COCO, kind: Kind, threshold: float = 0.5, bins: int = 10) -> Calibration:
    """Compare the scores with the fraction of right detections, by hotcoco.

    Args:
        detections: the detections of one stage.
        truth: the annotations, from `read_truth`.
        kind: boxes or masks.
        threshold: smallest IoU of a right detection, one of COCO's: 0.50, 0.55, … 0.95.
        bins: number of score bins.
    """
    evaluation = COCOeval(
        truth, truth.load_res(detections.boxes if kind == "box" else detections.masks), IOU_TYPE[kind]
    )
    evaluation.evaluate()
    measured = evaluation.calibration(n_bins=bins, iou_threshold=threshold)
    filled = [b for b in measured["bins"] if b["count"]]
    score, precision, count = (np.array([b[k] for b in filled]) for k in ("avg_confidence", "avg_accuracy", "count"))
    return Calibration(score, precision, count, float(measured["ece"]))


@dataclass(frozen=True)
class Survey:
    """The diagnostics that need a forward pass, over some images.

    Attributes:
        matched: the matched query of each object at each stage.
        recall: the objects that the selections kept, as `selection_recall`.
        guidance_rank: (images,) effective rank of BATO's attention; empty without BATO.
        guidance_entropy: (images,) its entropy relative to that of even attention; empty without BATO.
        conflict: by part of the model, one entry per batch.
    """

    matched: MatchedObjects
    recall: dict[str, Bool[Tensor, " N"]]
    guidance_rank: Float[Tensor, " images"]
    guidance_entropy: Float[Tensor, " images"]
    conflict: dict[str, list[GradientConflict]]


def survey(model: TrainedModel, images: int, split: str | None = None, batch_size: int = 4) -> Survey:
    """Apply the diagnostics to the first images of a split that have objects.

    The model predicts as in testing, without denoising queries. Gradients are those of the losses of all stages.

    Args:
        model: a trained model, on any device.
        images: number of images, at most.
        split: the split; `data.val` of the configuration by default.
        batch_size: number of images per gradient.

    Raises:
        UserError: the split has no objects, or another number of classes than the model.
    """
    where = model.config.data
    data = CocoDataset(where.root, split or where.val, resize_with_objects(where.resize), only_with_objects=True)
    data.check_classes(model.config.model.classes)
    chosen = range(min(images, len(data)))
    groups = [chosen[i : i + batch_size] for i in chosen[::batch_size]]
    settings = model.config.model_copy(
        update={"evaluation": model.config.evaluation.model_copy(update={"batch_size": batch_size})}
    )
    device = model.device
    matched, recall, guidance, conflict = [], [], [], {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # matching looks at random points
        for batch in progress_bar(
            batches(evaluation_loader(data, settings, groups)), "survey", len(groups), unit="batches"
        ):
            targets = batch.targets.to(device)
            predictions = model.detector(ImageBatch.from_images(batch.images, device), trace=True)
            losses = criterion(predictions, targets, model.config.loss, sum(targets.counts))
            for part, pull in gradient_conflict(losses, model.detector).items():
                conflict.setdefault(part, []).append(pull)
            with torch.no_grad():
                matched.append(match_objects(predictions, targets, model.config.loss))
                recall.append(selection_recall(predictions.trace.T_i, predictions.trace.T_s, targets))
                attention = predictions.trace.guidance_attention
                if attention is not None:
                    guidance.append(torch.stack([effective_rank(attention), attention_entropy(attention)]))
    ranks, entropies = torch.cat(guidance, dim=1) if guidance else torch.zeros(2, 0)
    return Survey(
        MatchedObjects.joined(matched),
        {name: torch.cat([part[name] for part in recall]) for name in recall[0]},
        ranks,
        entropies,
        conflict,
    )


def summary(result: LayerwiseAP, surveyed: Survey, calibrated: Mapping[str, Calibration]) -> dict[str, object]:
    """Summarise all diagnostics for a json file: means over objects, images and batches.

    Args:
        result: AP of every stage.
        surveyed: the survey.
        calibrated: by name, such as `decoder.6, box`.
    """
    means = {
        part: {field: _mean([getattr(c, field) for c in some]) for field in ("box_norm", "mask_norm", "cosine")}
        for part, some in surveyed.conflict.items()
    }
    fits = {
        name: {
            "box_iou": float(surveyed.matched.box_iou[row].mean()),
            "mask_iou": None
            if surveyed.matched.mask_iou[row].isnan().any()
            else float(surveyed.matched.mask_iou[row].mean()),
        }
        for row, name in enumerate(surveyed.matched.stages)
    }
    return {
        "objects": surveyed.matched.query.shape[1],
        "imbalance_by_size": imbalance_by_group(result, "size"),
        "imbalance_by_class": imbalance_by_group(result, "class"),
        "matched_queries": fits,
        "query_stability": {stage: _mean([share]) for stage, share in query_stability(surveyed.matched).items()},
        "selection_recall": {name: float(kept.float().mean()) for name, kept in surveyed.recall.items()},
        "guidance_rank": float(surveyed.guidance_rank.mean()) if len(surveyed.guidance_rank) else None,
        "guidance_entropy": float(surveyed.guidance_entropy.mean()) if len(surveyed.guidance_entropy) else None,
        "gradient_conflict": means,
        "calibration_error": {name: c.error for name, c in calibrated.items()},
    }


def _mean(values: Sequence[float]) -> float | None:
    """Mean of the values that are not NaN."""
    defined = [value for value in values if not math.isnan(value)]
    return statistics.mean(defined) if defined else None
