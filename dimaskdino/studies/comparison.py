"""Compare variants of a model: differences between means over trainings, with intervals, p-values and power.

A measured AP is one of many: another seed gives another model, another draw of images another AP. The variance of a
difference therefore has two parts:

* over trainings: the sum of the variants' own variances of the mean (Welch, The generalization of Student's problem,
  1947) or, where the variants of a seed start from the same training, that of the differences between runs of a seed;
* over images, for the trained models: from the paired bootstrap (`evaluation.bootstrap`). A quantity that is read
  during the training, such as `first.imbalance@10`, has none, so its interval is over trainings alone.

Their sum keeps the degrees of freedom of the first part: the number of seeds − 1 in pairs, Welch's otherwise.
Satterthwaite's degrees of freedom (1946) of the sum are larger and make p-values too small for few seeds. The p-values
of all comparisons of a study are one family and are adjusted together (Holm 1979). Why single runs are not enough:
Bouthillier et al., Accounting for Variance in Machine Learning Benchmarks, MLSys 2021.
"""

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Float
from scipy.special import nctdtrinc
from scipy.stats import t as student

from dimaskdino.config.sections import TYPE
from dimaskdino.evaluation.bootstrap import CONFIDENCE
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.modeling.stages import FIRST_LAYER
from dimaskdino.studies.runs import EvaluatedRun
from dimaskdino.utils import plugins
from dimaskdino.utils.errors import UserError

ENOUGH_SEEDS = 3
POWER = 0.8
SIMULATIONS = 20_000
Verdict = Literal["supported", "contradicted", "inconclusive"]
Measured = Mapping[str, Mapping[int, EvaluatedRun]]  # runs by name of the variant and seed
AP = TypeVar("AP", float, Float[np.ndarray, " resamples"])


@dataclass(frozen=True)
class Quantity:
    """A quantity of an evaluated run.

    Attributes:
        stage: `first` or `last` for those decoder layers, or a stage's name.
        metric: box AP or mask AP in percent, or the imbalance, mask AP − box AP, in points.
        at: read where the box AP of the stage first reaches this value during training, interpolated between
            validations; None: after training. A higher AP narrows the imbalance by itself, so models are also compared
            at equal AP.
    """

    stage: str
    metric: Literal["box", "mask", "imbalance", "own"]
    at: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Quantity":
        """Parse text such as `last.box`, `decoder.0.mask`, `first.imbalance@25` or `my_project.quantities:small`.

        Raises:
            ValueError: the text is something else.
        """
        if TYPE.fullmatch(text):
            return OwnQuantity(text, "own")
        match = re.fullmatch(r"(.+)\.(box|mask|imbalance)(?:@(\d+(?:\.\d+)?))?", text)
        if match is None:
            raise ValueError(
                f"'{text}' is not a quantity. Write STAGE.box, STAGE.mask or STAGE.imbalance, such as last.box; "
                "STAGE.imbalance@25 to read it at 25 box AP; or MODULE:NAME of a function of your own"
            )
        at = None if match[3] is None else float(match[3])
        return cls(match[1], match[2], at)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.stage}.{self.metric}" + ("" if self.at is None else f"@{self.at:g}")

    @property
    def label(self) -> str:
        """Label for tables and figures."""
        metric = self.metric if self.metric == "imbalance" else f"{self.metric} AP"
        where = f"{self.stage} layer" if self.stage in ("first", "last") else self.stage
        return f"{metric}, {where}" + ("" if self.at is None else f", at {self.at:g} box AP")

    def check(self) -> None:
        """Check, before any run, that it can be read."""

    def in_run(self, run: EvaluatedRun) -> float | None:
        """Its value in a run; None if the stage has none, or did not reach the box AP at which it is read.

        Raises:
            UserError: the stage was not evaluated, or not scored during training.
        """
        name = self._stage_in(run.result)
        if self.at is None:
            if name not in run.result.stages:
                stages = ", ".join(run.result.stages)
                raise UserError(f"{run.result.source}: {name} was not evaluated, only {stages}")
            stage = run.result.stages[name]
            return self._of(stage.box.AP, stage.mask.AP if stage.mask else None)
        validations = [validation[name] for validation in run.validations if name in validation]
        if not validations:
            raise UserError(
                f"{run.result.source}: '{self}' needs AP of {name} during the training; train with "
                f"train.validation.every=100 'train.validation.stages=[{name}]'"
            )
        points = []
        for ap in validations:
            value = self._of(ap["box"], ap["mask"])
            if ap["box"] is not None and value is not None:
                points.append((ap["box"], value))
        return first_at(points, self.at)

    def by_seed(self, runs: Mapping[int, EvaluatedRun]) -> dict[int, float]:
        """Its value in each run that has one."""
        values = {}
        for seed, run in runs.items():
            value = self.in_run(run)
            if value is not None:
                values[seed] = value
        return values

    def resampled(self, run: EvaluatedRun) -> Float[np.ndarray, " resamples"] | None:
        """Its value on the bootstrap resamples; None without them, and for values during training."""
        if run.samples is None or self.at is not None:
            return None
        name, samples = self._stage_in(run.result), run.samples.samples
        return self._of(samples.get(f"{name}/box"), samples.get(f"{name}/mask"))

    def _stage_in(self, result: LayerwiseAP) -> str:
        if self.stage == "last":
            return next(reversed(result.stages))
        return FIRST_LAYER if self.stage == "first" else self.stage

    def _of(self, box: AP | None, mask: AP | None) -> AP | None:
        if self.metric == "imbalance":
            return None if box is None or mask is None else mask - box
        return box if self.metric == "box" else mask


class OwnQuantity(Quantity):
    """A function of the user's from the AP of all stages to a number (docs/extend.md); `stage` is its MODULE:NAME."""

    def __str__(self) -> str:
        return self.stage

    @property
    def label(self) -> str:
        return self.stage.partition(":")[2].replace("_", " ")

    def check(self) -> None:
        plugins.resolve(self.stage, "report")

    def in_run(self, run: EvaluatedRun) -> float | None:
        value = plugins.resolve(self.stage, "report")(run.result)
        if value is None:
            return None
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise UserError(f"report: {self.stage} returned {value!r}, expected a finite number or None")
        return float(value)

    def resampled(self, run: EvaluatedRun) -> None:
        """No bootstrap samples exist of it, so that its interval is over trainings alone."""


def first_at(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The second value where the first reaches x for the first time, linear between points; None if it never does.

    None also if the first point lies above x, as it is not known when x was reached.
    """
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


@dataclass(frozen=True)
class Variance:
    """An estimated variance, in squared points, and its degrees of freedom."""

    value: float
    df: float


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float

    @classmethod
    def around(cls, estimate: float, variance: Variance) -> "Interval":
        """Student's t interval of an estimate."""
        half = float(student.ppf((1 + CONFIDENCE) / 2, variance.df)) * variance.value**0.5
        return cls(estimate - half, estimate + half)


@dataclass(frozen=True)
class Comparison:
    """A registered difference: the mean of some variants minus the mean of others, of one quantity.

    Attributes:
        label: name in tables and figures.
        plus, minus: names of the variants.
        quantity: the quantity to compare.
    """

    label: str
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    quantity: Quantity

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each variant's mean in the difference."""
        return dict.fromkeys(self.plus, 1 / len(self.plus)) | dict.fromkeys(self.minus, -1 / len(self.minus))


@dataclass
class ComparisonResult:
    """The result of a comparison. Differences, intervals and the MDE are in points.

    Attributes:
        comparison: the comparison.
        runs: number of runs of each variant.
        difference: between the means.
        over_images: 95 % interval over other images, for these trained models. None without bootstrap samples.
        over_trainings: 95 % interval over other trainings, on these images. None if a variant has a single run.
        joint: 95 % interval over both; that over trainings if there are no bootstrap samples.
        variance: of the difference, for the joint interval.
        complete: whether every variant has all seeds that the study registers.
        p: two-sided p-value of no difference, from the joint variance.
        adjusted_p: adjusted for all comparisons of the study that have a p-value.
        mde: minimum detectable effect: the difference that such a study finds with 80 % power at the strictest level of
            Holm's method.
    """

    comparison: Comparison
    runs: dict[str, int]
    difference: float
    over_images: Interval | None = None
    over_trainings: Interval | None = None
    joint: Interval | None = None
    variance: Variance | None = None
    complete: bool = False
    p: float | None = None
    adjusted_p: float | None = None
    mde: float | None = None

    def verdict(self, published: float) -> Verdict:
        """Whether the difference has the sign of a published one.

        `supported` or `contradicted` if every variant has all registered seeds, three or more, and the adjusted
        p-value is below 0.05; `inconclusive` otherwise.
        """
        enough = self.complete and min(self.runs.values()) >= ENOUGH_SEEDS
        if not enough or published == 0 or self.adjusted_p is None or self.adjusted_p >= 1 - CONFIDENCE:
            return "inconclusive"
        return "supported" if (self.difference > 0) == (published > 0) else "contradicted"


def compare(
    comparisons: Sequence[Comparison], measured: Measured, seeds: int, paired: bool = False
) -> list[ComparisonResult]:
    """Results of the comparisons of a study; those with a variant without results are left out.

    Args:
        comparisons: all comparisons that the study registers; their p-values are adjusted together.
        measured: the runs by name of the variant and seed.
        seeds: number of seeds that the study registers.
        paired: compare runs with the same seed, which share a start. Only seeds that all variants of a comparison have
            are used.

    Raises:
        UserError: the runs of a comparison were evaluated on different images.
    """
    results = []
    for comparison in comparisons:
        values = {name: comparison.quantity.by_seed(measured.get(name, {})) for name in comparison.weights}
        if paired:
            values = _common_seeds(values)
        if all(values.values()):
            results.append(_compare_one(comparison, values, measured, paired))
    for result in results:
        result.complete = min(result.runs.values()) >= seeds
    p_values = [result.p for result in results if result.p is not None]
    adjusted = iter(holm(p_values))
    for result in results:
        if result.p is not None and result.variance is not None:
            result.adjusted_p = next(adjusted)
            result.mde = minimum_detectable_effect(result.variance, (1 - CONFIDENCE) / len(p_values))
    return results


def _compare_one(
    comparison: Comparison, values: Mapping[str, Mapping[int, float]], measured: Measured, paired: bool
) -> ComparisonResult:
    """The result of a comparison of these values, by name of the variant and seed, before it is adjusted."""
    difference, runs = 0.0, {}
    for name, weight in comparison.weights.items():
        difference += weight * statistics.mean(values[name].values())
        runs[name] = [measured[name][seed] for seed in values[name]]
    result = ComparisonResult(comparison, {name: len(by_seed) for name, by_seed in values.items()}, difference)
    if min(result.runs.values()) > 1:
        result.variance = _variance_over_trainings(comparison.weights, values, paired)
        result.over_trainings = Interval.around(difference, result.variance)
    resampled = _resampled_difference(comparison, runs)
    if resampled is not None:
        tail = 100 * (1 - CONFIDENCE) / 2
        result.over_images = Interval(*np.nanpercentile(resampled, [tail, 100 - tail]).tolist())
        if result.variance is not None:
            over_images = float(np.nanvar(resampled))
            result.variance = Variance(result.variance.value + over_images, result.variance.df)
    if result.variance is not None:
        result.joint = Interval.around(difference, result.variance)
        result.p = _p_value(difference, result.variance)
    return result


def _p_value(difference: float, variance: Variance) -> float | None:
    """Two-sided p-value of a t-test; None without variance."""
    if variance.value <= 0:
        return None
    return float(2 * student.sf(abs(difference) / variance.value**0.5, variance.df))


def _common_seeds(values: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    """The values of the seeds that all variants have, in the order of the seeds."""
    common = sorted(set.intersection(*map(set, values.values()))) if values else []
    found = {}
    for name, by_seed in values.items():
        found[name] = {seed: by_seed[seed] for seed in common}
    return found


def _variance_over_trainings(
    weights: Mapping[str, float], values: Mapping[str, Mapping[int, float]], paired: bool
) -> Variance:
    """Variance of a weighted sum of means over seeds; paired, of the mean of the weighted sums of each seed."""
    if paired:
        sums = np.zeros(1)
        for name, weight in weights.items():
            sums = sums + weight * np.array(list(values[name].values()))
        return Variance(float(np.var(sums, ddof=1)) / len(sums), len(sums) - 1.0)
    parts = []
    for name, weight in weights.items():
        n = len(values[name])
        parts.append(Variance(weight**2 * statistics.variance(values[name].values()) / n, n - 1))
    return satterthwaite(parts)


def satterthwaite(parts: Sequence[Variance]) -> Variance:
    """Sum of independent estimated variances v with degrees of freedom f, with (Σv)² / Σ(v²/f) degrees of freedom.

    Satterthwaite, An approximate distribution of estimates of variance components, 1946.
    """
    total = sum(part.value for part in parts)
    below = sum(part.value**2 / part.df for part in parts if part.df > 0)
    return Variance(total, total**2 / below if below > 0 else 1.0)


def _resampled_difference(
    comparison: Comparison, runs: Mapping[str, Sequence[EvaluatedRun]]
) -> Float[np.ndarray, " resamples"] | None:
    """The difference on the bootstrap resamples, which are the same for all runs; None without them."""
    difference = np.zeros(1)
    digests = set()
    for name, weight in comparison.weights.items():
        resampled = []
        for run in runs[name]:
            values = comparison.quantity.resampled(run)
            if values is None or run.samples is None:
                return None
            resampled.append(values)
            digests.add(run.samples.images)
        difference = difference + weight * np.mean(np.stack(resampled), axis=0)
    if len(digests) > 1:
        raise UserError("these runs were evaluated on different images; evaluate them on the same split")
    return difference


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted for each other: the smallest of m is multiplied by m, the next by m − 1, and so on.

    Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    order = np.argsort(p)
    scaled = np.arange(len(p), 0, -1) * np.asarray(p, dtype=float)[order]
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted.tolist()


def minimum_detectable_effect(variance: Variance, level: float) -> float | None:
    """The difference that a two-sided t-test finds, with its sign, with 80 % power; None without variance.

    The test statistic has a noncentral t distribution; its noncentrality is the difference in standard errors.

    Args:
        variance: of the estimated difference.
        level: of the test.
    """
    if variance.value <= 0:
        return None
    critical = student.ppf(1 - level / 2, variance.df)
    return float(nctdtrinc(variance.df, 1 - POWER, critical) * variance.value**0.5)


def planned_mde(
    comparison: Comparison, seeds: int, deviation: float, comparisons: int, paired: bool = False
) -> float | None:
    """Minimum detectable effect of a planned comparison, without the variance over images; None for a single seed.

    Args:
        comparison: the comparison.
        seeds: number of runs of each variant.
        deviation: expected standard deviation over the trainings of a variant; if paired, without the part that the
            runs of a seed have in common.
        comparisons: number of comparisons whose p-values are adjusted together.
        paired: whether runs with the same seed are compared.
    """
    if seeds < 2:
        return None
    level = (1 - CONFIDENCE) / comparisons
    weights = np.array(list(comparison.weights.values()))[:, None]
    if paired:
        variance = Variance(deviation**2 * float((weights**2).sum()) / seeds, seeds - 1)
        return minimum_detectable_effect(variance, level)
    # Welch's degrees of freedom are estimated too, which costs power: simulate the variances of unit deviation
    random = np.random.default_rng(0)
    parts = weights**2 * random.chisquare(seeds - 1, (len(weights), SIMULATIONS)) / (seeds - 1) / seeds
    variance = parts.sum(0)
    df = variance**2 / (parts**2 / (seeds - 1)).sum(0)
    critical = student.ppf(1 - level / 2, df) * variance**0.5
    scatter = random.normal(0, (weights**2 / seeds).sum() ** 0.5, SIMULATIONS)
    return float(deviation * np.quantile(critical - scatter, POWER))


def pooled_deviation(values: Mapping[str, Mapping[int, float]], paired: bool) -> float | None:
    """Standard deviation over the trainings of a variant, pooled over the variants with two runs or more.

    Args:
        values: a quantity by name of the variant and seed.
        paired: leave out the part that the runs of a seed have in common: the residuals of a model with an effect of
            the variant and one of the seed, over the seeds that all these variants have.

    Returns:
        None if there are too few runs.
    """
    repeated = {name: by_seed for name, by_seed in values.items() if len(by_seed) > 1}
    if not paired:
        variances = [statistics.variance(by_seed.values()) for by_seed in repeated.values()]
        return statistics.mean(variances) ** 0.5 if variances else None
    table = np.array([list(by_seed.values()) for by_seed in _common_seeds(repeated).values()])
    if table.ndim < 2 or min(table.shape) < 2:
        return None
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    return float(((rest**2).sum() / ((table.shape[0] - 1) * (table.shape[1] - 1))) ** 0.5)
