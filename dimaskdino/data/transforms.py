"""Augmentation in training and resizing for testing (section 9), by torchvision's v2 transforms."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from dimaskdino import config
from dimaskdino.data.coco import Record, Sample, without_empty
from dimaskdino.data.images import load_image
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


def training_transform(settings: config.Data) -> Callable[[Record], Sample]:
    """Flip, scale, pad and crop to a fixed square, change colours, then apply `data.transforms`.

    Objects outside the crop are removed. The random numbers are drawn before the image and the masks are decoded, so
    that masks are decoded at the size that the model sees.

    Raises:
        UserError: a function of `data.transforms` cannot be used.
    """
    jitter = settings.jitter
    square = (jitter.size, jitter.size)
    scale = _ScaleJitter(square, (jitter.min_scale, jitter.max_scale), antialias=True)
    pad, crop = _PadTo(jitter.size), v2.RandomCrop(square)
    colours = v2.Compose(_COLOURS[settings.augmentation]) if _COLOURS[settings.augmentation] else None
    own = [(each.type, plugins.resolve(each.type, "data.transforms"), each.options) for each in settings.transforms]

    def transform(record: Record) -> Sample:
        flipped = bool(torch.rand(1) < jitter.flip)
        size = scale.make_params([_shape(record.size)])
        padding = pad.make_params([_shape(size["size"])])
        _, _, right, bottom = padding["padding"]
        cut = crop.make_params([_shape((size["size"][0] + bottom, size["size"][1] + right))])

        def apply(image: Tensor) -> Tensor:
            scaled = scale.transform(v2.functional.horizontal_flip(image) if flipped else image, size)
            return crop.transform(pad.transform(scaled, padding), cut)

        height, width = size["size"]
        # a JPEG of more than twice the size is decoded smaller
        stored = load_image(record.path, expected=record.size, least=(2 * height, 2 * width))
        image = apply(tv_tensors.Image(stored))
        image = (colours(image) if colours else image).as_subclass(Tensor)
        sample = without_empty(record.sample(image, *_sources(record.size, size["size"], cut, flipped)))
        for name, function, options in own:
            sample = function(sample, **options)
            if not isinstance(sample, Sample) or sample.image.dtype != torch.uint8:
                raise UserError(f"data.transforms: {name} must return a Sample with an image of dtype uint8")
            plugins.check_shape(sample.image, (3, *square), f"data.transforms: the image of {name}")
            plugins.check_shape(sample.masks, (len(sample.labels), *square), f"data.transforms: the masks of {name}")
        return sample

    return transform


def _shape(size: tuple[int, int]) -> tv_tensors.Image:
    """An image of this (h, w) without pixels, from which torchvision draws its random numbers."""
    return tv_tensors.Image(torch.empty(3, *size, dtype=torch.uint8, device="meta"))


def _sources(
    size: tuple[int, int], scaled: tuple[int, int], cut: dict[str, Any], flipped: bool
) -> list[Int[np.ndarray, " side"]]:
    """The rows, then the columns, of an image of size (h, w) from which a scaled, padded and cropped mask comes."""
    found = []
    for axis, start in ((0, cut["top"]), (1, cut["left"])):
        source = _nearest(size[axis], scaled[axis])
        if axis and flipped:
            source = size[axis] - 1 - source
        end = start + cut["height" if axis == 0 else "width"]
        padded = np.pad(source, (0, max(0, end - len(source))), constant_values=-1)
        found.append(padded[start:end])
    return found


def _nearest(before: int, after: int) -> Int[np.ndarray, " after"]:
    """The pixels that torch's nearest resizing of a side takes."""
    places = torch.arange(before, dtype=torch.float32)[None, None]
    return torch.nn.functional.interpolate(places, size=after, mode="nearest")[0, 0].long().numpy()


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


def evaluation_resize(settings: config.Resize) -> Callable[[Record], Sample]:
    """Resize the image for testing. Masks are left out, since results are compared at the original size."""

    def resize(record: Record) -> Sample:
        image = resize_image(load_image(record.path, expected=record.size), settings)
        return replace(record, labels=[], masks=[]).sample(image, *map(np.arange, image.shape[-2:]))

    return resize


def resize_with_objects(settings: config.Resize) -> Callable[[Record], Sample]:
    """Resize the image for testing together with its masks. Objects that vanish are removed."""

    def resize(record: Record) -> Sample:
        image = resize_image(load_image(record.path, expected=record.size), settings)
        return without_empty(record.sample(image, *map(_nearest, record.size, image.shape[-2:])))

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
