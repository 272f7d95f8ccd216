"""Chapter 3: bilinear samples and what a query reads."""

from collections.abc import Callable

import torch
from ms_deform_attn import ms_deform_attn_reference
from torch import Tensor

from dimaskdino.course.checks.pictures import draw_errors
from dimaskdino.course.checks.verdicts import CheckResult, called, compared, difference, random, right, wrong
from dimaskdino.inspection.look import Look
from dimaskdino.modeling import Detector


def check_bilinear(function: Callable[[Tensor, float, float], Tensor]) -> CheckResult:
    """The value of a map (h, w) at (x, y), relative to its width and height, zero outside."""
    grid = random(4, 5)
    cases = [(grid, x, y) for x, y in ((0.5, 0.5), (0.3, 0.62), (0.1, 0.875), (0.02, 0.5), (0.99, 0.99))]

    def expected(values: Tensor, x: float, y: float) -> float:
        location = torch.tensor([x, y]).view(1, 1, 1, 1, 1, 2)
        weight = torch.ones(1, 1, 1, 1, 1)
        return float(ms_deform_attn_reference(values.reshape(1, -1, 1, 1), [tuple(values.shape)], location, weight))

    return compared(
        function,
        cases,
        expected,
        "the centre of cell i lies at (i + 0.5) / width, so the position in cells is x · width − 0.5; a neighbour "
        "outside the map counts as 0",
    )


def check_samples(function: Callable[[int, int, int, int], int]) -> CheckResult:
    """Cells that one layer reads for Q queries."""
    cases = [(300, 8, 4, 4), (22223, 8, 4, 4), (40, 4, 3, 2)]
    hint = "each sample reads its four neighbours, whatever the size of the image"
    return compared(function, cases, lambda q, heads, levels, points: q * heads * levels * points * 4, hint)


def check_attended(function: Callable[..., Tensor], look: Look, detector: Detector) -> CheckResult:
    """To build: what the queries of the first decoder layer read, on a real image.

    Args:
        function: the student's, from (maps, boxes, offsets, scores) to (Q, C).
        look: an image and what the model made of it.
        detector: the model; the first layer's `value_proj` makes the maps.
    """
    layer, T_i = detector.decoder.layers[0].cross_attention, look.trace.T_i
    boxes, (locations, weights) = look.trace.references[0][0], (x[0] for x in look.trace.sampling[0])
    with torch.no_grad():
        value = layer.value_proj(T_i.tokens).unflatten(-1, (layer.heads, -1))
    levels = zip(value[0].split(T_i.sizes), T_i.shapes, strict=True)
    maps = [part.permute(1, 2, 0).unflatten(2, shape) for part, shape in levels]
    centre, unit = boxes[:, None, None, None, :2], boxes[:, None, None, None, 2:] * (0.5 / layer.points)
    offsets, scores = (locations - centre) / unit, weights.log()

    def read(locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_reference(value, T_i.shapes, locations[None], weights[None])[0]

    hint = "a place is the box's centre + offset · size / (2 · points); softmax over the levels and points of a head"
    answer = called(function, (maps, boxes, offsets, scores), hint)
    if answer is None:
        return CheckResult(False)
    expected = read(locations, weights)
    problem = difference(answer, expected)
    if problem is None:
        return right(function, f"reads what the model's {len(expected)} queries read")
    if difference(answer, read(centre + offsets, weights)) is None:
        return wrong(function, "the offsets are in parts of the image; they count in parts of the box", hint)
    if difference(answer, read(locations, scores.softmax(-1))) is None:
        return wrong(function, "softmax over the points of each level; all levels of a head share one", hint)
    picture = None
    if isinstance(answer, Tensor) and answer.shape == expected.shape:
        far = (answer - expected).norm(dim=-1)
        worst = [round(float(x), 2) for x in boxes[far.argmax()]]
        problem += f"; the query with the box {worst} (cx, cy, w, h) is farthest from the model's"
        picture = draw_errors(look, boxes[:, :2], far, "What each query reads")
    return wrong(function, problem, hint, picture)
