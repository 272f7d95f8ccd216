"""Chapter 0: boxes, the assignment of answers to objects, and attention."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dimaskdino.course.checks.pictures import draw_tables
from dimaskdino.course.checks.verdicts import CheckResult, called, compared, difference, more, random, right, wrong


def check_corners(function: Callable[[float, float, float, float], Sequence[float]]) -> CheckResult:
    """Corners (x0, y0, x1, y1) of a box given by centre, width and height."""
    cases = [(0.5, 0.5, 1.0, 1.0), (0.3, 0.6, 0.2, 0.4)]
    hint = "half of the width lies on each side of the centre: x0 = cx − w / 2"
    return compared(function, cases, lambda cx, cy, w, h: (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), hint)


def check_cheapest_assignment(function: Callable[[np.ndarray], Sequence[int]]) -> CheckResult:
    """The query of each object in the cheapest assignment, from costs (queries, objects)."""
    # in the second one the cheapest query of both objects is the same
    cases = [(np.array([[1.0, 9.0], [5.0, 5.0], [9.0, 2.0]]),), (np.array([[1.0, 2.0], [4.0, 9.0], [8.0, 3.0]]),)]
    cases += [(x.numpy(),) for x in more(3, 4, 2)]

    def expected(cost: np.ndarray) -> tuple[int, ...]:
        query, number = linear_sum_assignment(cost)
        return tuple(int(query[number == i][0]) for i in range(cost.shape[1]))

    hint = "the sum over all objects must be least; two objects cannot have the same query"
    return compared(function, cases, expected, hint)


def check_attend(function: Callable[..., tuple[Tensor, Tensor]], layer: nn.MultiheadAttention) -> CheckResult:
    """To build: attention with several heads, compared with a trained layer.

    Args:
        function: the student's, from (x (Q, C), tokens (N, C), ask, key, value, out, heads) to the output (Q, C) and
            the weights (heads, Q, N).
        layer: the layer, in evaluation mode; its projections are the given pieces.
    """
    C, heads = layer.embed_dim, layer.num_heads
    weight, bias = layer.in_proj_weight.detach(), layer.in_proj_bias.detach()

    def projection(part: int) -> Callable[[Tensor], Tensor]:
        rows = slice(part * C, (part + 1) * C)
        return lambda x: nn.functional.linear(x, weight[rows], bias[rows])

    ask, key, value = (projection(part) for part in range(3))

    def out(x: Tensor) -> Tensor:
        return nn.functional.linear(x, layer.out_proj.weight.detach(), layer.out_proj.bias.detach())

    x, tokens = 4 * random(6, C) - 2, 4 * random(20, C, seed=1) - 2
    hint = "view the projections as (n, heads, C / heads); scores / √(C / heads), softmax over the tokens; then `out`"
    answer = called(function, (x, tokens, ask, key, value, out, heads), hint)
    if answer is None:
        return CheckResult(False)
    with torch.no_grad():
        output, weights = layer(x[None], tokens[None], tokens[None], average_attn_weights=False)
    expected = (output[0], weights[0])
    problem = difference(answer, expected)
    if problem is None:
        return right(function, f"gives what the toy's layer with {heads} heads gives")
    if not isinstance(answer, tuple | list) or len(answer) != 2 or not isinstance(answer[1], Tensor):
        return wrong(function, problem, hint)
    mine = answer[1]
    if mine.shape != weights[0].shape:
        return wrong(function, problem, hint)
    picture = draw_tables(mine[0].detach().numpy(), weights[0, 0].numpy(), "query", "token")
    scores = torch.einsum("qhd,nhd->hqn", ask(x).unflatten(-1, (heads, -1)), key(tokens).unflatten(-1, (heads, -1)))
    mistakes = {
        "the scores are divided by √C; each head has C / heads channels": (scores / C**0.5).softmax(-1),
        "the scores are not divided by √(C / heads)": scores.softmax(-1),
        "softmax over the queries; the weights of a query over the tokens sum to one": (
            scores / (C / heads) ** 0.5
        ).softmax(1),
    }
    for text, weights_then in mistakes.items():
        if difference(mine, weights_then) is None:
            return wrong(function, text, hint, picture)
    if difference(mine, weights[0]) is not None:
        return wrong(function, f"the weights of the heads: {difference(mine, weights[0])}", hint, picture)
    read = torch.einsum("hqn,nhd->qhd", weights[0], value(tokens).unflatten(-1, (heads, -1))).flatten(1)
    if difference(answer[0], read) is None:
        return wrong(function, "the weights are right; the last projection, `out`, is missing", hint)
    return wrong(function, f"the weights are right, the output is not: {difference(answer[0], expected[0])}", hint)
