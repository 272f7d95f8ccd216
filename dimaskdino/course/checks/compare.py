"""How the checks of the exercises work: they call a student's function and compare its result with the package's.

A check prints its verdict and returns it. It never raises, so that a notebook keeps running.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from IPython.display import display
from matplotlib.figure import Figure
from torch import Tensor


@dataclass(frozen=True)
class CheckResult:
    """Whether a check passed. The reason has been printed; a notebook shows the picture, if there is one."""

    right: bool
    picture: Figure | None = None

    def __bool__(self) -> bool:
        return self.right

    def _ipython_display_(self) -> None:
        if self.picture is not None:
            display(self.picture)


class Wrong(Exception):
    """An answer is wrong: the reason, a picture of it, the arguments of the call as text, and ○ if nothing is done."""

    def __init__(self, text: str, picture: Figure | None = None, call: str = "", mark: str = "✗") -> None:
        super().__init__(text)
        self.picture, self.call, self.mark = picture, call, mark


def check(hint: str) -> Callable[[Callable[..., str]], Callable[..., CheckResult]]:
    """Turn a function into a check, which prints a hint with every wrong answer.

    The function takes the student's function first. It raises `Wrong`, or returns what the two agree on, as text.
    """

    def decorate(judge: Callable[..., str]) -> Callable[..., CheckResult]:
        @functools.wraps(judge)
        def checked(function: Callable[..., Any], *context: Any) -> CheckResult:
            name = getattr(function, "__name__", "your function")
            try:
                agreed = judge(function, *context)
            except Wrong as wrong:
                print(f"{wrong.mark} {name}{wrong.call}: {wrong}\n  Hint: {hint}")
                return CheckResult(False, wrong.picture)
            print(f"✓ {name} agrees with the package on {agreed}.")
            return CheckResult(True)

        return checked

    return decorate


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def box_pairs() -> list[tuple[Tensor, Tensor]]:
    """Pairs of boxes, xyxy: equal, overlapping, apart, one inside the other."""
    first = torch.tensor([0.0, 0, 2, 2])
    others = ([0.0, 0, 2, 2], [1.0, 1, 3, 3], [5.0, 5, 6, 6], [0.0, 0, 2, 1])
    return [(first, torch.tensor(other)) for other in others]


def rectangles() -> list[Tensor]:
    """Masks (8, 8) bool, a rectangle each."""
    places = [(1, 2, 3, 4), (0, 0, 8, 8), (5, 1, 1, 1)]  # top, left, height and width
    masks = []
    for top, left, height, width in places:
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[top : top + height, left : left + width] = True
        masks.append(mask)
    return masks


def called(function: Callable[..., Any], arguments: Sequence[Any], copied: bool = True) -> Any:
    """Call a student's function, with copies of the arguments unless told otherwise; `Wrong` if it returns nothing."""
    try:
        answer = function(*copy.deepcopy(arguments) if copied else arguments)
    except Exception as error:  # whatever a student's code may do
        raise Wrong(f"stopped with {type(error).__name__}: {error}", call=_shown(arguments)) from error
    if answer is None or answer is ...:
        raise Wrong("returns nothing yet. Write its body, then run this cell again.", mark="○")
    return answer


def compared(function: Callable[..., Any], cases: Sequence[tuple], expected: Callable[..., Any]) -> str:
    """Compare a student's function with the package's on some inputs."""
    for case in cases:
        if problem := difference(called(function, case), expected(*case)):
            raise Wrong(problem, call=_shown(case))
    return f"{len(cases)} cases"


def expect(
    answer: Any,
    expected: Any,
    mistakes: Mapping[str, Any] | None = None,
    picture: Callable[[], Figure] | None = None,
    where: str = "",
) -> None:
    """Raise `Wrong` if an answer differs from the package's.

    `mistakes` has frequent mistakes and the answers that they lead to; `where` comes before the reason; `picture` draws
    the difference, for answers of the expected shape.
    """
    problem = difference(answer, expected)
    if problem is None:
        return
    for text, outcome in (mistakes or {}).items():
        if difference(answer, outcome) is None:
            problem = text
            break
    drawn = None
    with contextlib.suppress(ValueError, TypeError, RuntimeError):  # answers that are no arrays of numbers
        if picture and np.shape(answer) == np.shape(expected):
            drawn = picture()
    raise Wrong(where + problem, drawn)


def difference(answer: Any, expected: Any) -> str | None:
    """The difference between two results, in words; None if they agree."""
    if isinstance(expected, tuple):
        if not isinstance(answer, tuple | list) or len(answer) != len(expected):
            return f"expected {len(expected)} results, got {short(answer)}"
        names = getattr(expected, "_fields", None) or [f"result {i + 1}" for i in range(len(expected))]
        for name, a, b in zip(names, answer, expected, strict=True):
            if problem := difference(a, b):
                return f"{name}: {problem}"
        return None
    if isinstance(expected, Tensor):
        return _difference_of_tensors(answer, expected.double())
    try:
        close = math.isclose(float(answer), float(expected), rel_tol=1e-4, abs_tol=1e-6)
    except (TypeError, ValueError):
        return f"expected a number, got {type(answer).__name__}"
    return None if close else f"expected {float(expected):.5g}, got {float(answer):.5g}"


def _difference_of_tensors(answer: Any, expected: Tensor) -> str | None:
    shape = tuple(expected.shape)
    if not isinstance(answer, Tensor | np.ndarray | list):
        return f"expected values of shape {shape}, got {type(answer).__name__}"
    try:
        answer = torch.as_tensor(np.asarray(answer)).double()
    except (TypeError, ValueError, RuntimeError):
        return f"expected numbers of shape {shape}, got {short(answer)}"
    if answer.shape != expected.shape:
        return f"expected the shape {shape}, got {tuple(answer.shape)}"
    if torch.allclose(answer, expected, rtol=1e-4, atol=1e-5):
        return None
    worst = (answer - expected).abs().nan_to_num(torch.inf)
    place = tuple(int(i) for i in torch.unravel_index(worst.argmax(), worst.shape))
    return f"at {list(place)} expected {expected[place].item():.5g}, got {answer[place].item():.5g}"


def short(value: Any) -> str:
    """A value as text, or its type and shape where that would be long."""
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) > 8:
        return f"{'tensor' if isinstance(value, Tensor) else 'array'} of shape {tuple(value.shape)}"
    text = str(value.tolist()) if isinstance(value, Tensor | np.ndarray) else repr(value)
    return text if len(text) <= 60 else type(value).__name__


def _shown(arguments: Sequence[Any]) -> str:
    return f"({', '.join(map(short, arguments))})"
