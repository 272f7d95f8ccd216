"""Checks of the exercises: each runs a student's function and explains what is wrong with the result.

They print, and return whether all is right. They never raise, so that a notebook keeps running.
"""

import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hotcoco import COCO
from ms_deform_attn import ms_deform_attn_reference
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_iou, generalized_box_iou

from dimaskdino import config
from dimaskdino.config import Section, load_config
from dimaskdino.data.coco import CocoDataset
from dimaskdino.errors import UserError
from dimaskdino.evaluation.coco_ap import average_precision, precision_curves
from dimaskdino.evaluation.detections import Detections
from dimaskdino.evaluation.layerwise_ap import FIRST_LAYER
from dimaskdino.inspection.look import Look
from dimaskdino.inspection.objects import mask_iou
from dimaskdino.modeling import Detector
from dimaskdino.modeling.de_imbalance import mask_guided_boxes
from dimaskdino.modeling.layers import sine_positions
from dimaskdino.modeling.structures import Stage, Targets
from dimaskdino.studies.study import Study
from dimaskdino.training.matcher import matching_costs
from dimaskdino.training.points import sample_maps, sample_masks


@dataclass(frozen=True)
class CheckResult:
    """Whether a check passed. Notebooks do not show it, since the explanation has been printed."""

    right: bool

    def __bool__(self) -> bool:
        return self.right

    def _ipython_display_(self) -> None:
        pass


_seed = 0  # 0: the inputs that the course shows


@contextlib.contextmanager
def other_cases(seed: int) -> Iterator[None]:
    """Check with inputs that the course does not show.

    Args:
        seed: of these inputs, above 0.
    """
    global _seed
    before, _seed = _seed, seed
    try:
        yield
    finally:
        _seed = before


def _varied(case: tuple) -> tuple:
    """Other numbers of about the same size, where a case consists of plain numbers."""
    if not _seed or any(isinstance(value, bool) or not isinstance(value, int | float) for value in case):
        return case
    factors = (1 + 0.3 * _random(len(case))).tolist()
    return tuple(
        value * factor if isinstance(value, float) else round(value * factor)
        for value, factor in zip(case, factors, strict=True)
    )


def _called(function: Callable[..., Any], arguments: Sequence[Any], hint: str) -> Any:
    """What a student's function returns; None, with the reason printed, if there is nothing to compare."""
    name = getattr(function, "__name__", "your function")
    try:
        answer = function(*copy.deepcopy(arguments))
    except Exception as error:  # whatever a student's code may do
        shown = ", ".join(_short(argument) for argument in arguments)
        print(f"✗ {name}({shown}) stopped with {type(error).__name__}: {error}\n  Hint: {hint}")
        return None
    if answer is None or answer is ...:
        print(f"○ {name} returns nothing yet. Write its body, then run this cell again.\n  Hint: {hint}")
        return None
    return answer


def _run(function: Callable[..., Any], cases: Sequence[tuple], expected: Callable[..., Any], hint: str) -> CheckResult:
    """Compare a student's function with the package's on some inputs; print the verdict."""
    name = getattr(function, "__name__", "your function")
    for case in map(_varied, cases):
        answer = _called(function, case, hint)
        if answer is None:
            return CheckResult(False)
        problem = _difference(answer, expected(*case))
        if problem:
            shown = ", ".join(_short(argument) for argument in case)
            print(f"✗ {name}({shown}): {problem}\n  Hint: {hint}")
            return CheckResult(False)
    print(f"✓ {name} agrees with the package on {len(cases)} cases.")
    return CheckResult(True)


def _short(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) > 8:
        return f"{'tensor' if isinstance(value, Tensor) else 'array'} of shape {tuple(value.shape)}"
    return str(value.tolist()) if isinstance(value, Tensor | np.ndarray) else repr(value)


def _difference(answer: Any, expected: Any) -> str | None:
    """What is wrong with a result, in words; None if nothing is."""
    if isinstance(expected, tuple):
        if not isinstance(answer, tuple | list) or len(answer) != len(expected):
            return f"expected {len(expected)} results, got {_short(answer)}"
        problems = (_difference(*pair) for pair in zip(answer, expected, strict=True))
        return next((f"result {i + 1}: {problem}" for i, problem in enumerate(problems) if problem), None)
    if isinstance(expected, Tensor):
        if not isinstance(answer, Tensor | np.ndarray | list):
            return f"expected values of shape {tuple(expected.shape)}, got {type(answer).__name__}"
        try:
            answer, expected = torch.as_tensor(np.asarray(answer)).double(), expected.double()
        except (TypeError, ValueError, RuntimeError):
            return f"expected numbers of shape {tuple(expected.shape)}, got {_short(answer)}"
        if answer.shape != expected.shape:
            return f"expected the shape {tuple(expected.shape)}, got {tuple(answer.shape)}"
        if torch.allclose(answer, expected, rtol=1e-4, atol=1e-5):
            return None
        worst = (answer - expected).abs().nan_to_num(torch.inf)
        place = tuple(int(i) for i in torch.unravel_index(worst.argmax(), worst.shape))
        return f"at {list(place)} expected {expected[place].item():.5g}, got {answer[place].item():.5g}"
    try:
        close = math.isclose(float(answer), float(expected), rel_tol=1e-4, abs_tol=1e-6)
    except (TypeError, ValueError):
        return f"expected a number, got {type(answer).__name__}"
    return None if close else f"expected {float(expected):.5g}, got {float(answer):.5g}"


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1000 * _seed))


def _more(count: int, *shape: int) -> list[Tensor]:
    """Random numbers for inputs that the course does not show; none while it shows its own."""
    return [_random(*shape, seed=100 + i) for i in range(count if _seed else 0)]


def _box_pairs() -> list[tuple[Tensor, Tensor]]:
    boxes = [[0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 6, 6], [0, 0, 2, 1]]
    pairs = [(torch.tensor(boxes[0]).float(), torch.tensor(other).float()) for other in boxes]
    # a corner and a positive size for each of two boxes
    return pairs + [(torch.cat([x[0], x[0] + x[1]]), torch.cat([x[2], x[2] + x[3]])) for x in _more(4, 4, 2)]


def _rectangles() -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of rectangles in a map of 8x8."""
    more = [(x * torch.tensor([5, 5, 3, 3])).int().tolist() for x in _more(3, 4)]
    return [(1, 2, 3, 4), (0, 0, 8, 8), (5, 1, 1, 1)] + [(top, left, h + 1, w + 1) for top, left, h, w in more]


def check_corners(function: Callable[[float, float, float, float], Sequence[float]]) -> CheckResult:
    """Chapter 0: corners (x0, y0, x1, y1) of a box given by centre, width and height."""
    cases = [(0.5, 0.5, 1.0, 1.0), (0.3, 0.6, 0.2, 0.4)]
    hint = "half of the width lies on each side of the centre: x0 = cx − w / 2"
    return _run(function, cases, lambda cx, cy, w, h: (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), hint)


def check_cheapest_assignment(function: Callable[[np.ndarray], Sequence[int]]) -> CheckResult:
    """Chapter 0: the query of each object in the cheapest assignment, from costs (queries, objects)."""
    # in the second one the cheapest query of both objects is the same
    cases = [(np.array([[1.0, 9.0], [5.0, 5.0], [9.0, 2.0]]),), (np.array([[1.0, 2.0], [4.0, 9.0], [8.0, 3.0]]),)]
    cases += [(x.numpy(),) for x in _more(3, 4, 2)]

    def expected(cost: np.ndarray) -> tuple[int, ...]:
        query, number = linear_sum_assignment(cost)
        return tuple(int(query[number == i][0]) for i in range(cost.shape[1]))

    hint = "the sum over all objects must be least; two objects cannot have the same query"
    return _run(function, cases, expected, hint)


def check_imbalance(function: Callable[[float, float], float]) -> CheckResult:
    """Chapter 1: how far detection lags behind segmentation, in points of AP."""
    cases = [(31.0, 35.5), (40.0, 38.0), (0.0, 0.0)]
    return _run(function, cases, lambda box, mask: mask - box, "positive where the mask AP is higher")


def check_box_iou(function: Callable[[Tensor, Tensor], Tensor]) -> CheckResult:
    """Chapter 1: intersection over union of two boxes, xyxy, as a number."""
    return _run(
        function,
        _box_pairs(),
        lambda a, b: float(box_iou(a[None], b[None])),
        "the intersection runs from the larger of the two left ends to the smaller of the two right ends, and is empty "
        "when that is negative",
    )


def check_mask_iou(function: Callable[[Tensor, Tensor], Tensor]) -> CheckResult:
    """Chapter 1: intersection over union of two masks (h, w) bool, as a number."""
    cases = [(_random(6, 7, seed=i) > 0.5, _random(6, 7, seed=i + 10) > 0.3) for i in range(3)]
    expected = lambda a, b: float(mask_iou(a[None], b[None]))  # noqa: E731
    return _run(function, cases, expected, "pixels in both, divided by pixels in at least one")


def check_bilinear(function: Callable[[Tensor, float, float], Tensor]) -> CheckResult:
    """Chapter 3: the value of a map (h, w) at (x, y), relative to its width and height, zero outside."""
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


def check_samples(function: Callable[[int, int, int, int], int]) -> CheckResult:
    """Chapter 3: cells that one layer reads for Q queries."""
    cases = [(300, 8, 4, 4), (22223, 8, 4, 4), (40, 4, 3, 2)]
    hint = "each sample reads its four neighbours, whatever the size of the image"
    return _run(function, cases, lambda q, heads, levels, points: q * heads * levels * points * 4, hint)


def check_attended(function: Callable[..., Tensor], look: Look, detector: Detector) -> CheckResult:
    """Chapter 3, to build: what the queries of the first decoder layer read, on a real image.

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
    answer = _called(function, (maps, boxes, offsets, scores), hint)
    if answer is None:
        return CheckResult(False)
    expected = read(locations, weights)
    problem = _difference(answer, expected)
    if problem is None:
        return _right(function, f"reads what the model's {len(expected)} queries read")
    if _difference(answer, read(centre + offsets, weights)) is None:
        return _wrong(function, "the offsets are in parts of the image; they count in parts of the box", hint)
    if _difference(answer, read(locations, scores.softmax(-1))) is None:
        return _wrong(function, "softmax over the points of each level; all levels of a head share one", hint)
    if isinstance(answer, Tensor) and answer.shape == expected.shape:
        far = (answer - expected).norm(dim=-1).argmax()
        worst = [round(float(x), 2) for x in boxes[far]]
        problem += f"; the query with the box {worst} (cx, cy, w, h) is farthest from the model's"
    return _wrong(function, problem, hint)


def check_select(function: Callable[[Tensor, int], Tensor]) -> CheckResult:
    """Chapter 4: indices (k,) of the tokens whose best class scores highest, from class logits (N, K)."""
    cases = [(_random(9, 3, seed=i), k) for i, k in enumerate((1, 4, 9))]
    hint = "first the highest logit of each token, then the k highest of those, best first"
    return _run(function, cases, lambda logits, k: logits.amax(-1).topk(k).indices, hint)


def check_mask_to_box(function: Callable[[Tensor], Tensor]) -> CheckResult:
    """Chapter 4: the box (cx, cy, w, h) around a mask (h, w) bool, relative to the map's size."""
    masks = []
    for top, left, height, width in _rectangles():
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[top : top + height, left : left + width] = True
        masks.append((mask,))

    def expected(mask: Tensor) -> Tensor:
        logits = mask.float() * 2 - 1
        stage = Stage("check", torch.zeros(1, 1, 1), torch.zeros(1, 1, 4), torch.ones(1, 1, 1), logits[None, None])
        return mask_guided_boxes(stage, exact=True)[0, 0]

    hint = "the first and the last occupied column and row; the last one belongs to the box, so its far edge is + 1"
    return _run(function, masks, expected, hint)


def check_recall(function: Callable[[Tensor, int], float]) -> CheckResult:
    """Chapter 4: fraction of the objects that own a token, from the owners (k,) and the number of objects."""
    cases = [(torch.tensor([0, 0, -1, 2]), 3), (torch.tensor([-1, -1]), 2), (torch.tensor([1, 0, 1]), 2)]
    cases += [((x * 6).int() - 1, 5) for x in _more(3, 7)]
    hint = "every object counts once, however many tokens it owns, and −1 is no object"
    return _run(function, cases, lambda owners, objects: float(len(owners[owners >= 0].unique())) / objects, hint)


def check_second_selection(function: Callable[..., Tensor], look: Look, detector: Detector) -> CheckResult:
    """Chapter 4, to build: the rows of T_s1 that the second selection keeps, best first, on a real image.

    Args:
        function: the student's, from (T_s1, block, heads, k) to rows (k,).
        look: an image and what the model made of it.
        detector: the model; its De-Imbalance block and heads are the given pieces.
    """
    T_s1, T_s2 = look.trace.T_s1, look.trace.T_s2
    assert T_s2 is not None
    block, heads, k = detector.de_imbalance[0], detector.heads, T_s2.scores.shape[1]
    hint = (
        "position from the boxes, layer by layer; after each layer the box head moves the boxes; then the best scores"
    )
    with torch.no_grad():
        answer = _called(function, (T_s1, block, heads, k), hint)
    if answer is None:
        return CheckResult(False)
    expected = (T_s1.indices[0] == T_s2.indices[0][:, None]).int().argmax(1)
    rows = torch.as_tensor(answer).flatten()
    if rows.shape != expected.shape:
        return _wrong(function, f"expected {k} rows, got the shape {tuple(torch.as_tensor(answer).shape)}", hint)
    if torch.equal(rows, expected):
        return _right(function, f"keeps the same {k} tokens as the model, in the same order")
    same = len(set(rows.tolist()) & set(expected.tolist()))
    before = set(T_s1.scores[0].topk(k).indices.tolist())
    if set(rows.tolist()) == before:
        return _wrong(function, "these are the best tokens before the interaction: score what comes out of it", hint)
    if same == k:
        return _wrong(function, "the right tokens in another order: the best score comes first", hint)
    return _wrong(function, f"{same} of {k} tokens are those that the model keeps", hint)


def check_guided_tokens(function: Callable[..., Tensor], look: Look, detector: Detector) -> CheckResult:
    """Chapter 5, to build: the feature tokens after BATO, on a real image.

    Args:
        function: the student's, from (T_i, position, T_g_mask, T_g_box, bato) to T_bal (1, N, C).
        look: an image and what the model made of it.
        detector: the model; its BATO holds the given pieces `attention` and `ffn`.
    """
    found, bato = look.trace.bato, detector.token_optimization
    assert found is not None
    assert bato is not None
    T_i = look.trace.T_i
    pieces = (T_i.tokens, sine_positions(T_i), found.T_g_mask, found.T_g_box, bato)
    hint = "bato.attention(x, query, key, value) returns LN(x + attention) and the weights; then bato.ffn"
    with torch.no_grad():
        answer = _called(function, pieces, hint)
        if answer is None:
            return CheckResult(False)
        attended, _ = bato.attention(pieces[0], pieces[0] + pieces[1], found.T_g_mask + found.T_g_box, found.T_g_mask)
    expected = found.T_bal.tokens
    problem = _difference(answer, expected)
    if problem is None:
        return _right(function, f"gives the model's {expected.shape[1]} tokens")
    if _difference(answer, attended) is None:
        return _wrong(function, "the attention is right; the feed-forward block is missing", hint)
    if isinstance(answer, Tensor) and answer.shape == expected.shape:
        far = (answer - expected).norm(dim=-1)[0]
        worst = [round(float(x), 2) for x in T_i.centres()[far.argmax()]]
        problem += f"; the token at {worst} of the image is farthest from the model's"
    return _wrong(function, problem, hint)


def _right(function: Callable[..., Any], text: str) -> CheckResult:
    print(f"✓ {getattr(function, '__name__', 'your function')} agrees with the package: it {text}.")
    return CheckResult(True)


def _wrong(function: Callable[..., Any], text: str, hint: str) -> CheckResult:
    print(f"✗ {getattr(function, '__name__', 'your function')}: {text}\n  Hint: {hint}")
    return CheckResult(False)


def check_cross_attention(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> CheckResult:
    """Chapter 5: attention of N queries (N, C) to G keys and values (G, C), with one head."""
    cases = [
        tuple(_random(n, 4, seed=seed) * 6 - 3 for seed, n in enumerate(sizes)) for sizes in ((3, 5, 5), (6, 1, 1))
    ]
    hint = "the products of queries and keys, divided by √C, become weights by a softmax over the keys"
    return _run(function, cases, functional.scaled_dot_product_attention, hint)


def check_mask_probability(function: Callable[[Tensor, Tensor], Tensor]) -> CheckResult:
    """Chapter 5: a mask (h, w) from a query's embedding (C,) and mask features (C, h, w)."""
    cases = [(_random(4, seed=i) * 4 - 2, _random(4, 3, 5, seed=i + 9)) for i in range(2)]

    def expected(embedding: Tensor, features: Tensor) -> Tensor:
        stage = Stage("check", torch.zeros(1, 1, 1), torch.zeros(1, 1, 4), embedding[None, None], features[None])
        return stage.mask_logits()[0, 0].sigmoid()

    return _run(function, cases, expected, "one number a pixel: the products over the channels, summed; then σ")


def check_own_share(function: Callable[[Tensor, Tensor, Tensor], float]) -> CheckResult:
    """Chapter 5: fraction of the attention of objects' tokens that goes to guiding tokens of their own object."""
    owners = [
        (torch.tensor([0, 1, -1]), torch.tensor([0, 0, 1, -1])),
        (torch.tensor([-1, 2, 2]), torch.tensor([2, 2, 2, 2])),
    ]
    cases = [(_random(3, 4, seed=i).softmax(1), *pair) for i, pair in enumerate(owners)]

    def expected(attention: Tensor, tokens: Tensor, guides: Tensor) -> float:
        own = (tokens[:, None] == guides).float()
        return float((attention * own).sum(1)[tokens >= 0].mean())

    hint = "leave out the tokens whose owner is −1; for each other one add up its attention where the owners agree"
    return _run(function, cases, expected, hint)


def check_cheapest(function: Callable[[Tensor], tuple[Tensor, bool]]) -> CheckResult:
    """Chapter 6: the cheapest query of each object (M,) from costs (Q, M), and whether two objects share one."""
    shared = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    cases = [(_random(6, 3, seed=1),), (shared,), (_random(4, 1, seed=2),)]

    def expected(cost: Tensor) -> tuple[Tensor, bool]:
        queries = cost.min(0).indices
        return queries, len(set(queries.tolist())) < len(queries)

    return _run(
        function, cases, expected, "look down each column for its least cost; return the pair (queries, shared)"
    )


def check_matching_cost(
    function: Callable[..., Tensor], stage: Stage, targets: Targets, settings: config.Loss
) -> CheckResult:
    """Chapter 6, to build: the cost of every query for every object of a real image.

    Args:
        function: the student's, from (logits, boxes, masks, labels, true_boxes, true_masks, giou) to (Q, M).
        stage: predictions for a batch of this image.
        targets: its objects.
        settings: weights of the costs, and number of points.
    """
    labels, true_boxes = targets.labels[0, : targets.counts[0]], targets.boxes[0, : targets.counts[0]]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(_seed)
        points = torch.rand(1, settings.points, 2)  # the first that `matching_costs` draws, too

        def cost(**weights: float) -> Tensor:
            torch.manual_seed(_seed)
            chosen = config.Weights(**(dict.fromkeys(config.Weights.model_fields, 0.0) | weights))
            return matching_costs([stage], targets, settings.model_copy(update={"cost": chosen}))[0][0]

        weights = settings.cost.model_dump()
        parts = {name: cost(**{name: weight}) for name, weight in weights.items()}
        masks = stage.mask_embedding[0] @ sample_maps(stage.mask_features, points)[0]  # type: ignore[index, arg-type]
        rows = torch.arange(len(labels))
        true_masks = sample_masks(targets.masks[0], rows, points.expand(len(labels), -1, -1))
        giou = -cost(giou=1.0)
    expected = sum(parts.values())
    hint = (
        "p = logits.sigmoid()[:, labels]; softplus(x) − t·x is the cross-entropy of x = masks; cdist(…, p=1) for boxes"
    )
    given = (stage.class_logits[0], stage.boxes[0], masks, labels, true_boxes, true_masks, giou)
    answer = _called(function, given, hint)
    if answer is None:
        return CheckResult(False)
    problem = _difference(answer, expected)
    if problem is None:
        return _right(function, f"gives the model's {len(expected)} × {len(labels)} costs")
    for name, part in parts.items():
        if _difference(answer, expected - part) is None:
            return _wrong(function, f"everything but the {name} cost is there", hint)
        if isinstance(answer, Tensor) and answer.shape == expected.shape:
            factor = float(((answer - expected) * part).sum() / part.square().sum()) + 1
            if _difference(answer, expected + (factor - 1) * part) is None:
                return _wrong(function, f"the {name} cost counts {factor:.2g} times", hint)
    return _wrong(function, problem, hint)


def check_giou(function: Callable[[Tensor, Tensor], float]) -> CheckResult:
    """Chapter 6: generalised IoU of two boxes, xyxy, as a number."""
    hint = "the hull runs from the smaller of the two left ends to the larger of the two right ends"
    return _run(function, _box_pairs(), lambda a, b: float(generalized_box_iou(a[None], b[None])), hint)


def check_dice_loss(function: Callable[[Tensor, Tensor], Tensor]) -> CheckResult:
    """Chapter 6: dice loss of one mask from probabilities and true values (P,)."""
    cases = [(_random(7, seed=i), (_random(7, seed=i + 5) > 0.4).float()) for i in range(3)]
    hint = "the sums run over the points; the ones above and below keep empty masks from dividing by zero"
    return _run(function, cases, lambda p, t: float(1 - (2 * p @ t + 1) / (p.sum() + t.sum() + 1)), hint)


def check_right_ones(function: Callable[[Tensor, float], Sequence[bool]]) -> CheckResult:
    """Chapter 2: which detections are true positives, from IoUs (D, M) in the order of their scores."""
    iou = torch.tensor([[0.9, 0.2], [0.8, 0.6], [0.7, 0.55], [0.1, 0.0]])
    cases = [(iou, 0.5), (iou, 0.75), (iou[:, :1], 0.5), (_random(5, 3, seed=4), 0.5)]

    def expected(overlaps: Tensor, threshold: float) -> Tensor:
        left, right = overlaps.clone(), []
        for i in range(len(left)):
            best = left[i].argmax()
            right.append(bool(left[i, best] >= threshold))
            if right[-1]:
                left[:, best] = -1
        return torch.tensor(right)

    hint = "go down the detections and remember which objects are claimed; only a right detection claims one"
    return _run(function, cases, expected, hint)


def check_precision_recall(function: Callable[[Sequence[bool], int], tuple]) -> CheckResult:
    """Chapter 2: precision and recall (D,) after each detection."""
    cases = [([True, False, True, True], 5), ([False, True], 1), ([True], 3)]
    cases += [((x > 0.5).tolist(), 6) for x in _more(3, 6)]

    def expected(right: Sequence[bool], objects: int) -> tuple[Tensor, Tensor]:
        hits = torch.tensor(right).double().cumsum(0)
        return hits / torch.arange(1, len(right) + 1), hits / objects

    hint = "after n detections with t right ones: t / n and t / objects; np.cumsum counts the right ones"
    return _run(function, cases, expected, hint)


def check_interpolated(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> CheckResult:
    """Chapter 2: precision at 101 recalls from precision and recall after each detection."""
    hits = np.cumsum([1, 0, 1, 1, 0, 0, 1])
    cases = [(hits / np.arange(1, 8), hits / objects) for objects in (4, 5, 9)]
    drawn = [np.cumsum(x.numpy() > 0.4) for x in _more(3, 7)]
    cases += [(found / np.arange(1, 8), found / 8) for found in drawn]

    def expected(precision: np.ndarray, recall: np.ndarray) -> Tensor:
        envelope = np.maximum.accumulate(precision[::-1])[::-1]  # never rising to the right
        places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
        return torch.from_numpy(np.append(envelope, 0.0)[places])

    hint = "for each recall r the best of precision[recall >= r], 0 if there is none"
    return _run(function, cases, expected, hint)


def check_average_precision(
    function: Callable[..., float], found: Mapping[str, Detections], truth: COCO, data: CocoDataset, label: str
) -> CheckResult:
    """Chapter 2, to build: box AP of one class at the first and the last stage and after the first layer.

    Args:
        function: the student's, from a list of (IoUs (D, M), scores (D,)), one per image, best first, to AP in percent.
        found: detections of every stage.
        truth: the annotations, from `read_truth`.
        data: the same split.
        label: the class.
    """
    number = data.classes.index(label)
    stages, shown = list(found), []
    samples = (data[i] for i in range(len(data)))
    true_boxes = {sample.image_id: sample.boxes[sample.labels == number].double() for sample in samples}
    for stage in dict.fromkeys((stages[0], FIRST_LAYER, stages[-1])):
        rows = found[stage].boxes
        by_image: dict[int, list[dict[str, Any]]] = {image: [] for image in true_boxes}
        for row in sorted(rows, key=lambda row: -row["score"]):
            if row["category_id"] == data.category_ids[number]:
                by_image[row["image_id"]].append(row)
        images = []
        for image, boxes in true_boxes.items():
            xywh = torch.tensor([row["bbox"] for row in by_image[image]], dtype=torch.float64).view(-1, 4)
            iou = box_iou(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1), boxes)
            images.append((iou, np.array([row["score"] for row in by_image[image]])))
        hint = "sort the detections of all images together by their scores; then ten thresholds, 0.5 to 0.95"
        answer = _called(function, (images,), hint)
        if answer is None:
            return CheckResult(False)
        expected = average_precision(truth, rows, "box").per_class[label]
        problem = _difference(answer, expected)
        if problem and _difference(answer * 100, expected) is None:
            return _wrong(function, f"{stage}: AP is in percent", hint)
        at_half = 100 * float(precision_curves(truth, rows, "box", 0.5)[number].mean())
        if problem and _difference(answer, at_half) is None:
            return _wrong(function, f"{stage}: this is AP at the threshold 0.5 alone", hint)
        if problem:
            return _wrong(function, f"{stage}: {problem}", hint)
        shown.append(f"{expected:.1f} at {stage}")
    return _right(function, f"gives {', '.join(shown)}")


def check_settings(function: Callable[[], Sequence[str]], row: str, study: Study) -> CheckResult:
    """Chapter 7: `key=value` settings that make the shapes configuration into one row of a study."""
    wanted = next(r for r in study.rows if r.name == row)
    name = getattr(function, "__name__", "your function")
    hint = "`dimaskdino config keys` lists every setting; the rows of configs/ablations/*.yaml are examples"
    answer = _called(function, (), hint)
    if answer is None:
        return CheckResult(False)
    try:
        if not isinstance(answer, list | tuple) or not all(isinstance(text, str) for text in answer):
            raise UserError(f"expected a list of texts such as 'model.decoder.layers=3', got {answer!r}")
        differing = _differing(load_config(study.scales["shapes"], answer), study.config(wanted, "shapes"))
    except UserError as error:
        print(f"✗ {name}: {error}\n  Hint: {hint}")
        return CheckResult(False)
    if differing:
        print(f"✗ {name}: expected '{wanted.label}'; not so yet: {'; '.join(differing)}\n  Hint: {hint}")
        return CheckResult(False)
    print(f"✓ {name} gives the model '{wanted.label}'.")
    return CheckResult(True)


def _differing(answer: Section, expected: Section, prefix: str = "") -> list[str]:
    """The settings in which two configurations differ, in words."""
    problems = []
    for key in type(expected).model_fields:
        a, b = getattr(answer, key), getattr(expected, key)
        if isinstance(a, Section) and isinstance(b, Section):
            problems += _differing(a, b, f"{prefix}{key}.")
        elif a != b:
            problems.append(f"{prefix}{key} is {a}")
    return problems


def check_unpaired(function: Callable[[Sequence[float], Sequence[float]], tuple[float, float]]) -> CheckResult:
    """Chapter 7: difference of the means of two rows' runs, b − a, and its standard error."""
    cases = [([30.0, 34.0, 29.0], [33.0, 36.5, 33.5]), ([10.0, 12.0], [12.0, 10.0, 17.0])]
    cases += [((30 * x[0]).tolist(), (30 * x[1]).tolist()) for x in _more(2, 2, 4)]

    def expected(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
        errors = (statistics.variance(row) / len(row) for row in (a, b))
        return statistics.mean(b) - statistics.mean(a), math.sqrt(sum(errors))

    hint = "first the mean and the variance (n − 1) of each row; then the root of the sum of variance / n"
    return _run(function, cases, expected, hint)


def check_annotation(function: Callable[[np.ndarray], tuple[Sequence[float], float]]) -> CheckResult:
    """Chapter 8: bounding box [x, y, w, h] and area of a mask (h, w), as COCO's annotations have them."""
    masks = []
    for top, left, height, width in _rectangles():
        mask = np.zeros((8, 8), np.uint8)
        mask[top : top + height, left : left + width] = 1
        masks.append((mask,))
    hint = "the first and the last occupied column and row; both belong to the object, so its width is last − first + 1"

    def expected(mask: np.ndarray) -> tuple[Tensor, float]:
        encoded = coco_mask.encode(np.asfortranarray(mask))
        return torch.from_numpy(coco_mask.toBbox(encoded)), float(coco_mask.area(encoded))

    return _run(function, masks, expected, hint)


def check_gate(function: Callable[[Tensor, Tensor, float], Tensor]) -> CheckResult:
    """Chapter 8: interpolation of tokens between before (gate 0) and after (gate 1)."""
    cases = [(_random(2, 3), _random(2, 3, seed=1), gate) for gate in (0.0, 1.0, 0.3)]
    return _run(function, cases, torch.lerp, "before, and the gate's part of the difference")


def check_best_queries(function: Callable[[Tensor, int], Tensor]) -> CheckResult:
    """Chapter 9: queries (n,) of the best pairs of query and class, from class logits (Q, K)."""
    cases = [(_random(5, 3, seed=i), n) for i, n in enumerate((1, 4, 15))]
    hint = "flatten to Q · K numbers, take the n highest; the pair i belongs to query i // K"

    def expected(logits: Tensor, n: int) -> Tensor:
        ranked = sorted((-value, q) for q, row in enumerate(logits.tolist()) for value in row)
        return torch.tensor([q for _, q in ranked[:n]])

    return _run(function, cases, expected, hint)
