"""Chapter 4: the two selections."""

from collections.abc import Callable

import torch
from torch import Tensor

from dimaskdino.course.checks.pictures import draw_choices
from dimaskdino.course.checks.verdicts import CheckResult, called, compared, more, random, rectangles, right, wrong
from dimaskdino.inspection.look import Look
from dimaskdino.modeling import Detector
from dimaskdino.modeling.de_imbalance import mask_guided_boxes
from dimaskdino.modeling.structures import Stage


def check_select(function: Callable[[Tensor, int], Tensor]) -> CheckResult:
    """Indices (k,) of the tokens whose best class scores highest, from class logits (N, K)."""
    cases = [(random(9, 3, seed=i), k) for i, k in enumerate((1, 4, 9))]
    hint = "first the highest logit of each token, then the k highest of those, best first"
    return compared(function, cases, lambda logits, k: logits.amax(-1).topk(k).indices, hint)


def check_mask_to_box(function: Callable[[Tensor], Tensor]) -> CheckResult:
    """The box (cx, cy, w, h) around a mask (h, w) bool, relative to the map's size."""
    masks = []
    for top, left, height, width in rectangles():
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[top : top + height, left : left + width] = True
        masks.append((mask,))

    def expected(mask: Tensor) -> Tensor:
        logits = mask.float() * 2 - 1
        stage = Stage("check", torch.zeros(1, 1, 1), torch.zeros(1, 1, 4), torch.ones(1, 1, 1), logits[None, None])
        return mask_guided_boxes(stage, exact=True)[0, 0]

    hint = "the first and the last occupied column and row; the last one belongs to the box, so its far edge is + 1"
    return compared(function, masks, expected, hint)


def check_recall(function: Callable[[Tensor, int], float]) -> CheckResult:
    """Fraction of the objects that own a token, from the owners (k,) and the number of objects."""
    cases = [(torch.tensor([0, 0, -1, 2]), 3), (torch.tensor([-1, -1]), 2), (torch.tensor([1, 0, 1]), 2)]
    cases += [((x * 6).int() - 1, 5) for x in more(3, 7)]
    hint = "every object counts once, however many tokens it owns, and −1 is no object"
    return compared(function, cases, lambda owners, objects: float(len(owners[owners >= 0].unique())) / objects, hint)


def check_second_selection(function: Callable[..., Tensor], look: Look, detector: Detector) -> CheckResult:
    """To build: the rows of T_s1 that the second selection keeps, best first, on a real image.

    Args:
        function: the student's, from (T_s1, block, heads, k) to rows (k,).
        look: an image and what the model made of it.
        detector: the model; its De-Imbalance block and heads are the given pieces.
    """
    T_s1, T_s2 = look.trace.T_s1, look.trace.T_s2
    assert T_s2 is not None
    block, heads, k = detector.de_imbalance.second_selections[0], detector.heads, T_s2.scores.shape[1]
    hint = (
        "position from the boxes, layer by layer; after each layer the box head moves the boxes; then the best scores"
    )
    with torch.no_grad():
        answer = called(function, (T_s1, block, heads, k), hint)
    if answer is None:
        return CheckResult(False)
    expected = (T_s1.indices[0] == T_s2.indices[0][:, None]).int().argmax(1)
    rows = torch.as_tensor(answer).flatten()
    if rows.shape != expected.shape:
        return wrong(function, f"expected {k} rows, got the shape {tuple(torch.as_tensor(answer).shape)}", hint)
    if torch.equal(rows, expected):
        return right(function, f"keeps the same {k} tokens as the model, in the same order")
    same = len(set(rows.tolist()) & set(expected.tolist()))
    centres = look.trace.T_i.centres()[T_s1.indices[0]]
    inside = rows[(rows >= 0) & (rows < len(centres))].long()
    groups = (("kept by the model", centres[expected]), ("kept by your function", centres[inside]))
    picture = draw_choices(look, groups, "Tokens that are kept")
    before = set(T_s1.scores[0].topk(k).indices.tolist())
    if set(rows.tolist()) == before:
        return wrong(
            function, "these are the best tokens before the interaction: score what comes out of it", hint, picture
        )
    if same == k:
        return wrong(function, "the right tokens in another order: the best score comes first", hint)
    return wrong(function, f"{same} of {k} tokens are those that the model keeps", hint, picture)
