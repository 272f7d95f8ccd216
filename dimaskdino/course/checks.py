"""Checks of the exercises: each runs a student's function, says what is right and explains what is not.

They print and return whether all is right; they raise nothing, so that a notebook runs on.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ms_deform_attn import ms_deform_attn_reference
from torch import Tensor
from torchvision.ops import box_iou

from dimaskdino.evaluation.objects import mask_iou
from dimaskdino.modeling.de_imbalance import mask_guided_boxes
from dimaskdino.modeling.records import Stage


def _run(function: Callable[..., Any], cases: Sequence[tuple], expected: Callable[..., Any], hint: str) -> bool:
    """Compare a student's function with the package's on some inputs; print the verdict."""
    name = getattr(function, "__name__", "your function")
    for case in cases:
        shown = ", ".join(_short(argument) for argument in case)
        try:
            found = function(*(x.clone() if isinstance(x, Tensor) else x for x in case))
        except Exception as error:  # whatever a student's code may do
            print(f"✗ {name}({shown}) stopped with {type(error).__name__}: {error}\n  Hint: {hint}")
            return False
        if found is None or found is ...:
            print(f"○ {name} returns nothing yet. Write its body, then run this cell again.\n  Hint: {hint}")
            return False
        problem = _difference(found, expected(*case))
        if problem:
            print(f"✗ {name}({shown}): {problem}\n  Hint: {hint}")
            return False
    print(f"✓ {name} agrees with the package on {len(cases)} cases.")
    return True


def _short(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() > 8:
        return f"tensor of shape {tuple(value.shape)}"
    return str(value.tolist()) if isinstance(value, Tensor) else repr(value)


def _difference(found: Any, expected: Any) -> str | None:
    """What is wrong with a result, in words; None if nothing is."""
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor):
            return f"expected a tensor of shape {tuple(expected.shape)}, got {type(found).__name__}"
        if found.shape != expected.shape:
            return f"expected the shape {tuple(expected.shape)}, got {tuple(found.shape)}"
        if torch.allclose(found.to(expected.dtype), expected, rtol=1e-4, atol=1e-5):
            return None
        worst = (found.to(expected.dtype) - expected).abs().nan_to_num(torch.inf)
        place = tuple(int(i) for i in torch.unravel_index(worst.argmax(), worst.shape))
        return f"at {list(place)} expected {expected[place].item():.5g}, got {found[place].item():.5g}"
    try:
        close = math.isclose(float(found), float(expected), rel_tol=1e-4, abs_tol=1e-6)
    except (TypeError, ValueError):
        return f"expected a number, got {type(found).__name__}"
    return None if close else f"expected {float(expected):.5g}, got {float(found):.5g}"


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def check_imbalance(function: Callable[[float, float], float]) -> bool:
    """Chapter 1: how far detection lags behind segmentation, in points of AP."""
    cases = [(31.0, 35.5), (40.0, 38.0), (0.0, 0.0)]
    return _run(function, cases, lambda box, mask: mask - box, "positive where the mask AP is higher")


def check_box_iou(function: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Chapter 1: intersection over union of two boxes, xyxy, as a number."""
    boxes = [[0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 6, 6], [0, 0, 2, 1]]
    pairs = [(torch.tensor(boxes[0]).float(), torch.tensor(other).float()) for other in boxes]
    return _run(
        function,
        pairs,
        lambda a, b: float(box_iou(a[None], b[None])),
        "the intersection runs from the larger of the two left ends to the smaller of the two right ends, and is empty "
        "when that is negative",
    )


def check_mask_iou(function: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Chapter 1: intersection over union of two masks (h, w) bool, as a number."""
    cases = [(_random(6, 7, seed=i) > 0.5, _random(6, 7, seed=i + 10) > 0.3) for i in range(3)]
    expected = lambda a, b: float(mask_iou(a[None], b[None]))  # noqa: E731
    return _run(function, cases, expected, "pixels in both, divided by pixels in at least one")


def check_bilinear(function: Callable[[Tensor, float, float], Tensor]) -> bool:
    """Chapter 2: the value of a map (h, w) at (x, y), given in parts of its width and height, zero outside."""
    grid = _random(4, 5)
    cases = [(grid, x, y) for x, y in ((0.5, 0.5), (0.3, 0.62), (0.1, 0.875), (0.02, 0.5), (0.99, 0.99))]

    def expected(values: Tensor, x: float, y: float) -> float:
        location = torch.tensor([x, y]).view(1, 1, 1, 1, 1, 2)
        weight = torch.ones(1, 1, 1, 1, 1)
        return float(ms_deform_attn_reference(values.reshape(1, -1, 1, 1), [tuple(values.shape)], location, weight))

    return _run(
        function,
        cases,
        expected,
        "the centre of cell i lies at (i + 0.5) / width, so the position in cells is x · width − 0.5; a neighbour "
        "outside the map counts as 0",
    )


def check_samples(function: Callable[[int, int, int, int], int]) -> bool:
    """Chapter 2: cells that one layer reads for Q queries."""
    cases = [(300, 8, 4, 4), (22223, 8, 4, 4), (40, 4, 3, 2)]
    hint = "each sample reads its four neighbours, whatever the size of the image"
    return _run(function, cases, lambda q, heads, levels, points: q * heads * levels * points * 4, hint)


def check_select(function: Callable[[Tensor, int], Tensor]) -> bool:
    """Chapter 3: indices (k,) of the tokens whose best class scores highest, from class logits (N, K)."""
    cases = [(_random(9, 3, seed=i), k) for i, k in enumerate((1, 4, 9))]
    hint = "first the highest logit of each token, then the k highest of those, best first"
    return _run(function, cases, lambda logits, k: logits.amax(-1).topk(k).indices, hint)


def check_mask_to_box(function: Callable[[Tensor], Tensor]) -> bool:
    """Chapter 3: the box (cx, cy, w, h) around a mask (h, w) bool, in parts of the map's size."""
    masks = []
    for top, left, height, width in ((1, 2, 3, 4), (0, 0, 8, 8), (5, 1, 1, 1)):
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[top : top + height, left : left + width] = True
        masks.append((mask,))

    def expected(mask: Tensor) -> Tensor:
        logits = mask.float() * 2 - 1
        stage = Stage("check", torch.zeros(1, 1, 1), torch.zeros(1, 1, 4), torch.ones(1, 1, 1), logits[None, None])
        return mask_guided_boxes(stage, exact=True)[0, 0]

    hint = "the first and the last occupied column and row; the last one belongs to the box, so its far edge is + 1"
    return _run(function, masks, expected, hint)


def check_recall(function: Callable[[Tensor, int], float]) -> bool:
    """Chapter 3: part of the objects that own at least one token, from the owners (k,) and the number of objects."""
    cases = [(torch.tensor([0, 0, -1, 2]), 3), (torch.tensor([-1, -1]), 2), (torch.tensor([1, 0, 1]), 2)]
    hint = "every object counts once, however many tokens it owns, and −1 is no object"
    return _run(function, cases, lambda owners, objects: float(len(owners[owners >= 0].unique())) / objects, hint)
