"""Upper bounds on AP: the average recall of true masks, and of boxes computed from them, at a model's resolution.

A model predicts masks at a quarter of its input's resolution, and some of its boxes are the bounds of such masks
(`model.selection.mask_to_box`). True objects that go through the same steps lose detail, thin and small ones most. The
part of the imbalance that these bounds explain says nothing about the model.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional

from dimaskdino import config
from dimaskdino.data.annotations import to_run_lengths
from dimaskdino.data.transforms import resized_size
from dimaskdino.evaluation.coco_ap import AverageRecall, Truth, average_recall
from dimaskdino.evaluation.detections import Detections
from dimaskdino.modeling import Stage, postprocess
from dimaskdino.modeling.de_imbalance import mask_guided_boxes
from dimaskdino.modeling.stages import DECODER_INPUT
from dimaskdino.modeling.structures import padded_size
from dimaskdino.utils.progress import progress_bar
from dimaskdino.utils.threads import adaptive_threads

IMAGES = 500  # enough for stable bounds; more would take minutes
MASK_STRIDE = 4
MaskToBox = Literal["mask2box", "bitmask"]
CONVENTIONS: tuple[MaskToBox, ...] = ("mask2box", "bitmask")
_LOGIT = 20.0  # of the true class, so that every score is 1


@dataclass(frozen=True)
class UpperBounds:
    """Average recall of true objects at a model's resolution; `average_recall` says why it bounds AP.

    Attributes:
        mask: of masks that are on where an object covers more than half of a cell at stride 4. A model that places
            outlines between the cells can be slightly better.
        box: of the bounds of these masks, by each convention of `model.selection.mask_to_box`.
        boxes_from_masks: the convention of those stages whose boxes are bounds of masks. The boxes of other stages are
            predicted and have no bound below 100.
    """

    mask: AverageRecall
    box: dict[MaskToBox, AverageRecall]
    boxes_from_masks: dict[str, MaskToBox]

    def of_boxes(self, stage: str) -> AverageRecall | None:
        """The upper bound on a stage's box AP; None if it predicts its boxes."""
        return self.box[self.boxes_from_masks[stage]] if stage in self.boxes_from_masks else None

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "UpperBounds":
        """Read what `dataclasses.asdict` returned."""
        box = {convention: AverageRecall(**content["box"][convention]) for convention in CONVENTIONS}
        return cls(AverageRecall(**content["mask"]), box, content["boxes_from_masks"])


def upper_bounds(truth: Truth, settings: config.Config) -> UpperBounds:
    """Upper bounds on the AP of a configuration on a split. No model is needed.

    Args:
        truth: the annotations, from `read_truth`. Of a split with more than 500 images, about 500 are taken.
        settings: the configuration; its image size, detections per image and `model.selection` count.
    """
    truth = _some_images(truth)
    category_ids = sorted(category["id"] for category in truth.dataset["categories"])
    boxes: dict[MaskToBox, list[dict[str, Any]]] = {convention: [] for convention in CONVENTIONS}
    masks: list[dict[str, Any]] = []
    objects = _objects(truth, category_ids)
    for image, labels, true_masks in progress_bar(objects, "upper bounds", len(truth.dataset["images"]), unit="images"):
        original = (image["height"], image["width"])
        size = resized_size(original, settings.data.resize)
        sizes = [size], padded_size([size]), [original]
        with adaptive_threads():
            stage = true_stage(labels, true_masks, size, len(category_ids))
            for convention in CONVENTIONS:
                with_masks = convention == CONVENTIONS[0]  # the masks are the same for all conventions
                bounded = with_boxes_around_masks(stage, convention)
                [instances] = postprocess(bounded, *sizes, settings.evaluation.detections, with_masks)
                detections = Detections.of(image["id"], instances, category_ids)
                boxes[convention] += detections.boxes
                masks += detections.masks
    return UpperBounds(
        mask=average_recall(truth, masks, "mask"),
        box={convention: average_recall(truth, found, "box") for convention, found in boxes.items()},
        boxes_from_masks=_boxes_from_masks(settings.model.selection),
    )


def true_stage(labels: Int[Tensor, " M"], masks: UInt8[Tensor, "M h w"], size: tuple[int, int], classes: int) -> Stage:
    """The stage of a model that knows the objects of an image: one query per object, with its true mask at stride 4.

    Its boxes are zero; `with_boxes_around_masks` computes them.

    Args:
        labels: class indices.
        masks: at the original size, 0 or 1.
        size: (h, w) of the model's input, before padding.
        classes: number of classes.
    """
    M = len(masks)
    logits = torch.full((1, M, classes), -_LOGIT)
    logits[0, torch.arange(M), labels] = _LOGIT
    mask_logits = (coverage(masks, size) - 0.5)[None]
    return Stage("true", logits, torch.zeros(1, M, 4), torch.eye(M)[None], mask_logits)


def with_boxes_around_masks(stage: Stage, convention: MaskToBox) -> Stage:
    """The stage with the boxes around its masks, by a convention of `model.selection.mask_to_box`."""
    return replace(stage, boxes=mask_guided_boxes(stage, exact=convention == "bitmask"))


def coverage(masks: UInt8[Tensor, "M h w"], size: tuple[int, int]) -> Float[Tensor, "M h4 w4"]:
    """Share of each cell at stride 4 that each mask covers, after resizing to `size` and padding."""
    resized = masks[None].float()
    if masks.shape[-2:] != size:
        resized = functional.interpolate(resized, size=size, mode="bilinear", antialias=True)
    (h, w), (H, W) = size, padded_size([size])
    return functional.avg_pool2d(functional.pad(resized, (0, W - w, 0, H - h)), MASK_STRIDE)[0]


def _some_images(truth: Truth) -> Truth:
    dataset = truth.dataset
    step = -(-len(dataset["images"]) // IMAGES)
    if step <= 1:
        return truth
    chosen = sorted(dataset["images"], key=lambda image: image["id"])[::step]
    ids = {image["id"] for image in chosen}
    kept = [annotation for annotation in dataset["annotations"] if annotation["image_id"] in ids]
    return Truth({"images": chosen, "categories": dataset["categories"], "annotations": kept}, truth.library)


def _objects(truth: Truth, category_ids: list[int]) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
    """Each image with the labels and masks of its objects, without crowds and empty masks."""
    by_image = defaultdict(list)
    for annotation in truth.dataset["annotations"]:
        if not annotation["iscrowd"]:
            by_image[annotation["image_id"]].append(annotation)
    for image in truth.dataset["images"]:
        size = (image["height"], image["width"])
        labels, masks = [], []
        for annotation in by_image[image["id"]]:
            mask = coco_mask.decode(to_run_lengths(annotation["segmentation"], size))
            if mask.any():
                labels.append(category_ids.index(annotation["category_id"]))
                masks.append(mask)
        if masks:
            yield image, torch.tensor(labels), torch.from_numpy(np.stack(masks))


def _boxes_from_masks(selection: config.Selection) -> dict[str, MaskToBox]:
    """The stages whose boxes are bounds of masks: the decoder's input, unless token interaction has refined it."""
    if len(selection.k) > 1 or selection.mask_to_box == "no":
        return {}
    return {DECODER_INPUT: selection.mask_to_box}
