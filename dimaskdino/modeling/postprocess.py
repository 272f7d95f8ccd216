"""Predictions of a stage to instances at the output size (section 8)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_convert

from dimaskdino.errors import UserError
from dimaskdino.modeling.structures import Instances, Stage

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
        likely = scores[b] >= threshold
        queries, labels = pairs[b, likely] // K, pairs[b, likely] % K
        (h, w), (out_h, out_w) = sizes[b], output_sizes[b]
        boxes = box_convert(stage.boxes[b, queries].float(), "cxcywh", "xyxy")
        scale = boxes.new_tensor([width * out_w / w, height * out_h / h])
        boxes = boxes * scale.repeat(2)
        kept, index = queries.unique(return_inverse=True)
        image_scores, query_masks = scores[b, likely], None
        if masks and stage.mask_embedding is not None and stage.mask_features is not None:
            logits = torch.einsum("qc,chw->qhw", stage.mask_embedding[b, kept], stage.mask_features[b])
            query_masks, quality = _enlarge(logits.float(), padded_size, sizes[b], output_sizes[b])
            image_scores = image_scores * quality[index]
        order = image_scores.argsort(descending=True)
        results.append(Instances(boxes[order], image_scores[order], labels[order], query_masks, index[order]))
    return results


def _enlarge(
    logits: Float[Tensor, "u h4 w4"], padded_size: tuple[int, int], size: tuple[int, int], output: tuple[int, int]
) -> tuple[Bool[Tensor, "u h w"], Float[Tensor, " u"]]:
    """Masks at the output size, and the mean probability inside each."""
    if not len(logits):
        return logits.new_zeros(0, *output, dtype=torch.bool), logits.new_zeros(0)
    masks, quality = [], []
    for chunk in logits.split(MASK_CHUNK):
        enlarged = functional.interpolate(chunk[None], size=padded_size, mode="bilinear", align_corners=False)
        enlarged = enlarged[:, :, : size[0], : size[1]]
        if output != size:
            enlarged = functional.interpolate(enlarged, size=output, mode="bilinear", align_corners=False)
        mask = enlarged[0] > 0
        inside = (enlarged[0].sigmoid() * mask).sum((1, 2))
        quality.append(inside / (mask.sum((1, 2)) + 1e-6))
        masks.append(mask)
    return torch.cat(masks), torch.cat(quality)
