"""Diagnostics of a model's intermediate results.

Each is a function of `Predictions`, `Losses` or `LayerwiseAP`. `survey` applies those that need a forward
pass to some images of a split. Their figures are in `dimaskdino.viz.diagnostics`.
"""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_convert, box_iou

from dimaskdino import config
from dimaskdino.checkpoints.model_files import TrainedModel
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.dataloader import batches, evaluation_loader
from dimaskdino.data.transforms import resize_with_objects
from dimaskdino.evaluation.coco_ap import AveragePrecision
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.inspection.objects import mask_iou
from dimaskdino.modeling import Detector, ImageBatch, Predictions, Targets
from dimaskdino.modeling.stages import is_decoder
from dimaskdino.modeling.structures import FeatureLevels, SelectedTokens
from dimaskdino.training.criterion import Losses, criterion
from dimaskdino.training.matcher import Matches, match
from dimaskdino.utils.progress import progress_bar

_BOX_TERMS, _MASK_TERMS = ("l1", "giou"), ("mask", "dice")


def imbalance_by_group(result: LayerwiseAP, by: Literal["size", "class"]) -> dict[str, dict[str, float]]:
    """`AP_mask − AP_box` in points by group of objects and stage; undefined values are left out.

    Args:
        result: AP of the stages.
        by: `size`, COCO's size groups (below 32², up to 96², above, in pixels), or `class`.
    """
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for name, stage in result.stages.items():
        if stage.mask is None:
            continue
        masks = _ap_by_group(stage.mask, by)
        for group, box in _ap_by_group(stage.box, by).items():
            mask = masks.get(group)
            if box is not None and mask is not None:
                groups[group][name] = mask - box
    return dict(groups)


def _ap_by_group(ap: AveragePrecision, by: Literal["size", "class"]) -> dict[str, float | None]:
    return ap.per_class if by == "class" else {"small": ap.APs, "medium": ap.APm, "large": ap.APl}


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
        return cls(
            parts[0].stages,
            query=torch.cat([part.query for part in parts], dim=1),
            box_iou=torch.cat([part.box_iou for part in parts], dim=1),
            mask_iou=torch.cat([part.mask_iou for part in parts], dim=1),
        )


def match_objects(predictions: Predictions, targets: Targets, settings: config.Loss) -> MatchedObjects:
    """Match the queries of each stage to the objects, as the loss does, and measure their IoUs.

    Args:
        predictions: every stage.
        targets: the objects of the batch.
        settings: cost weights. Masks are compared at random points, so seed torch for reproducible results.
    """
    stages = list(predictions.stages.values())
    counts = torch.tensor(targets.counts, device=targets.boxes.device)
    first = counts.cumsum(0) - counts  # position of each image's first object
    query = counts.new_full((len(stages), sum(targets.counts)), -1)
    box = torch.zeros(query.shape, device=query.device)
    mask = torch.zeros(query.shape, device=query.device)
    for row, (stage, matches) in enumerate(zip(stages, match(stages, targets, settings), strict=True)):
        place = first[matches.image] + matches.target
        predicted = box_convert(stage.boxes[matches.image, matches.query].float(), "cxcywh", "xyxy")
        true = box_convert(targets.boxes[matches.image, matches.target], "cxcywh", "xyxy")
        query[row, place] = matches.query
        box[row, place] = torch.diagonal(box_iou(predicted, true))
        if stage.mask_embedding is not None and stage.mask_features is not None:
            mask[row, place] = _matched_mask_iou(stage.mask_embedding, stage.mask_features, matches, targets.masks)
        else:
            mask[row] = torch.nan
    return MatchedObjects(tuple(predictions.stages), query, box, mask)


def _matched_mask_iou(
    embedding: Float[Tensor, "B q c"],
    features: Float[Tensor, "B c h4 w4"],
    matches: Matches,
    masks: UInt8[Tensor, "B M h w"],
) -> Float[Tensor, " n"]:
    """IoU of the mask of each matched query with its object's, at the input's resolution."""
    ious = embedding.new_zeros(len(matches.query), dtype=torch.float32)
    for row, (b, q, t) in enumerate(zip(matches.image, matches.query, matches.target, strict=True)):
        logits = torch.einsum("c,chw->hw", embedding[b, q].float(), features[b].float())
        true = masks[b, t].bool()
        enlarged = functional.interpolate(logits[None, None], size=true.shape, mode="bilinear")[0]
        ious[row] = mask_iou(enlarged > 0, true[None])[0, 0]
    return ious


def query_stability(matched: MatchedObjects) -> dict[str, float]:
    """Fraction of the objects that keep the query of the previous decoder stage, by stage.

    Only the decoder's stages share their queries, so the first entry is `decoder.1`, compared with the decoder's input.
    Objects that are unmatched at either stage do not count.
    """
    rows = [i for i, name in enumerate(matched.stages) if is_decoder(name)]
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
    for number, tokens in enumerate(T_s, start=1):
        chosen[f"T_s{number}"] = tokens.indices
    kept = {}
    for name, indices in chosen.items():
        covered_by = covered.gather(2, indices[:, None].expand(-1, M, -1))  # (B, M, k)
        kept[name] = covered_by.any(-1)[targets.valid]
    return kept


def effective_rank(attention: Float[Tensor, "*B N G"]) -> Float[Tensor, "*B"]:
    """Effective rank: exp of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007).

    It is 1 if all rows attend alike, and up to G if they use the guiding tokens independently.
    """
    values = torch.linalg.svdvals(attention.float())
    p = values / values.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


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
    parts, parameters = [], []
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            parts.append(_part(name))
            parameters.append(parameter)
    box_gradients = _gradients(losses, _BOX_TERMS, parameters)
    mask_gradients = _gradients(losses, _MASK_TERMS, parameters)
    of_boxes, of_masks = defaultdict(list), defaultdict(list)
    for part, box, mask in zip(parts, box_gradients, mask_gradients, strict=True):
        if box is not None and mask is not None:
            of_boxes[part].append(box.flatten())
            of_masks[part].append(mask.flatten())
    conflicts = {}
    for part in of_boxes:
        box, mask = torch.cat(of_boxes[part]).double(), torch.cat(of_masks[part]).double()
        box_norm, mask_norm = box.norm().item(), mask.norm().item()
        product = box_norm * mask_norm
        conflicts[part] = GradientConflict(box_norm, mask_norm, (box @ mask).item() / product if product else math.nan)
    return conflicts


def _part(parameter: str) -> str:
    """The part of the detector that a parameter belongs to. The first selection is one, since MaskDINO has it, too."""
    module, inner, *_ = parameter.split(".")
    return inner if inner == "first_selection" else module


def _gradients(losses: Losses, terms: Sequence[str], parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of the sum of these terms over all stages; None for parameters that it does not reach."""
    chosen = [loss for name, loss in losses.terms.items() if name.rpartition("/")[2] in terms]
    return torch.autograd.grad(torch.stack(chosen).sum(), parameters, retain_graph=True, allow_unused=True)


@dataclass(frozen=True)
class Survey:
    """The diagnostics that need a forward pass, over some images.

    Attributes:
        matched: the matched query of each object at each stage.
        recall: the objects that the selections kept, as `selection_recall`.
        guidance_rank: (images,) effective rank of BATO's attention; empty without BATO.
        conflict: by part of the model, one entry per batch.
    """

    matched: MatchedObjects
    recall: dict[str, Bool[Tensor, " N"]]
    guidance_rank: Float[Tensor, " images"]
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
    data.use_classes(model.classes, where)
    chosen = range(min(images, len(data)))
    groups = [chosen[i : i + batch_size] for i in chosen[::batch_size]]
    evaluation = model.config.evaluation.model_copy(update={"batch_size": batch_size})
    loader = evaluation_loader(data, model.config.model_copy(update={"evaluation": evaluation}), groups)
    device = model.device
    matched, recall, ranks = [], defaultdict(list), []
    conflicts: dict[str, list[GradientConflict]] = defaultdict(list)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # matching looks at random points
        for batch in progress_bar(batches(loader), "survey", len(groups), unit="batches"):
            targets = batch.targets.to(device)
            predictions = model.detector(ImageBatch.from_images(batch.images, device), trace=True)
            losses = criterion(predictions, targets, model.config.loss, sum(targets.counts))
            for part, conflict in gradient_conflict(losses, model.detector).items():
                conflicts[part].append(conflict)
            with torch.no_grad():
                matched.append(match_objects(predictions, targets, model.config.loss))
                for name, kept in selection_recall(predictions.trace.T_i, predictions.trace.T_s, targets).items():
                    recall[name].append(kept)
                attention = predictions.trace.guidance_attention
                if attention is not None:
                    ranks.append(effective_rank(attention))
    return Survey(
        matched=MatchedObjects.joined(matched),
        recall={name: torch.cat(parts) for name, parts in recall.items()},
        guidance_rank=torch.cat(ranks) if ranks else torch.zeros(0),
        conflict=dict(conflicts),
    )


def summary(result: LayerwiseAP, surveyed: Survey) -> dict[str, object]:
    """Summarise all diagnostics for a json file: means over objects, images and batches.

    Args:
        result: AP of every stage.
        surveyed: the survey.
    """
    matched = surveyed.matched
    fits = {}
    for row, name in enumerate(matched.stages):
        box, mask = matched.box_iou[row], matched.mask_iou[row]
        fits[name] = {"box_iou": float(box.mean()), "mask_iou": None if mask.isnan().any() else float(mask.mean())}
    conflicts = {}
    for part, found in surveyed.conflict.items():
        conflicts[part] = {
            "box_norm": _mean([conflict.box_norm for conflict in found]),
            "mask_norm": _mean([conflict.mask_norm for conflict in found]),
            "cosine": _mean([conflict.cosine for conflict in found]),
        }
    return {
        "objects": matched.query.shape[1],
        "imbalance_by_size": imbalance_by_group(result, "size"),
        "imbalance_by_class": imbalance_by_group(result, "class"),
        "matched_queries": fits,
        "query_stability": {stage: _mean([kept]) for stage, kept in query_stability(matched).items()},
        "selection_recall": {name: float(kept.float().mean()) for name, kept in surveyed.recall.items()},
        "guidance_rank": float(surveyed.guidance_rank.mean()) if len(surveyed.guidance_rank) else None,
        "gradient_conflict": conflicts,
    }


def _mean(values: Sequence[float]) -> float | None:
    """Mean of the values that are not NaN."""
    defined = [value for value in values if not math.isnan(value)]
    return statistics.mean(defined) if defined else None
