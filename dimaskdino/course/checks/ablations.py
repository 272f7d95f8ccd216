"""Chapter 7: settings and differences between runs."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from dimaskdino.config import Section, load_config
from dimaskdino.course.checks.pictures import draw_intervals
from dimaskdino.course.checks.verdicts import (
    CheckResult,
    called,
    compared,
    difference,
    more,
    random,
    right,
    seed_of_cases,
    wrong,
)
from dimaskdino.studies.comparison import Quantity, holm
from dimaskdino.studies.report import StudyReport
from dimaskdino.studies.study import Study
from dimaskdino.utils.errors import UserError


def check_settings(function: Callable[[], Sequence[str]], variant: str, study: Study) -> CheckResult:
    """Chapter 7: `key=value` settings that make the shapes configuration into one variant of a study."""
    wanted = study.variant(variant)
    hint = "`dimaskdino config keys` lists every setting; the variants in configs/ablations/*.yaml are examples"
    answer = called(function, (), hint)
    if answer is None:
        return CheckResult(False)
    try:
        if not isinstance(answer, list | tuple) or not all(isinstance(text, str) for text in answer):
            raise UserError(f"expected a list of texts such as 'model.decoder.layers=3', got {answer!r}")
        differing = _differing(load_config(study.scales["shapes"], answer), study.config(wanted, "shapes"))
    except UserError as error:
        return wrong(function, str(error), hint)
    if differing:
        return wrong(function, f"expected '{wanted.label}'; not so yet: {'; '.join(differing)}", hint)
    return right(function, f"gives the model '{wanted.label}'")


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
    """Difference of the means of two rows' runs, b − a, and its standard error."""
    cases = [([30.0, 34.0, 29.0], [33.0, 36.5, 33.5]), ([10.0, 12.0], [12.0, 10.0, 17.0])]
    cases += [((30 * x[0]).tolist(), (30 * x[1]).tolist()) for x in more(2, 2, 4)]

    def expected(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
        errors = (statistics.variance(row) / len(row) for row in (a, b))
        return statistics.mean(b) - statistics.mean(a), math.sqrt(sum(errors))

    hint = "first the mean and the variance (n − 1) of each row; then the root of the sum of variance / n"
    return compared(function, cases, expected, hint)


def check_verdicts(
    function: Callable[..., Sequence[Sequence[float]]], report: StudyReport, quantity: Quantity
) -> CheckResult:
    """To build: differences of a study's rows from the first, with intervals and adjusted p-values.

    Args:
        function: the student's, from lists of APs, one for each row, to (difference, low, high, adjusted p) of each row
            after the first.
        report: a study's report; its rows must have at least two runs.
        quantity: what is compared.
    """
    rows = [row for row in report.study.variants if len(report.values(row.name, quantity)) > 1]
    values = {row.name: list(report.values(row.name, quantity).values()) for row in rows}
    if seed := seed_of_cases():
        values = {
            name: (np.array(found) + 3 * random(len(found), seed=number).numpy()).tolist()
            for number, (name, found) in enumerate(values.items(), start=seed)
        }
    hint = "Welch's standard error and degrees of freedom; scipy.stats.t for interval and p; Holm from the smallest p"
    answer = called(function, (list(values.values()),), hint)
    if answer is None:
        return CheckResult(False)
    first, *others = values.values()
    expected = [_verdict(first, other) for other in others]
    adjusted = holm([p for *_, p in expected])
    wanted = tuple((*interval, p) for (*interval, _), p in zip(expected, adjusted, strict=True))
    problem = difference(answer, wanted)
    labels = [row.label for row in rows[1:]]
    if problem is None:
        return right(function, f"gives the kit's intervals and p-values for {', '.join(labels)}")
    try:
        yours = [tuple(float(x) for x in row) for row in answer]
        picture = draw_intervals(labels, [y[:3] for y in yours], [w[:3] for w in wanted], quantity.label)  # type: ignore[misc]
    except (TypeError, ValueError, IndexError):
        return wrong(function, problem, hint)
    mistakes: dict[str, Any] = {
        "the p-values are not adjusted": tuple(expected),
        "the p-values are all multiplied by their number (Bonferroni); Holm multiplies the smallest by n, the next by "
        "n − 1": tuple((*interval, min(1.0, p * len(expected))) for *interval, p in expected),
    }
    known = (text for text, then in mistakes.items() if difference(answer, then) is None)
    text = next(known, None)
    if text is None and len(yours) == len(wanted):
        text = _first_wrong(yours, wanted, labels)
    return wrong(function, text or problem, hint, picture)


def _verdict(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float, float]:
    """Welch's difference b − a with its 95 % interval and p-value, by SciPy."""
    found = scipy_stats.ttest_ind(b, a, equal_var=False)
    interval = found.confidence_interval(0.95)
    return statistics.mean(b) - statistics.mean(a), float(interval.low), float(interval.high), float(found.pvalue)


def _first_wrong(
    yours: Sequence[tuple[float, ...]], wanted: Sequence[tuple[float, ...]], labels: Sequence[str]
) -> str | None:
    """Which number of which row differs first, in words."""
    names = ("the difference", "the lower end of the interval", "the upper end of the interval", "the adjusted p")
    for label, mine, right_one in zip(labels, yours, wanted, strict=True):
        for name, a, b in zip(names, mine, right_one, strict=False):
            if difference(a, b):
                return f"{label}: {name}: {difference(a, b)}"
    return None
