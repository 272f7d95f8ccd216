"""Chapter 5: guiding tokens and what they do."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dimaskdino.course.checks.pictures import draw_errors
from dimaskdino.course.checks.verdicts import CheckResult, called, compared, difference, random, right, wrong
from dimaskdino.inspection.look import Look
from dimaskdino.modeling import Detector
from dimaskdino.modeling.layers import sine_positions
from dimaskdino.modeling.structures import Stage


def check_guided_tokens(function: Callable[..., Tensor], look: Look, detector: Detector) -> CheckResult:
    """To build: the feature tokens after BATO, on a real image.

    Args:
        function: the student's, from (T_i, position, T_g_mask, T_g_box, bato) to T_bal (1, N, C).
        look: an image and what the model made of it.
        detector: the model; its BATO holds the given pieces `attention` and `ffn`.
    """
    found, bato = look.trace.bato, detector.bato
    assert found is not None
    assert bato is not None
    T_i = look.trace.T_i
    pieces = (T_i.tokens, sine_positions(T_i), found.T_g_mask, found.T_g_box, bato)
    hint = "bato.attention(x, query, key, value) returns LN(x + attention) and the weights; then bato.ffn"
    with torch.no_grad():
        answer = called(function, pieces, hint)
        if answer is None:
            return CheckResult(False)
        attended, _ = bato.attention(pieces[0], pieces[0] + pieces[1], found.T_g_mask + found.T_g_box, found.T_g_mask)
    expected = found.T_bal.tokens
    problem = difference(answer, expected)
    if problem is None:
        return right(function, f"gives the model's {expected.shape[1]} tokens")
    if difference(answer, attended) is None:
        return wrong(function, "the attention is right; the feed-forward block is missing", hint)
    picture = None
    if isinstance(answer, Tensor) and answer.shape == expected.shape:
        far = (answer - expected).norm(dim=-1)[0]
        worst = [round(float(x), 2) for x in T_i.centres()[far.argmax()]]
        problem += f"; the token at {worst} of the image is farthest from the model's"
        picture = draw_errors(look, T_i.centres(), far, "Tokens after BATO")
    return wrong(function, problem, hint, picture)


def check_cross_attention(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> CheckResult:
    """Attention of N queries (N, C) to G keys and values (G, C), with one head."""
    cases = [tuple(random(n, 4, seed=seed) * 6 - 3 for seed, n in enumerate(sizes)) for sizes in ((3, 5, 5), (6, 1, 1))]
    hint = "the products of queries and keys, divided by √C, become weights by a softmax over the keys"
    return compared(function, cases, functional.scaled_dot_product_attention, hint)


def check_mask_probability(function: Callable[[Tensor, Tensor], Tensor]) -> CheckResult:
    """A mask (h, w) from a query's embedding (C,) and mask features (C, h, w)."""
    cases = [(random(4, seed=i) * 4 - 2, random(4, 3, 5, seed=i + 9)) for i in range(2)]

    def expected(embedding: Tensor, features: Tensor) -> Tensor:
        stage = Stage("check", torch.zeros(1, 1, 1), torch.zeros(1, 1, 4), embedding[None, None], features[None])
        return stage.mask_logits()[0, 0].sigmoid()

    return compared(function, cases, expected, "one number a pixel: the products over the channels, summed; then σ")


def check_own_share(function: Callable[[Tensor, Tensor, Tensor], float]) -> CheckResult:
    """Fraction of the attention of objects' tokens that goes to guiding tokens of their own object."""
    owners = [
        (torch.tensor([0, 1, -1]), torch.tensor([0, 0, 1, -1])),
        (torch.tensor([-1, 2, 2]), torch.tensor([2, 2, 2, 2])),
    ]
    cases = [(random(3, 4, seed=i).softmax(1), *pair) for i, pair in enumerate(owners)]

    def expected(attention: Tensor, tokens: Tensor, guides: Tensor) -> float:
        own = (tokens[:, None] == guides).float()
        return float((attention * own).sum(1)[tokens >= 0].mean())

    hint = "leave out the tokens whose owner is −1; for each other one add up its attention where the owners agree"
    return compared(function, cases, expected, hint)
