"""Chapter 9: detections of pairs of query and class."""

from collections.abc import Callable

import torch
from torch import Tensor

from dimaskdino.course.checks.verdicts import CheckResult, compared, random


def check_best_queries(function: Callable[[Tensor, int], Tensor]) -> CheckResult:
    """Queries (n,) of the best pairs of query and class, from class logits (Q, K)."""
    cases = [(random(5, 3, seed=i), n) for i, n in enumerate((1, 4, 15))]
    hint = "flatten to Q · K numbers, take the n highest; the pair i belongs to query i // K"

    def expected(logits: Tensor, n: int) -> Tensor:
        ranked = sorted((-value, q) for q, row in enumerate(logits.tolist()) for value in row)
        return torch.tensor([q for _, q in ranked[:n]])

    return compared(function, cases, expected, hint)
