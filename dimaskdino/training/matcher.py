"""Hungarian matching of predictions to objects at every stage (section 7)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_convert

from dimaskdino import config
from dimaskdino.modeling.structures import Stage, Targets
from dimaskdino.training.points import sample_maps, sample_masks
from dimaskdino.utils import plugins

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss, arXiv 1708.02002
EPSILON = 1e-6  # of the generalised IoU


@dataclass(frozen=True)
class Matches:
    """Pairs of queries and objects: row i pairs query `query[i]` with object `target[i]` of image `image[i]`.

    Rows are ordered by image; `counts` is the number of rows per image, known without synchronising the device.
    """

    image: Int[Tensor, " R"]
    query: Int[Tensor, " R"]
    target: Int[Tensor, " R"]
    counts: tuple[int, ...]

    @classmethod
    def from_lists(cls, pairs: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device) -> "Matches":
        """From one pair (queries, targets) per image."""
        counts = tuple(len(queries) for queries, _ in pairs)
        image = np.repeat(np.arange(len(pairs)), counts)
        query = np.concatenate([queries for queries, _ in pairs])
        target = np.concatenate([targets for _, targets in pairs])
        columns = np.stack([image, query, target]).astype(np.int64)
        moved = torch.from_numpy(columns).to(device, non_blocking=True)
        return cls(moved[0], moved[1], moved[2], counts)


@torch.no_grad()
def match(stages: Sequence[Stage], targets: Targets, cfg: config.Loss) -> list[Matches]:
    """Match the queries of every stage to the objects, one to one, with the lowest total cost.

    The cost matrices of all stages and images reach the CPU in one transfer. If an image has more objects than queries,
    the most expensive objects stay unmatched. Costs that are not finite count as very high, so that matching still
    works and the loss reports the problem.

    Args:
        stages: stages without masks are matched by classes and boxes.
        targets: the objects.
        cfg: cost weights, number of mask points and additional costs.

    Returns:
        Matches of each stage.
    """
    # one transfer from the device for the costs of all stages
    costs = matching_costs(stages, targets, cfg)
    flat = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
    flat = np.nan_to_num(flat, nan=1e8, posinf=1e8, neginf=-1e8)
    matches, start = [], 0
    for cost in costs:
        # (B, Q, M)
        matrix = flat[start : start + cost.numel()].reshape(cost.shape)
        start += cost.numel()
        pairs = [linear_sum_assignment(matrix[b, :, :count]) for b, count in enumerate(targets.counts)]
        matches.append(Matches.from_lists(pairs, targets.labels.device))
    return matches


def matching_costs(stages: Sequence[Stage], targets: Targets, cfg: config.Loss) -> list[Float[Tensor, "B Q M"]]:
    """Cost of each query for each object, per stage: weighted label, box and, with masks, mask cost."""
    B, M, H, W = targets.masks.shape
    # (B, P, 2), shared by all masks of an image, and the masks there, (B, M, P)
    points = torch.rand(B, cfg.points, 2, device=targets.masks.device)
    expanded = points[:, None].expand(B, M, -1, -1).flatten(0, 1)
    every = torch.arange(B * M, device=targets.masks.device)
    target_points = sample_masks(targets.masks.reshape(B * M, H, W), every, expanded).view(B, M, cfg.points)
    sampled: dict[int, Tensor] = {}  # most stages share their mask features
    costs = []
    for stage in stages:
        # (B, Q, M)
        cost = _label_and_box_cost(stage, targets, cfg.cost)
        if stage.mask_embedding is not None and stage.mask_features is not None:
            key = id(stage.mask_features)
            if key not in sampled:
                sampled[key] = sample_maps(stage.mask_features.float(), points)
            # (B, Q, P); sampling is linear: (embedding · F) at a point = embedding · (F at the point)
            logits = stage.mask_embedding.float() @ sampled[key]
            cost = cost + _mask_cost(logits, target_points, cfg.cost)
        for name, term in cfg.costs.items():
            function = plugins.resolve(term.type, f"loss.costs.{name}.type")
            own = plugins.check_shape(function(stage, targets, **term.options), cost.shape, f"loss.costs.{name}")
            cost = cost + term.weight * own
        costs.append(cost)
    return costs


def _label_and_box_cost(stage: Stage, targets: Targets, weights: config.Weights) -> Float[Tensor, "B Q M"]:
    # (B, Q, K): focal cost of predicting each class where it is, minus that where it is not
    p = stage.class_logits.float().sigmoid()
    present = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
    absent = (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
    # (B, Q, M) class of each object, for every query
    labels = targets.labels[:, None].expand(-1, p.shape[1], -1)
    boxes = stage.boxes.float()
    return (
        weights.label * (present - absent).gather(2, labels)
        + weights.l1 * torch.cdist(boxes, targets.boxes, p=1)
        - weights.giou * generalized_iou(boxes[:, :, None], targets.boxes[:, None])
    )


def _mask_cost(
    logits: Float[Tensor, "B Q P"], target: Float[Tensor, "B M P"], weights: config.Weights
) -> Float[Tensor, "B Q M"]:
    """BCE averaged over the points, and dice, of every query against every object."""
    # t·softplus(−x) + (1 − t)·softplus(x) = softplus(x) − t·x
    target_t = target.transpose(1, 2)
    # (B, Q, M), (B, Q, M)
    bce = (functional.softplus(logits).sum(-1, keepdim=True) - logits @ target_t) / logits.shape[-1]
    p = logits.sigmoid()
    dice = 1 - (2 * p @ target_t + 1) / (p.sum(-1, keepdim=True) + target.sum(-1)[:, None] + 1)
    return weights.mask * bce + weights.dice * dice


def generalized_iou(a: Float[Tensor, "*#batch 4"], b: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*batch"]:
    """GIoU (arXiv 1902.09630) of cxcywh boxes that broadcast against each other, 1e-6 added to both divisors."""
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")
    # areas of the intersection, of the union, and of the smallest box around both
    overlap = _area((torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0))
    union = _area(a[..., 2:] - a[..., :2]) + _area(b[..., 2:] - b[..., :2]) - overlap
    hull = _area((torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0))
    return overlap / (union + EPSILON) - (hull - union) / (hull + EPSILON)


def _area(size: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch"]:
    """Width times height. The gradient of `prod` would make the host ask the GPU whether a factor is zero."""
    return size[..., 0] * size[..., 1]
