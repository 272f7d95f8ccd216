"""Comparison of two variants of a model: their difference, with intervals."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

from dimaskdino.errors import UserError
from dimaskdino.evaluation.bootstrap import CONFIDENCE, BootstrapAP
from dimaskdino.evaluation.layerwise_ap import FIRST_LAYER, LayerwiseAP

ENOUGH_SEEDS = 3
Agreement = Literal["yes", "no", "cannot tell"]


@dataclass(frozen=True)
class Quantity:
    """One quantity of a layer-wise result.

    Attributes:
        stage: `first` or `last` for those decoder layers, or a stage's name.
        what: box AP, mask AP, or the imbalance `AP_mask − AP_box`, in percent.
    """

    stage: str
    what: Literal["box", "mask", "imbalance"]

    @classmethod
    def parse(cls, text: str) -> "Quantity":
        """From `last.box`, `first.imbalance`, `decoder.0.mask`.

        Raises:
            ValueError: something else.
        """
        stage, _, what = text.rpartition(".")
        if not stage or what not in ("box", "mask", "imbalance"):
            raise ValueError(
                f"'{text}' is no quantity; expected STAGE.box, STAGE.mask or STAGE.imbalance, such as last.box"
            )
        return cls(stage, what)

    def __str__(self) -> str:
        return f"{self.stage}.{self.what}"

    @property
    def label(self) -> str:
        """Label for tables and figures."""
        what = {"box": "box AP", "mask": "mask AP", "imbalance": "mask − box"}[self.what]
        return f"{what}, {self.stage} layer" if self.stage in ("first", "last") else f"{what}, {self.stage}"

    def stage_in(self, result: LayerwiseAP) -> str:
        """The name of its stage in a result."""
        return {"first": FIRST_LAYER, "last": next(reversed(result.stages))}.get(self.stage, self.stage)

    def of(self, result: LayerwiseAP) -> float | None:
        """Its value; None where the stage has none.

        Raises:
            UserError: the stage was not evaluated.
        """
        name = self.stage_in(result)
        if name not in result.stages:
            raise UserError(f"{result.source}: {name} was not evaluated, only {', '.join(result.stages)}")
        stage = result.stages[name]
        if self.what == "imbalance":
            return stage.imbalance
        found = getattr(stage, self.what)
        return None if found is None else found.AP

    def drawn(self, run: "EvaluatedRun") -> Float[np.ndarray, " draws"] | None:
        """Its value on the bootstrap resamples; None without them."""
        if run.samples is None:
            return None
        name, samples = self.stage_in(run.result), run.samples.samples
        parts = [samples.get(f"{name}/{kind}") for kind in ("box", "mask")]
        if self.what == "imbalance":
            return None if parts[0] is None or parts[1] is None else parts[1] - parts[0]
        return parts[0] if self.what == "box" else parts[1]


@dataclass(frozen=True)
class EvaluatedRun:
    """The evaluation of one trained model: AP at every stage, and its bootstrap samples if there are any."""

    result: LayerwiseAP
    samples: BootstrapAP | None = None

    @classmethod
    def load(cls, run: Path) -> "EvaluatedRun":
        """From a run folder that was evaluated.

        Raises:
            UserError: the run was not evaluated, or the files are something else.
        """
        draws = run / "evaluation" / "bootstrap.npz"
        return cls(
            LayerwiseAP.load(run / "evaluation" / "layers.json"), BootstrapAP.load(draws) if draws.exists() else None
        )


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or −1 if the interval lies on one side of 0, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Difference:
    """Difference of a quantity between two variants.

    Attributes:
        by_seed: the difference for each common seed.
        over_images: interval of the mean over images, for these models: paired bootstrap. None without samples.
        over_seeds: interval of the mean over trainings, on these images: Student's t over the differences of the seeds.
            None for a single seed.
    """

    by_seed: dict[int, float]
    over_images: Interval | None
    over_seeds: Interval | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.by_seed.values())

    def agrees(self, published: float) -> Agreement:
        """Whether the difference has the sign of the published one.

        The answer is "cannot tell" with fewer than three seeds, or if an interval contains 0.
        """
        signs = {i.sign for i in (self.over_images, self.over_seeds) if i is not None}
        if len(self.by_seed) < ENOUGH_SEEDS or len(signs) != 1 or 0 in signs or published == 0:
            return "cannot tell"
        return "yes" if signs == {1 if published > 0 else -1} else "no"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"mean": self.mean}


def difference(
    of: Mapping[int, EvaluatedRun], against: Mapping[int, EvaluatedRun], quantity: Quantity
) -> Difference | None:
    """Difference between two variants over their common seeds; None without common seeds or values.

    Args:
        of: results of the variant, by seed.
        against: results of the variant that it is compared with.
        quantity: the quantity to compare.

    Raises:
        UserError: the samples of a pair are of different images.
    """
    pairs = {seed: (of[seed], against[seed]) for seed in of if seed in against}
    values = {seed: (quantity.of(a.result), quantity.of(b.result)) for seed, (a, b) in pairs.items()}
    by_seed = {seed: a - b for seed, (a, b) in values.items() if a is not None and b is not None}
    if not by_seed:
        return None
    return Difference(by_seed, _over_images([pairs[seed] for seed in by_seed], quantity), _over_seeds(by_seed.values()))


def _over_images(pairs: Sequence[tuple[EvaluatedRun, EvaluatedRun]], quantity: Quantity) -> Interval | None:
    drawn = [(quantity.drawn(a), quantity.drawn(b)) for a, b in pairs]
    if any(a is None or b is None for a, b in drawn):
        return None
    if len({m.samples.images for pair in pairs for m in pair if m.samples is not None}) > 1:
        raise UserError("these runs were evaluated on different images; evaluate them on the same split")
    mean = np.mean([a - b for a, b in drawn], axis=0)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(mean, [tail, 100 - tail])
    return Interval(float(low), float(high))


def _over_seeds(differences: Sequence[float] | Any) -> Interval | None:
    values = list(differences)
    if len(values) < 2:
        return None
    half = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return Interval(mean - half, mean + half)
