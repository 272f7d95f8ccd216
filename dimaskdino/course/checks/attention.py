"""Chapters 0 and 3: boxes, the assignment of answers to objects, attention, deformable attention."""

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from ms_deform_attn import ms_deform_attn_reference
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from dimaskdino.course.checks.compare import Wrong, called, check, compared, expect, random, short
from dimaskdino.course.checks.pictures import draw_errors, draw_tables
from dimaskdino.inspection.look import Look
from dimaskdino.modeling import Detector
from dimaskdino.modeling.decoder import DecoderLayer


@check("half of the width lies on each side of the centre: x0 = cx − w / 2")
def check_corners(function: Callable[[float, float, float, float], Sequence[float]]) -> str:
    """Corners (x0, y0, x1, y1) of a box given by centre, width and height."""
    cases = [(0.5, 0.5, 1.0, 1.0), (0.3, 0.6, 0.2, 0.4)]
    return compared(function, cases, lambda cx, cy, w, h: (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))


@check("the sum over all objects must be least; two objects cannot have the same query")
def check_cheapest_assignment(function: Callable[[np.ndarray], Sequence[int]]) -> str:
    """The query of each object in the cheapest assignment, from costs (queries, objects)."""
    # in the second one the cheapest query of both objects is the same
    cases = [(np.array([[1.0, 9.0], [5.0, 5.0], [9.0, 2.0]]),), (np.array([[1.0, 2.0], [4.0, 9.0], [8.0, 3.0]]),)]

    def expected(cost: np.ndarray) -> tuple[int, ...]:
        return tuple(linear_sum_assignment(cost.T)[1].tolist())

    return compared(function, cases, expected)


@check("view the projections as (n, heads, C / heads); scores / √(C / heads), softmax over the tokens; then `out`")
def check_attend(function: Callable[..., tuple[Tensor, Tensor]], layer: nn.MultiheadAttention) -> str:
    """To build: attention with several heads, compared with a trained layer.

    The student's function takes x (Q, C), tokens (N, C), the projections of the layer and the number of heads, and
    returns the output (Q, C) and the weights (heads, Q, N).
    """
    C, heads = layer.embed_dim, layer.num_heads

    def projection(part: int) -> Callable[[Tensor], Tensor]:
        rows = slice(part * C, (part + 1) * C)
        weight, bias = layer.in_proj_weight[rows].detach(), layer.in_proj_bias[rows].detach()
        return lambda x: functional.linear(x, weight, bias)

    def out(x: Tensor) -> Tensor:
        return functional.linear(x, layer.out_proj.weight.detach(), layer.out_proj.bias.detach())

    ask, key, value = projection(0), projection(1), projection(2)
    x, tokens = 4 * random(6, C) - 2, 4 * random(20, C, seed=1) - 2
    answer = called(function, (x, tokens, ask, key, value, out, heads))
    with torch.no_grad():
        output, weights = layer(x[None], tokens[None], tokens[None], average_attn_weights=False)
    output, weights = output[0], weights[0]
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise Wrong(f"expected the output and the weights, got {short(answer)}")
    scores = torch.einsum("qhd,nhd->hqn", ask(x).unflatten(-1, (heads, -1)), key(tokens).unflatten(-1, (heads, -1)))
    mistakes = {
        "the scores are divided by √C; each head has C / heads channels": (scores / C**0.5).softmax(-1),
        "the scores are not divided by √(C / heads)": scores.softmax(-1),
        "softmax over the queries; the weights of a query over the tokens sum to one": (
            scores / (C / heads) ** 0.5
        ).softmax(1),
    }

    expect(
        answer[1], weights, mistakes, lambda: draw_tables(answer[1][0], weights[0], "query", "token"), "the weights: "
    )
    read = torch.einsum("hqn,nhd->qhd", weights, value(tokens).unflatten(-1, (heads, -1))).flatten(1)
    missing = {"the last projection, `out`, is missing": read}
    expect(answer[0], output, missing, where="the weights are right, the output is not: ")
    return f"a layer with {heads} heads"


@check(
    "the centre of cell i lies at (i + 0.5) / width, so the position in cells is x · width − 0.5; a neighbour outside "
    "the map counts as 0"
)
def check_bilinear(function: Callable[[Tensor, float, float], Tensor]) -> str:
    """The value of a map (h, w) at (x, y), relative to its width and height, zero outside."""
    grid = random(4, 5)
    cases = [(grid, x, y) for x, y in ((0.5, 0.5), (0.3, 0.62), (0.1, 0.875), (0.02, 0.5), (0.99, 0.99))]

    def expected(values: Tensor, x: float, y: float) -> float:
        location = torch.tensor([x, y]).view(1, 1, 1, 1, 1, 2)
        weight = torch.ones(1, 1, 1, 1, 1)
        return float(ms_deform_attn_reference(values.reshape(1, -1, 1, 1), [tuple(values.shape)], location, weight))

    return compared(function, cases, expected)


@check("each sample reads its four neighbours, whatever the size of the image")
def check_samples(function: Callable[[int, int, int, int], int]) -> str:
    """Cells that one layer reads for Q queries."""
    cases = [(300, 8, 4, 4), (22223, 8, 4, 4), (40, 4, 3, 2)]
    return compared(function, cases, lambda q, heads, levels, points: q * heads * levels * points * 4)


@check("a place is the box's centre + offset · size / (2 · points); softmax over the levels and points of a head")
def check_attended(function: Callable[..., Tensor], look: Look, detector: Detector) -> str:
    """To build: what the queries of the first decoder layer read (Q, C), from (maps, boxes, offsets, scores).

    `look` is a real image with the predictions of the model `detector`, whose first layer makes the maps.
    """
    layer = cast(DecoderLayer, detector.decoder.layers[0]).cross_attention
    T_i = look.trace.T_i
    boxes = look.trace.references[0][0]
    locations, weights = look.trace.sampling[0][0][0], look.trace.sampling[0][1][0]
    with torch.no_grad():
        value = layer.value_proj(T_i.tokens).unflatten(-1, (layer.heads, -1))
    maps = []
    for part, shape in zip(value[0].split(T_i.sizes), T_i.shapes, strict=True):
        maps.append(part.permute(1, 2, 0).unflatten(2, shape))
    centre, unit = boxes[:, None, None, None, :2], boxes[:, None, None, None, 2:] * (0.5 / layer.points)
    offsets, scores = (locations - centre) / unit, weights.log()

    def read(locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_reference(value, T_i.shapes, locations[None], weights[None])[0]

    answer, expected = called(function, (maps, boxes, offsets, scores)), read(locations, weights)
    mistakes = {
        "the offsets are in parts of the image; they count in parts of the box": read(centre + offsets, weights),
        "softmax over the points of each level; all levels of a head share one": read(locations, scores.softmax(-1)),
    }
    expect(answer, expected, mistakes, lambda: draw_errors(look, boxes[:, :2], answer, expected, "Values read"))
    return f"all {len(expected)} queries"
