"""Augmentation in training and resizing for testing (section 9), by torchvision's v2 transforms."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from dimaskdino import config
from dimaskdino.data.coco import Sample, without_empty
from dimaskdino.utils import plugins
from dimaskdino.utils.errors import UserError

PADDING = 128  # of the image, where the crop reaches beyond it


class _ScaleJitter(v2.ScaleJitter):
    """torchvision's jitter with sides of at least one pixel (a 6000x30 image at scale 0.1)."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        return {"size": tuple(max(1, side) for side in params["size"])}


class _PadTo(v2.Transform):
    """Pad at the right and the bottom up to a square; larger images stay as they are."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        return {"padding": [0, 0, max(0, self.size - width), max(0, self.size - height)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        fill = PADDING if isinstance(inpt, tv_tensors.Image) else 0
        return v2.functional.pad(inpt, params["padding"], fill=fill)


# what the values of `data.augmentation` add to the jitter
_COLOURS: dict[str, tuple[nn.Module, ...]] = {
    "none": (),
    "colour": (v2.ColorJitter(0.2, 0.2, 0.2, 0.05),),
    "strong": (
        v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
        v2.RandomGrayscale(0.1),
        v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], 0.3),
    ),
}


def training_transform(settings: config.Data) -> Callable[[Sample], Sample]:
    """Flip, scale, pad and crop to a fixed square, change colours, then apply `data.transforms`.

    Objects outside the crop are removed.

    Raises:
        UserError: a function of `data.transforms` cannot be used.
    """
    jitter = settings.jitter
    square = (jitter.size, jitter.size)
    pipeline = v2.Compose(
        [
            v2.RandomHorizontalFlip(jitter.flip),
            _ScaleJitter(square, (jitter.min_scale, jitter.max_scale), antialias=True),
            _PadTo(jitter.size),
            v2.RandomCrop(square),
            *_COLOURS[settings.augmentation],
        ]
    )
    own = [(each.type, plugins.resolve(each.type, "data.transforms"), each.options) for each in settings.transforms]

    def transform(sample: Sample) -> Sample:
        sample = without_empty(_apply(pipeline, sample))
        for name, function, options in own:
            sample = function(sample, **options)
            if not isinstance(sample, Sample) or sample.image.dtype != torch.uint8:
                raise UserError(f"data.transforms: {name} must return a Sample with an image of dtype uint8")
            plugins.check_shape(sample.image, (3, *square), f"data.transforms: the image of {name}")
            plugins.check_shape(sample.masks, (len(sample.labels), *square), f"data.transforms: the masks of {name}")
        return sample

    return transform


def copy_paste(sample: Sample, other: Sample) -> Sample:
    """Paste a random half of another sample's objects into a sample of the same size, at their own places.

    Objects that are covered entirely are removed, and the visible masks of the others shrink (Ghiasi et al., Simple
    Copy-Paste, CVPR 2021; here without a second jitter and without blending at the borders).
    """
    pasted = torch.rand(len(other.labels)) < 0.5
    cover = other.masks[pasted].bool().any(0)
    if not cover.any():
        return sample
    masks = torch.cat([sample.masks * ~cover, other.masks[pasted]])
    labels = torch.cat([sample.labels, other.labels[pasted]])
    image = torch.where(cover, other.image, sample.image)
    return without_empty(replace(sample, image=image, labels=labels, masks=masks))


def evaluation_resize(settings: config.Resize) -> Callable[[Sample], Sample]:
    """Resize the image for testing. Masks are left out, since results are compared at the original size."""

    def resize(sample: Sample) -> Sample:
        image = resize_image(sample.image, settings)
        no_masks = sample.masks.new_zeros(0, *image.shape[-2:])
        return replace(sample, image=image, labels=sample.labels[:0], masks=no_masks)

    return resize


def resize_with_objects(settings: config.Resize) -> Callable[[Sample], Sample]:
    """Resize the image for testing together with its masks. Objects that vanish are removed."""

    def resize(sample: Sample) -> Sample:
        image = resize_image(sample.image, settings)
        masks = v2.functional.resize(tv_tensors.Mask(sample.masks), list(image.shape[-2:])).as_subclass(Tensor)
        return without_empty(replace(sample, image=image, masks=masks))

    return resize


def resize_image(image: Tensor, settings: config.Resize) -> Tensor:
    """Resize (3, h, w) uint8 so that its shortest side is `shortest`, but its longest side at most `longest`."""
    height, width = resized_size((image.shape[-2], image.shape[-1]), settings)
    return v2.functional.resize(image, [height, width], antialias=True)


def resize_scale(size: tuple[int, int], settings: config.Resize) -> float:
    """By how much `resize_image` enlarges an image of this (h, w)."""
    return min(settings.shortest / min(size), settings.longest / max(size))


def resized_size(size: tuple[int, int], settings: config.Resize) -> tuple[int, int]:
    """(h, w) of an image of this (h, w) after `resize_image`."""
    scale = resize_scale(size, settings)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _apply(pipeline: nn.Module, sample: Sample) -> Sample:
    image, masks = pipeline(tv_tensors.Image(sample.image), tv_tensors.Mask(sample.masks))
    return replace(sample, image=image.as_subclass(torch.Tensor), masks=masks.as_subclass(torch.Tensor))
