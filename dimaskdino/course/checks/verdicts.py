"""What all checks share: they call a student's function, compare, and say what is wrong.

They print, and return whether all is right. They never raise, so that a notebook keeps running.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from IPython.display import display
from matplotlib.figure import Figure
from torch import Tensor


@dataclass(frozen=True)
class CheckResult:
    """Whether a check passed. What is wrong has been printed; a notebook shows the picture of it, if there is one."""

    right: bool
    picture: Figure | None = None

    def __bool__(self) -> bool:
        return self.right

    def _ipython_display_(self) -> None:
        if self.picture is not None:
            display(self.picture)


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


def seed_of_cases() -> int:
    """Seed of the inputs: 0 for those that the course shows."""
    return _seed


def varied(case: tuple) -> tuple:
    """Other numbers of about the same size, where a case consists of plain numbers."""
    if not _seed or any(isinstance(value, bool) or not isinstance(value, int | float) for value in case):
        return case
    factors = (1 + 0.3 * random(len(case))).tolist()
    return tuple(
        value * factor if isinstance(value, float) else round(value * factor)
        for value, factor in zip(case, factors, strict=True)
    )


def called(function: Callable[..., Any], arguments: Sequence[Any], hint: str, copied: bool = True) -> Any:
    """What a student's function returns; None, with the reason printed, if there is nothing to compare.

    Args:
        function: the student's.
        arguments: what it is given.
        hint: printed with what is wrong.
        copied: whether it is given copies, which it may change.
    """
    name = name_of(function)
    try:
        answer = function(*copy.deepcopy(arguments) if copied else arguments)
    except Exception as error:  # whatever a student's code may do
        shown = ", ".join(short(argument) for argument in arguments)
        print(f"✗ {name}({shown}) stopped with {type(error).__name__}: {error}\n  Hint: {hint}")
        return None
    if answer is None or answer is ...:
        print(f"○ {name} returns nothing yet. Write its body, then run this cell again.\n  Hint: {hint}")
        return None
    return answer


def compared(
    function: Callable[..., Any], cases: Sequence[tuple], expected: Callable[..., Any], hint: str
) -> CheckResult:
    """Compare a student's function with the package's on some inputs; print the verdict."""
    name = name_of(function)
    for case in map(varied, cases):
        answer = called(function, case, hint)
        if answer is None:
            return CheckResult(False)
        problem = difference(answer, expected(*case))
        if problem:
            shown = ", ".join(short(argument) for argument in case)
            print(f"✗ {name}({shown}): {problem}\n  Hint: {hint}")
            return CheckResult(False)
    print(f"✓ {name} agrees with the package on {len(cases)} cases.")
    return CheckResult(True)


def short(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) > 8:
        return f"{'tensor' if isinstance(value, Tensor) else 'array'} of shape {tuple(value.shape)}"
    text = str(value.tolist()) if isinstance(value, Tensor | np.ndarray) else repr(value)
    return text if len(text) <= 60 else type(value).__name__


def difference(answer: Any, expected: Any) -> str | None:
    """What is wrong with a result, in words; None if nothing is."""
    if isinstance(expected, tuple):
        if not isinstance(answer, tuple | list) or len(answer) != len(expected):
            return f"expected {len(expected)} results, got {short(answer)}"
        problems = (difference(*pair) for pair in zip(answer, expected, strict=True))
        return next((f"result {i + 1}: {problem}" for i, problem in enumerate(problems) if problem), None)
    if isinstance(expected, Tensor):
        if not isinstance(answer, Tensor | np.ndarray | list):
            return f"expected values of shape {tuple(expected.shape)}, got {type(answer).__name__}"
        try:
            answer, expected = torch.as_tensor(np.asarray(answer)).double(), expected.double()
        except (TypeError, ValueError, RuntimeError):
            return f"expected numbers of shape {tuple(expected.shape)}, got {short(answer)}"
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


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1000 * _seed))


def more(count: int, *shape: int) -> list[Tensor]:
    """Random numbers for inputs that the course does not show; none while it shows its own."""
    return [random(*shape, seed=100 + i) for i in range(count if _seed else 0)]


def box_pairs() -> list[tuple[Tensor, Tensor]]:
    boxes = [[0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 6, 6], [0, 0, 2, 1]]
    pairs = [(torch.tensor(boxes[0]).float(), torch.tensor(other).float()) for other in boxes]
    # a corner and a positive size for each of two boxes
    return pairs + [(torch.cat([x[0], x[0] + x[1]]), torch.cat([x[2], x[2] + x[3]])) for x in more(4, 4, 2)]


def rectangles() -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of rectangles in a map of 8x8."""
    drawn = [(x * torch.tensor([5, 5, 3, 3])).int().tolist() for x in more(3, 4)]
    return [(1, 2, 3, 4), (0, 0, 8, 8), (5, 1, 1, 1)] + [(top, left, h + 1, w + 1) for top, left, h, w in drawn]


def right(function: Callable[..., Any], text: str) -> CheckResult:
    """What a student built agrees with the package."""
    print(f"✓ {name_of(function)} agrees with the package: it {text}.")
    return CheckResult(True)


def wrong(function: Callable[..., Any], text: str, hint: str, picture: Figure | None = None) -> CheckResult:
    """What is wrong with what a student built."""
    print(f"✗ {name_of(function)}: {text}\n  Hint: {hint}")
    return CheckResult(False, picture)


def name_of(function: Callable[..., Any]) -> str:
    """What to call a student's function."""
    return getattr(function, "__name__", "your function")
