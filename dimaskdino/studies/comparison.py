"""ComparisonResult of variants of a model: differences between means of runs, with intervals, tests and power.

A measured AP is one of many: another seed would have given another model, another draw of images another AP. The joint
interval of a difference counts both. Its variance is the sum of

* the variance over trainings, estimated in each row on its own, since rows scatter differently (Welch 1947), or, where
  the rows of a seed share a start, that of the differences of the seeds: starts and seeds are then random blocks, and
* the variance over images of these models, from the paired bootstrap (`evaluation.bootstrap`),

with the degrees of freedom of Satterthwaite (1946). What varies between trainings of one model, and why single runs
decide nothing: Bouthillier et al., Accounting for Variance in Machine Learning Benchmarks, MLSys 2021. The p-values of
all comparisons that a study registers are adjusted together (Holm 1979).
"""

import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy.special import nctdtrinc
from scipy.stats import t as student

from dimaskdino.evaluation.bootstrap import CONFIDENCE
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.modeling.stages import FIRST_LAYER
from dimaskdino.studies.runs import EvaluatedRun
from dimaskdino.utils.errors import UserError

ENOUGH_SEEDS = 3
POWER = 0.8
SIMULATIONS = 20_000
Verdict = Literal["supported", "contradicted", "inconclusive"]
Measured = Mapping[str, Mapping[int, EvaluatedRun]]  # runs by row and seed


@dataclass(frozen=True)
class Quantity:
    """One quantity of a layer-wise result.

    Attributes:
        stage: `first` or `last` for those decoder layers, or a stage's name.
        metric: box AP, mask AP, or the imbalance `AP_mask − AP_box`, in percent.
        at: read where the box AP of the stage first reaches this value during the training, between validations; None
            after the training. Models are then compared at equal AP, as a higher one narrows the imbalance by itself.
    """

    stage: str
    metric: Literal["box", "mask", "imbalance"]
    at: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Quantity":
        """From `last.box`, `first.imbalance`, `decoder.0.mask`, `first.imbalance@25`.

        Raises:
            ValueError: something else.
        """
        match = re.fullmatch(r"(.+)\.(box|mask|imbalance)(?:@(\d+(?:\.\d+)?))?", text)
        if match is None:
            raise ValueError(
                f"'{text}' is no quantity; expected STAGE.box, STAGE.mask or STAGE.imbalance, such as last.box, or "
                "with a box AP of the stage at which it is read, such as first.imbalance@25"
            )
        return cls(match[1], match[2], None if match[3] is None else float(match[3]))

    def __str__(self) -> str:
        return f"{self.stage}.{self.metric}" + ("" if self.at is None else f"@{self.at:g}")

    @property
    def label(self) -> str:
        """Label for tables and figures."""
        what = {"box": "box AP", "mask": "mask AP", "imbalance": "imbalance"}[self.metric]
        where = f"{self.stage} layer" if self.stage in ("first", "last") else self.stage
        return f"{what}, {where}" + ("" if self.at is None else f", at {self.at:g} box AP")

    def stage_in(self, result: LayerwiseAP) -> str:
        """The name of its stage in a result."""
        return {"first": FIRST_LAYER, "last": next(reversed(result.stages))}.get(self.stage, self.stage)

    def in_run(self, run: EvaluatedRun) -> float | None:
        """Its value in a run; None where the stage has none, or did not reach the AP at which it is read.

        Raises:
            UserError: the stage was not evaluated, or not scored during the training.
        """
        if self.at is None:
            return self.of(run.result)
        name = self.stage_in(run.result)
        scored = [scores[name] for scores in run.validations if name in scores]
        if not scored:
            raise UserError(
                f"{run.result.source}: '{self}' needs AP of {name} during the training; train with "
                f"train.validation.every=100 'train.validation.stages=[{name}]'"
            )
        values = [
            (ap["box"], ap["mask"] - ap["box"] if self.metric == "imbalance" else ap[self.metric])
            for ap in scored
            if ap["box"] is not None and (self.metric == "box" or ap["mask"] is not None)
        ]
        return first_at(values, self.at)

    def of(self, result: LayerwiseAP) -> float | None:
        """Its value; None where the stage has none.

        Raises:
            UserError: the stage was not evaluated.
        """
        name = self.stage_in(result)
        if name not in result.stages:
            raise UserError(f"{result.source}: {name} was not evaluated, only {', '.join(result.stages)}")
        stage = result.stages[name]
        if self.metric == "imbalance":
            return stage.imbalance
        found = getattr(stage, self.metric)
        return None if found is None else found.AP

    def by_seed(self, runs: Mapping[int, EvaluatedRun]) -> dict[int, float]:
        """Its value in each run that has one."""
        values = {seed: self.in_run(run) for seed, run in runs.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def drawn(self, run: EvaluatedRun) -> Float[np.ndarray, " draws"] | None:
        """Its value on the bootstrap resamples; None without them, and for values during the training."""
        if run.samples is None or self.at is not None:
            return None
        name, samples = self.stage_in(run.result), run.samples.samples
        parts = [samples.get(f"{name}/{kind}") for kind in ("box", "mask")]
        if self.metric == "imbalance":
            return None if parts[0] is None or parts[1] is None else parts[1] - parts[0]
        return parts[0] if self.metric == "box" else parts[1]


def first_at(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The second value where the first reaches x for the first time, linear between points; None if it never does.

    None also if the first point lies above x: what happened before it is not known.
    """
    for (before, y0), (after, y1) in itertools.pairwise(points):
        if before <= x <= after:
            return y0 if after == before else y0 + (y1 - y0) * (x - before) / (after - before)
    return None


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float

    @classmethod
    def around(cls, estimate: float, variance: float, df: float) -> "Interval":
        """Student's t interval of an estimate with this variance and these degrees of freedom."""
        half = float(student.ppf((1 + CONFIDENCE) / 2, df)) * variance**0.5
        return cls(estimate - half, estimate + half)


@dataclass(frozen=True)
class Comparison:
    """A difference that a study registers: the mean of some rows minus the mean of others, of one quantity.

    Attributes:
        label: for people.
        plus, minus: names of the rows.
        quantity: what is compared.
    """

    label: str
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    quantity: Quantity

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each row's mean."""
        return {name: 1 / len(self.plus) for name in self.plus} | {name: -1 / len(self.minus) for name in self.minus}


@dataclass(frozen=True)
class ComparisonResult:
    """A comparison as measured.

    Attributes:
        comparison: what was compared.
        runs: number of runs of each row in it.
        difference: between the means, in points.
        over_images: 95 % interval over other images, for these models. None without bootstrap samples.
        over_trainings: 95 % interval over other trainings, on these images. None if a row has a single run.
        joint: 95 % interval over both; that over trainings alone without bootstrap samples.
        p: of no difference, two-sided, by the joint variance.
        adjusted_p: Holm's, among all comparisons of the study that can be tested.
        mde: the difference that 80 % of such studies would find at Holm's strictest level.
        complete: whether every row has the number of seeds that the study registers.
    """

    comparison: Comparison
    runs: dict[str, int]
    difference: float
    over_images: Interval | None
    over_trainings: Interval | None
    joint: Interval | None
    p: float | None
    adjusted_p: float | None
    mde: float | None
    complete: bool

    def verdict(self, published: float) -> Verdict:
        """Whether the difference has the sign of a published one.

        `supported` or `contradicted` if every variant has all registered seeds, three or more, and the adjusted
        p-value is below 0.05; `inconclusive` otherwise.
        """
        decided = self.adjusted_p is not None and self.adjusted_p < 1 - CONFIDENCE
        if not decided or not self.complete or min(self.runs.values()) < ENOUGH_SEEDS or published == 0:
            return "inconclusive"
        return "supported" if (self.difference > 0) == (published > 0) else "contradicted"

    def to_json(self) -> dict[str, Any]:
        about = {
            "label": self.comparison.label,
            "plus": self.comparison.plus,
            "minus": self.comparison.minus,
            "quantity": str(self.comparison.quantity),
        }
        return about | {key: value for key, value in asdict(self).items() if key != "comparison"}


def compare(
    comparisons: Sequence[Comparison], measured: Measured, seeds: int, paired: bool = False
) -> list[ComparisonResult]:
    """The comparisons of a study as measured; those with a row without results are left out.

    Args:
        comparisons: all comparisons that the study registers; they are adjusted for each other.
        measured: the runs by row and seed.
        seeds: number of seeds that the study registers.
        paired: compare runs with the same seed, which share a start; seeds that some row of a comparison lacks are left
            out.

    Raises:
        UserError: the runs of a comparison were evaluated on different images.
    """
    estimates = [found for comparison in comparisons if (found := _estimate(comparison, measured, paired)) is not None]
    tested = [estimate.p for estimate in estimates if estimate.p is not None]
    adjusted = iter(holm(tested))
    level = (1 - CONFIDENCE) / max(1, len(tested))
    return [
        ComparisonResult(
            comparison=e.comparison,
            runs=e.runs,
            difference=e.difference,
            over_images=e.over_images,
            over_trainings=None if e.trainings is None else Interval.around(e.difference, *e.trainings),
            joint=None if e.joint is None else Interval.around(e.difference, *e.joint),
            p=e.p,
            adjusted_p=None if e.p is None else next(adjusted),
            mde=None if e.joint is None else minimum_detectable_effect(*e.joint, level),
            complete=all(n >= seeds for n in e.runs.values()),
        )
        for e in estimates
    ]


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted for each other: Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979."""
    order = np.argsort(p)
    scaled = np.arange(len(p), 0, -1) * np.asarray(p, dtype=float)[order]
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted.tolist()


def minimum_detectable_effect(variance: float, df: float, level: float) -> float | None:
    """The difference that a two-sided t-test finds, with its sign, with 80 % power; None without scatter.

    Args:
        variance: of the estimated difference.
        df: its degrees of freedom.
        level: of the test.
    """
    if variance <= 0:
        return None
    critical = student.ppf(1 - level / 2, df)
    return float(nctdtrinc(df, 1 - POWER, critical) * variance**0.5)  # the noncentrality is the effect in errors


def planned_mde(
    comparison: Comparison, seeds: int, deviation: float, comparisons: int, paired: bool = False
) -> float | None:
    """The difference that a planned study finds with 80 % power, its images aside.

    Args:
        comparison: the comparison.
        seeds: number of runs of each row; None is returned for a single one.
        deviation: expected standard deviation over the trainings of a row; paired, without what a seed has in common.
        comparisons: number of comparisons that are adjusted together.
        paired: whether runs with the same seed are compared.
    """
    if seeds < 2:
        return None
    level = (1 - CONFIDENCE) / comparisons
    if paired:
        variance = deviation**2 * sum(weight**2 for weight in comparison.weights.values()) / seeds
        return minimum_detectable_effect(variance, seeds - 1, level)
    # simulated, since the estimated variances of few runs cost more power than a t-test with known degrees of freedom
    random, weights = np.random.default_rng(0), np.array(list(comparison.weights.values()))[:, None]
    shares = weights**2 * random.chisquare(seeds - 1, (len(weights), SIMULATIONS)) / (seeds - 1) / seeds
    variance = shares.sum(0)
    df = variance**2 / (shares**2 / (seeds - 1)).sum(0)
    critical = student.ppf(1 - level / 2, df) * variance**0.5
    scatter = random.normal(0, (weights**2 / seeds).sum() ** 0.5, SIMULATIONS)
    return float(deviation * np.quantile(critical - scatter, POWER))


def pooled_deviation(values: Mapping[str, Mapping[int, float]], paired: bool) -> float | None:
    """Standard deviation over the trainings of a row, pooled over the rows; None if no row has two runs.

    Args:
        values: by row and seed.
        paired: without what the runs of a seed have in common; of the seeds that all these rows have.
    """
    rows = [dict(found) for found in values.values() if len(found) > 1]
    if paired:
        common = sorted(set.intersection(*map(set, rows))) if rows else []
        if len(rows) < 2 or len(common) < 2:
            return None
        table = np.array([[found[seed] for seed in common] for found in rows])
        rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
        return float(((rest**2).sum() / ((len(rows) - 1) * (len(common) - 1))) ** 0.5)
    return statistics.mean(statistics.variance(f.values()) for f in rows) ** 0.5 if rows else None


@dataclass(frozen=True)
class _Estimate:
    """A difference with its variances and their degrees of freedom, over trainings and in all."""

    comparison: Comparison
    runs: dict[str, int]
    difference: float
    over_images: Interval | None
    trainings: tuple[float, float] | None
    joint: tuple[float, float] | None

    @property
    def p(self) -> float | None:
        if self.joint is None:
            return None
        variance, df = self.joint
        return float(2 * student.sf(abs(self.difference) / variance**0.5, df)) if variance > 0 else None


def _estimate(comparison: Comparison, measured: Measured, paired: bool) -> _Estimate | None:
    values = {name: comparison.quantity.by_seed(measured.get(name, {})) for name in comparison.weights}
    if paired:
        common = sorted(set.intersection(*map(set, values.values())))
        values = {name: {seed: found[seed] for seed in common} for name, found in values.items()}
    if not all(values.values()):
        return None
    runs = {name: [measured[name][seed] for seed in found] for name, found in values.items()}
    weights = comparison.weights
    difference = sum(weights[name] * statistics.mean(found.values()) for name, found in values.items())
    trainings = None
    if all(len(found) > 1 for found in values.values()):
        if paired:
            of_seeds = sum(weights[name] * np.array(list(found.values())) for name, found in values.items())
            trainings = float(np.var(of_seeds, ddof=1)) / len(of_seeds), len(of_seeds) - 1.0
        else:
            trainings = _satterthwaite(
                [
                    (weights[name] ** 2 * statistics.variance(found.values()) / len(found), len(found) - 1)
                    for name, found in values.items()
                ]
            )
    joint, over_images, drawn = trainings, None, _drawn(comparison, runs)
    if drawn is not None:
        tail = 100 * (1 - CONFIDENCE) / 2
        over_images = Interval(*(float(x) for x in np.nanpercentile(drawn, [tail, 100 - tail])))
        if trainings is not None:
            images = next(iter(runs.values()))[0].result.images
            joint = _satterthwaite([trainings, (float(np.nanvar(drawn)), images - 1)])
    return _Estimate(comparison, {n: len(v) for n, v in values.items()}, difference, over_images, trainings, joint)


def _satterthwaite(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Sum of independent variances with these degrees of freedom, and its degrees of freedom."""
    total = sum(variance for variance, _ in parts)
    below = sum(variance**2 / df for variance, df in parts if df > 0)
    return total, (total**2 / below if below > 0 else 1.0)


def _drawn(comparison: Comparison, runs: Mapping[str, Sequence[EvaluatedRun]]) -> Float[np.ndarray, " draws"] | None:
    """The difference on the bootstrap resamples, which are the same for all runs; None without them."""
    drawn = {name: [comparison.quantity.drawn(run) for run in rows] for name, rows in runs.items()}
    if any(samples is None for found in drawn.values() for samples in found):
        return None
    if len({run.samples.images for rows in runs.values() for run in rows if run.samples is not None}) > 1:
        raise UserError("these runs were evaluated on different images; evaluate them on the same split")
    return sum(comparison.weights[name] * np.mean(np.stack(found), axis=0) for name, found in drawn.items())  # type: ignore[arg-type]


def correlation_of_pairs(of: Mapping[int, float], against: Mapping[int, float]) -> float | None:
    """Correlation of two rows' values over their common seeds; None with fewer than three.

    Runs that share a seed see the same images in the same order. Only if that correlates their results does a
    comparison by pairs scatter less than one of means.
    """
    common = sorted(set(of) & set(against))
    if len(common) < ENOUGH_SEEDS:
        return None
    return statistics.correlation([of[seed] for seed in common], [against[seed] for seed in common])


def slope_within_variants(measured: Measured, of: Quantity, over: Quantity) -> float | None:
    """How much one quantity changes with another among runs of the same row, pooled over the rows.

    With it a difference between rows can be compared with the part that a higher AP alone would bring (analysis of
    covariance with a common slope; Fisher, Statistical Methods for Research Workers, 1932, section 49.1).

    Args:
        measured: the runs by row and seed.
        of: the quantity that may depend on the other.
        over: the quantity that it may depend on.

    Returns:
        Points of `of` per point of `over`; None if `over` does not vary within any row.
    """
    products = squares = 0.0
    for runs in measured.values():
        pairs = [(over.in_run(run), of.in_run(run)) for run in runs.values()]
        x, y = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
        products += float(((x - x.mean()) * (y - y.mean())).sum())
        squares += float(((x - x.mean()) ** 2).sum())
    return products / squares if squares > 0 else None
