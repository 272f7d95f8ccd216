"""Chapters 4 and 5: the selections of De-Imbalance, and BATO.

`look` is a real image with the predictions of the model `detector`, whose modules are the given pieces.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from dimaskdino.course.checks.compare import Wrong, called, check, compared, expect, random, rectangles
from dimaskdino.course.checks.pictures import draw_choices, draw_errors
from dimaskdino.inspection.look import Look
from dimaskdino.modeling import Detector
from dimaskdino.modeling.bato import BATO
from dimaskdino.modeling.de_imbalance import DeImbalance, mask_guided_boxes
from dimaskdino.modeling.layers import sine_positions
from dimaskdino.modeling.structures import Stage


@check("first the highest logit of each token, then the k highest of those, best first")
def check_select(function: Callable[[Tensor, int], Tensor]) -> str:
    """Indices (k,) of the tokens whose best class scores highest, from class logits (N, K)."""
    cases = [(random(9, 3, seed=i), k) for i, k in enumerate((1, 4, 9))]
    return compared(function, cases, lambda logits, k: logits.amax(-1).topk(k).indices)


@check("the first and the last occupied column and row; the last one belongs to the box, so its far edge is + 1")
def check_mask_to_box(function: Callable[[Tensor], Tensor]) -> str:
    """The box (cx, cy, w, h) around a mask (h, w) bool, relative to the map's size."""

    def expected(mask: Tensor) -> Tensor:
        logits = mask.float() * 2 - 1
        stage = Stage("check", torch.zeros(1, 1, 1), torch.zeros(1, 1, 4), torch.ones(1, 1, 1), logits[None, None])
        return mask_guided_boxes(stage, exact=True)[0, 0]

    return compared(function, [(mask,) for mask in rectangles()], expected)


@check("every object counts once, however many tokens it owns, and −1 is no object")
def check_recall(function: Callable[[Tensor, int], float]) -> str:
    """Fraction of the objects that own a token, from the owners (k,) and the number of objects."""
    cases = [(torch.tensor([0, 0, -1, 2]), 3), (torch.tensor([-1, -1]), 2), (torch.tensor([1, 0, 1]), 2)]
    return compared(function, cases, lambda owners, objects: len(owners[owners >= 0].unique()) / objects)


@check("position from the boxes, layer by layer; after each layer the box head moves the boxes; then the best scores")
def check_second_selection(function: Callable[..., Tensor], look: Look, detector: Detector) -> str:
    """To build: the rows (k,) of T_s1 that the second selection keeps, best first, from (T_s1, block, heads, k)."""
    T_s1, T_s2 = look.trace.T_s1, look.trace.T_s2
    k = T_s2.scores.shape[1]
    with torch.no_grad():
        block = cast(DeImbalance, detector.de_imbalance).second_selections[0]
        answer = called(function, (T_s1, block, detector.heads, k))
    rows = torch.as_tensor(answer).flatten()
    expected = (T_s1.indices[0] == T_s2.indices[0][:, None]).int().argmax(1)
    if rows.shape != expected.shape:
        raise Wrong(f"expected {k} rows, got the shape {tuple(torch.as_tensor(answer).shape)}")
    if torch.equal(rows, expected):
        return f"the {k} tokens that are kept, and their order"
    same = len(set(rows.tolist()) & set(expected.tolist()))
    problem = f"{same} of {k} tokens are those that the model keeps"
    if set(rows.tolist()) == set(T_s1.scores[0].topk(k).indices.tolist()):
        problem = "these are the best tokens before the interaction: score the tokens that come out of it"
    elif same == k:
        problem = "the right tokens in another order: the best score comes first"
    centres = look.trace.T_i.centres()[T_s1.indices[0]]
    inside = rows[(rows >= 0) & (rows < len(centres))].long()
    raise Wrong(problem, draw_choices(look, centres[expected], centres[inside]))


@check("bato.attention(x, query, key, value) returns LN(x + attention) and the weights; then bato.ffn")
def check_guided_tokens(function: Callable[..., Tensor], look: Look, detector: Detector) -> str:
    """To build: the feature tokens T_bal (1, N, C), from (T_i, position, T_g_mask, T_g_box, bato)."""
    found, bato, T_i = look.trace.bato, detector.bato, look.trace.T_i
    # the course's model has BATO
    assert found is not None
    assert isinstance(bato, BATO)
    position, mask, box = sine_positions(T_i), found.T_g_mask, found.T_g_box
    with torch.no_grad():
        answer = called(function, (T_i.tokens, position, mask, box, bato))
        attended, _ = bato.attention(T_i.tokens, T_i.tokens + position, mask + box, mask)
    expected = found.T_bal.tokens
    mistakes = {"the attention is right; the feed-forward block is missing": attended}
    expect(
        answer,
        expected,
        mistakes,
        lambda: draw_errors(look, T_i.centres(), answer[0], expected[0], "Tokens after BATO"),
    )
    return f"all {expected.shape[1]} feature tokens"


@check("the products of queries and keys, divided by √C, become weights by a softmax over the keys")
def check_cross_attention(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Attention of N queries (N, C) to G keys and values (G, C), with one head."""
    cases = []
    for N, G in ((3, 5), (6, 1)):
        cases.append((random(N, 4) * 6 - 3, random(G, 4, seed=1) * 6 - 3, random(G, 4, seed=2) * 6 - 3))
    return compared(function, cases, functional.scaled_dot_product_attention)


@check("one number a pixel: the products over the channels, summed; then σ")
def check_mask_probability(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """A mask (h, w) from a query's embedding (C,) and mask features (C, h, w)."""
    cases = [(random(4, seed=i) * 4 - 2, random(4, 3, 5, seed=i + 9)) for i in range(2)]

    def expected(embedding: Tensor, features: Tensor) -> Tensor:
        stage = Stage("check", torch.zeros(1, 1, 1), torch.zeros(1, 1, 4), embedding[None, None], features[None])
        return stage.mask_logits()[0, 0].sigmoid()

    return compared(function, cases, expected)


@check("leave out the tokens whose owner is −1; for each other one add up its attention where the owners agree")
def check_own_share(function: Callable[[Tensor, Tensor, Tensor], float]) -> str:
    """Fraction of the attention of objects' tokens that goes to guiding tokens of their own object."""
    cases = [
        (random(3, 4).softmax(1), torch.tensor([0, 1, -1]), torch.tensor([0, 0, 1, -1])),
        (random(3, 4, seed=1).softmax(1), torch.tensor([-1, 2, 2]), torch.tensor([2, 2, 2, 2])),
    ]

    def expected(attention: Tensor, tokens: Tensor, guides: Tensor) -> float:
        own = (tokens[:, None] == guides).float()
        return float((attention * own).sum(1)[tokens >= 0].mean())

    return compared(function, cases, expected)
