"""Detections in images that have no annotations, from any stage."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import UInt8
from torch import Tensor

from dimaskdino.checkpoints import TrainedModel
from dimaskdino.data.transforms import resize_image
from dimaskdino.evaluation.layerwise_ap import chosen_stages
from dimaskdino.modeling import ImageBatch, Instances, postprocess
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.threads import adaptive_threads


def predict_images(
    model: TrainedModel,
    images: Sequence[UInt8[Tensor, "3 h w"]],
    stages: Sequence[str] | None = None,
    batch_size: int = 8,
    threshold: float = 0.0,
) -> list[dict[str, Instances]]:
    """Detections in some images, at the size of each image, best first.

    Images that have the same size after resizing run as one batch. The others run in batches of their own, so the
    result for an image does not depend on which images it came with.

    Args:
        model: a trained model.
        images: RGB, 0 to 255, of any sizes.
        stages: names of the stages wanted; all by default.
        batch_size: number of images per forward pass, at most.
        threshold: detections with a lower score are left out.

    Returns:
        Detections by stage name, one dictionary per image.

    Raises:
        UserError: the model has no such stage, or the batch size is less than 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    count = model.config.evaluation.detections
    with adaptive_threads():
        resized = [resize_image(image, model.config.data.resize) for image in images]
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, image in enumerate(resized):
        by_size[tuple(image.shape)].append(number)
    results: list[dict[str, Instances]] = [{} for _ in images]
    for numbers in by_size.values():
        for start in range(0, len(numbers), batch_size):
            chunk = numbers[start : start + batch_size]
            output_sizes = [(images[n].shape[-2], images[n].shape[-1]) for n in chunk]
            with adaptive_threads():
                batch = ImageBatch.from_images([resized[n] for n in chunk], model.device)
                for name, stage in chosen_stages(model.forward(batch), stages).items():
                    found = postprocess(stage, batch.sizes, batch.padded_size, output_sizes, count, threshold=threshold)
                    for n, instances in zip(chunk, found, strict=True):
                        results[n][name] = _above(instances, threshold)
    return results


def _above(instances: Instances, threshold: float) -> Instances:
    keep = instances.scores >= threshold
    return replace(
        instances,
        boxes=instances.boxes[keep],
        scores=instances.scores[keep],
        labels=instances.labels[keep],
        mask_index=instances.mask_index[keep],
    )
