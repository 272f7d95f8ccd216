"""Predictions of a stage to instances at the output size (section 8)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_convert

from dimaskdino.modeling.structures import CroppedMasks, Instances, Stage
from dimaskdino.utils.errors import UserError

MASK_CHUNK = 16  # number of masks resized at a time, to bound memory


@torch.no_grad()
def postprocess(
    stage: Stage,
    sizes: Sequence[tuple[int, int]],
    padded_size: tuple[int, int],
    output_sizes: Sequence[tuple[int, int]],
    detections: int = 100,
    masks: bool = True,
    threshold: float = 0.0,
) -> list[Instances]:
    """Select the best query-class pairs of each image and compute their boxes, scores, classes and masks.

    Args:
        stage: any stage. Without masks the scores are those of the classes.
        sizes: (h, w) of each image before padding.
        padded_size: (H, W) of the batch.
        output_sizes: (h, w) of each image's detections.
        detections: number of pairs to keep per image.
        masks: compute masks where the stage has them. They change the scores: class score × mean mask probability
            inside the mask.
        threshold: pairs with a lower class score are left out, before their masks are computed. With masks the final
            score of the others may still be lower.

    Raises:
        UserError: scores or boxes are not finite.
    """
    B, _, K = stage.class_logits.shape
    # (B, D), (B, D): the best pairs of a query and a class
    scores, pairs = (
        stage.class_logits.float().sigmoid().flatten(1).topk(min(detections, stage.class_logits[0].numel()), dim=1)
    )
    if not bool(scores.isfinite().all() & stage.boxes.isfinite().all()):
        raise UserError(
            "the model's scores or boxes are not finite: its weights are broken, or the precision is too low (try fp32)"
        )
    height, width = padded_size
    results = []
    for b in range(B):
        likely = (scores[b] >= threshold).nonzero().flatten()  # a mask would make the host wait for every use of it
        queries, labels = pairs[b, likely] // K, pairs[b, likely] % K
        (h, w), (out_h, out_w) = sizes[b], output_sizes[b]
        # (d, 4), xyxy in pixels of the output
        boxes = box_convert(stage.boxes[b, queries].float(), "cxcywh", "xyxy")
        boxes[:, 0::2] *= width * out_w / w
        boxes[:, 1::2] *= height * out_h / h
        # a query may stand for several classes, but has one mask
        kept, index = queries.unique(return_inverse=True)
        image_scores, query_masks = scores[b, likely], None
        if masks and stage.mask_embedding is not None and stage.mask_features is not None:
            # (u, h/4, w/4), then u masks of (h, w) and (u,)
            features = stage.mask_features[b]
            logits = (stage.mask_embedding[b, kept] @ features.flatten(1)).unflatten(1, features.shape[1:])
            query_masks, quality = enlarge(logits.float(), padded_size, sizes[b], output_sizes[b])
            image_scores = image_scores * quality[index]
        order = image_scores.argsort(descending=True)
        results.append(Instances(boxes[order], image_scores[order], labels[order], query_masks, index[order]))
    return results


def enlarge(
    logits: Float[Tensor, "u h4 w4"], padded_size: tuple[int, int], size: tuple[int, int], output: tuple[int, int]
) -> tuple[CroppedMasks, Float[Tensor, " u"]]:
    """Masks at the output size, and the mean probability inside each."""
    if not len(logits):
        return CroppedMasks(output, (), ()), logits.new_zeros(0)
    # a GPU prefers few large operations
    function = enlarge_inside if logits.device.type == "cpu" else enlarge_whole
    return function(logits, padded_size, size, output)


def enlarge_whole(
    logits: Float[Tensor, "u h4 w4"], padded_size: tuple[int, int], size: tuple[int, int], output: tuple[int, int]
) -> tuple[CroppedMasks, Float[Tensor, " u"]]:
    """`enlarge`, whole masks at a time."""
    masks, quality = [], []
    for chunk in logits.split(MASK_CHUNK):
        enlarged = functional.interpolate(chunk[None], size=padded_size, mode="bilinear", align_corners=False)
        enlarged = enlarged[:, :, : size[0], : size[1]]
        if output != size:
            enlarged = functional.interpolate(enlarged, size=output, mode="bilinear", align_corners=False)
        masks.append(enlarged[0] > 0)
        quality.append(_quality(enlarged[0]))
    return CroppedMasks.of(torch.cat(masks)), torch.cat(quality)


def _quality(logits: Float[Tensor, "u h w"]) -> Float[Tensor, " u"]:
    """Mean probability of the positive logits of each mask. Overwrites the logits."""
    # sums of booleans, and their products with numbers, take several times as long on a CPU
    probability = torch.threshold_(logits, 0, -torch.inf).sigmoid_()
    total = probability.sum((1, 2))
    return total / (probability.ceil_().sum((1, 2)) + 1e-6)


def enlarge_inside(
    logits: Float[Tensor, "u h4 w4"], padded_size: tuple[int, int], size: tuple[int, int], output: tuple[int, int]
) -> tuple[CroppedMasks, Float[Tensor, " u"]]:
    """`enlarge`, each mask only where it can be positive, which is mostly a small part of the image."""
    rows = _resizings(logits.shape[1], padded_size[0], size[0], output[0])
    columns = _resizings(logits.shape[2], padded_size[1], size[1], output[1])
    ranges = zip(_reached(logits.amax(2) > 0, rows), _reached(logits.amax(1) > 0, columns), strict=True)
    corners, crops, quality = [], [], logits.new_zeros(len(logits))
    for i, (down, across) in enumerate(ranges):
        crop = logits.new_zeros(0, 0, dtype=torch.bool)
        if len(down) and len(across):
            part = _resized(_resized(logits[i], rows, down).T, columns, across).T[None].contiguous()
            crop = part[0] > 0
            quality[i] = _quality(part)[0]
        corners.append((down.start, across.start))
        crops.append(crop)
    return CroppedMasks(output, tuple(corners), tuple(crops)), quality


class _Resizing(NamedTuple):
    """One bilinear resizing along an axis to n values, each between two places: lower and upper (n,), part (n, 1)."""

    lower: Tensor
    upper: Tensor
    part: Tensor

    @classmethod
    def of(cls, before: int, after: int) -> "_Resizing":
        """With `align_corners=False`, as PyTorch does it."""
        source = ((torch.arange(after) + 0.5) * (before / after) - 0.5).clamp(min=0)
        lower = source.long()
        return cls(lower, (lower + 1).clamp(max=before - 1), (source - lower)[:, None])

    def only(self, wanted: slice) -> "_Resizing":
        return _Resizing(self.lower[wanted], self.upper[wanted], self.part[wanted])


def _resizings(cells: int, padded: int, size: int, output: int) -> list[_Resizing]:
    """Those of masks along one axis: cells to the padded image, and of that the first `size` to the output."""
    first = _Resizing.of(cells, padded).only(slice(size))
    return [first] if output == size else [first, _Resizing.of(size, output)]


def _reached(occupied: Bool[Tensor, "u n"], steps: Sequence[_Resizing]) -> list[range]:
    """For each mask the range of places to which its occupied cells contribute."""
    for lower, upper, _ in steps:
        occupied = occupied[:, lower] | occupied[:, upper]
    some, n = occupied.any(1), occupied.shape[1]
    first = torch.where(some, occupied.int().argmax(1), 0).tolist()
    stop = torch.where(some, n - occupied.flip(1).int().argmax(1), 0).tolist()
    return [range(a, b) for a, b in zip(first, stop, strict=True)]


def _resized(x: Float[Tensor, "n m"], steps: Sequence[_Resizing], wanted: range) -> Float[Tensor, "n2 m"]:
    """The rows `wanted` of x after some resizings of its first axis."""
    *before, last = steps
    lower, upper, part = last.only(slice(wanted.start, wanted.stop))
    if before:
        start = int(lower[0])
        x = _resized(x, before, range(start, int(upper[-1]) + 1))
        lower, upper = lower - start, upper - start
    return x[lower].lerp(x[upper], part)
