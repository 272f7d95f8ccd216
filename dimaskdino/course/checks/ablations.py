"""Chapter 7: settings and differences between runs."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats as scipy_stats

from dimaskdino.config import Section, load_config
from dimaskdino.course.checks.compare import Wrong, called, check, compared, expect
from dimaskdino.studies.comparison import Quantity, holm
from dimaskdino.studies.report import StudyReport
from dimaskdino.studies.study import Study
from dimaskdino.utils.errors import UserError


@check("`dimaskdino config keys` lists every setting; the variants in configs/ablations/*.yaml are examples")
def check_settings(function: Callable[[], Sequence[str]], variant: str, study: Study) -> str:
    """`key=value` settings that make the shapes configuration into one variant of a study."""
    wanted = study.variant(variant)
    answer = called(function, ())
    if not isinstance(answer, list | tuple) or not all(isinstance(text, str) for text in answer):
        raise Wrong(f"expected a list of texts such as 'model.decoder.layers=3', got {answer!r}")
    try:
        differing = _differing(load_config(study.scales["shapes"], answer), study.config(wanted, "shapes"))
    except UserError as error:
        raise Wrong(str(error)) from error
    if differing:
        raise Wrong(f"expected '{wanted.label}', but {'; '.join(differing)}")
    return f"the model '{wanted.label}'"


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


@check("first the mean and the variance (n − 1) of each variant; then the root of the sum of variance / n")
def check_unpaired(function: Callable[[Sequence[float], Sequence[float]], tuple[float, float]]) -> str:
    """Difference of the means of two variants' runs, b − a, and its standard error."""
    cases = [([30.0, 34.0, 29.0], [33.0, 36.5, 33.5]), ([10.0, 12.0], [12.0, 10.0, 17.0])]

    def expected(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
        error = statistics.variance(a) / len(a) + statistics.variance(b) / len(b)
        return statistics.mean(b) - statistics.mean(a), math.sqrt(error)

    return compared(function, cases, expected)


@check("Welch's standard error and degrees of freedom; scipy.stats.t for interval and p; Holm from the smallest p")
def check_verdicts(function: Callable[..., Sequence[Sequence[float]]], report: StudyReport, quantity: Quantity) -> str:
    """To build: differences of a study's variants from the first, with intervals and adjusted p-values.

    The student's function takes lists of APs, one for each variant with at least two runs, and returns (difference,
    low, high, adjusted p) of each variant after the first.
    """
    labels, values = [], []
    for variant in report.study.variants:
        runs = list(report.values(variant.name, quantity).values())
        if len(runs) > 1:
            labels.append(variant.label)
            values.append(runs)
    answer = called(function, (values,))
    tests = [_welch(values[0], other) for other in values[1:]]
    p = np.array([test.adjusted_p for test in tests])

    def with_p(changed: Sequence[float] | np.ndarray) -> tuple[Verdict, ...]:
        return tuple(test._replace(adjusted_p=float(x)) for test, x in zip(tests, changed, strict=True))

    bonferroni = (
        "the p-values are all multiplied by their number (Bonferroni); Holm multiplies the smallest by n, the next by "
        "n − 1"
    )
    mistakes = {"the p-values are not adjusted": with_p(p), bonferroni: with_p(np.minimum(1, len(p) * p))}
    expect(answer, with_p(holm(p.tolist())), mistakes)
    return f"the intervals and p-values of {', '.join(labels[1:])}"


class Verdict(NamedTuple):
    """A difference with its 95 % interval and p-value."""

    difference: float
    low: float
    high: float
    adjusted_p: float


def _welch(a: Sequence[float], b: Sequence[float]) -> Verdict:
    """Welch's test of the difference b − a, by SciPy; its p-value is not adjusted."""
    found = scipy_stats.ttest_ind(b, a, equal_var=False)
    interval = found.confidence_interval(0.95)
    return Verdict(statistics.mean(b) - statistics.mean(a), interval.low, interval.high, found.pvalue)
