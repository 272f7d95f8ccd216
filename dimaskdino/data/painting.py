"""Detections painted into the pixels of an image, and the colours of all pictures and figures."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from dimaskdino.data.coco import Sample
from dimaskdino.modeling import CroppedMasks, Instances

# Okabe and Ito's palette, for colour-blind readers
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, YELLOW, GREY = "#56B4E9", "#E69F00", "#F0E442", "#666666"
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, YELLOW, GREY)

LONGEST_NAME = 36  # characters
GAP = 4  # pixels between two pictures

NO_MASKS = CroppedMasks((0, 0), (), ())


def colour_of(number: int) -> str:
    """The colour of an object, a class or a run by its number; the colours repeat after eight."""
    return CYCLE[number % len(CYCLE)]


def colours_of(numbers: Iterable[int]) -> list[str]:
    """The colour of each number."""
    return [colour_of(number) for number in numbers]


def data_label(name: str, longest: int = LONGEST_NAME) -> str:
    """A name from data, such as a class, on one line and not longer than a figure can take."""
    line = " ".join(name.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def label(instances: Instances, classes: Sequence[str], i: int) -> str:
    """Class name and score of detection i."""
    return f"{data_label(classes[int(instances.labels[i])])} {float(instances.scores[i]):.2f}"


def blend_masks(
    image: UInt8[Tensor, "3 h w"], masks: CroppedMasks, colours: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with masks blended in, half and half, the first on top."""
    canvas = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()).copy()
    found = masks.cpu()
    for (top, left), crop, colour in reversed(list(zip(found.corners, found.crops, colours, strict=True))):
        mask = crop.numpy()
        part = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
        part[mask] = ((part[mask].astype(np.uint16) + ImageColor.getrgb(colour) + 1) // 2).astype(np.uint8)
    return canvas


def masks_of(instances: Instances, chosen: Sequence[int]) -> CroppedMasks:
    """The masks of some detections; none if the stage predicts no masks."""
    if instances.query_masks is None:
        return NO_MASKS
    return instances.query_masks.only(instances.mask_index[list(chosen)].tolist())


def paint_instances(
    image: UInt8[Tensor, "3 h w"], instances: Instances, classes: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
    """Paint detections into an image, at its own size: masks, boxes, class names and scores, in the class's colour.

    Args:
        image: RGB.
        instances: detections at the image's size.
        classes: class names.
    """
    kept = range(len(instances.scores))
    colours = colours_of(instances.labels.tolist())
    masks = masks_of(instances, kept)
    texts = [label(instances, classes, i) for i in kept]
    return _paint(blend_masks(image, masks, colours[: len(masks)]), instances.boxes, texts, colours)


def paint_sample(sample: Sample, classes: Sequence[str]) -> UInt8[np.ndarray, "h w 3"]:
    """Paint the annotated objects into their image, as `paint_instances` does with detections."""
    labels = sample.labels.tolist()
    colours = colours_of(labels)
    canvas = blend_masks(sample.image, CroppedMasks.of(sample.masks.bool()), colours)
    return _paint(canvas, sample.boxes, [data_label(classes[number]) for number in labels], colours)


def paint_beside_truth(
    samples: Sequence[Sample], detections: Sequence[Instances], classes: Sequence[str], width: int
) -> UInt8[np.ndarray, "h w 3"]:
    """Paint images with their objects on the left and with detections on the right, one below the other.

    Args:
        samples: images with their objects.
        detections: in each of them, at its size.
        classes: class names.
        width: of the picture, in pixels.
    """
    rows = []
    for sample, found in zip(samples, detections, strict=True):
        pair = (paint_sample(sample, classes), paint_instances(sample.image, found, classes))
        rows.append(np.concatenate([pair[0], np.full((len(pair[0]), GAP, 3), 255, np.uint8), pair[1]], axis=1))
    scaled = [Image.fromarray(row).resize((width, max(1, round(len(row) * width / row.shape[1])))) for row in rows]
    canvas = Image.new("RGB", (width, sum(row.height + GAP for row in scaled) - GAP), "white")
    top = 0
    for row in scaled:
        canvas.paste(row, (0, top))
        top += row.height + GAP
    return np.asarray(canvas)


def _paint(
    canvas: UInt8[np.ndarray, "h w 3"], boxes: Tensor, texts: Sequence[str], colours: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
    """Boxes (n, 4) xyxy with their texts, the first on top; no box crosses a text."""
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    size = max(10, min(picture.size) // 40)
    font = ImageFont.load_default(size)
    rows = list(zip(boxes.tolist(), texts, colours, strict=True))[::-1]
    for (x0, y0, x1, y1), _, colour in rows:
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=max(2, size // 6))
    for (x0, y0, *_), text, colour in rows:
        *_, right, bottom = draw.textbbox((0, 0), text, font)
        # above the box, and inside the image
        x = min(max(0, x0), max(0, picture.width - right))
        y = min(max(0, y0 - bottom - 2), max(0, picture.height - bottom))
        draw.rectangle((x, y, x + right + 1, y + bottom + 2), fill=colour)
        draw.text((x, y), text, "white", font)
    return np.asarray(picture)
