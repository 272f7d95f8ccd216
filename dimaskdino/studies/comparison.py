"""Two variants of a model compared: what they differ by, and how sure that is."""

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
Verdict = Literal["yes", "no", "cannot tell"]


@dataclass(frozen=True)
class Quantity:
    """One number of a layer-wise result.

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
            raise ValueError(f"'{text}' is no quantity; write STAGE.box, STAGE.mask or STAGE.imbalance, as in last.box")
        return cls(stage, what)

    def __str__(self) -> str:
        return f"{self.stage}.{self.what}"

    @property
    def label(self) -> str:
        """For tables and figures."""
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

    def drawn(self, measurement: "Measurement") -> Float[np.ndarray, " draws"] | None:
        """Its value on redrawn images; None where nobody has drawn."""
        if measurement.samples is None:
            return None
        name, samples = self.stage_in(measurement.result), measurement.samples.samples
        parts = [samples.get(f"{name}/{kind}") for kind in ("box", "mask")]
        if self.what == "imbalance":
            return None if parts[0] is None or parts[1] is None else parts[1] - parts[0]
        return parts[0] if self.what == "box" else parts[1]


@dataclass(frozen=True)
class Measurement:
    """What was measured of one trained model: AP at every stage, and on redrawn images if they were drawn."""

    result: LayerwiseAP
    samples: BootstrapAP | None = None

    @classmethod
    def load(cls, run: Path) -> "Measurement":
        """From a run folder that was evaluated.

        Raises:
            UserError: it was not, or the files are something else.
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
        """1 or −1 if all of it lies on one side of 0, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Difference:
    """How much larger a quantity is in one variant than in another.

    Attributes:
        by_seed: one minus the other, for each seed that both have.
        over_images: where the mean lies on other images, for these very models: paired bootstrap. None without samples.
        over_seeds: where it lies for other trainings, on these very images: Student's t over the seeds' differences.
            None for a single seed.
    """

    by_seed: dict[int, float]
    over_images: Interval | None
    over_seeds: Interval | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.by_seed.values())

    def agrees(self, published: float) -> Verdict:
        """Whether it has the published difference's sign.

        With fewer than three seeds, or where an interval contains 0, that cannot be told.
        """
        signs = {i.sign for i in (self.over_images, self.over_seeds) if i is not None}
        if len(self.by_seed) < ENOUGH_SEEDS or len(signs) != 1 or 0 in signs or published == 0:
            return "cannot tell"
        return "yes" if signs == {1 if published > 0 else -1} else "no"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"mean": self.mean}


def difference(
    of: Mapping[int, Measurement], against: Mapping[int, Measurement], quantity: Quantity
) -> Difference | None:
    """Compare two variants by the seeds that both have; None if there is no such seed or no such number.

    Args:
        of: the one variant, by seed.
        against: the other one.
        quantity: what to compare.

    Raises:
        UserError: the samples of a pair are of different images.
    """
    pairs = {seed: (of[seed], against[seed]) for seed in of if seed in against}
    values = {seed: (quantity.of(a.result), quantity.of(b.result)) for seed, (a, b) in pairs.items()}
    by_seed = {seed: a - b for seed, (a, b) in values.items() if a is not None and b is not None}
    if not by_seed:
        return None
    return Difference(by_seed, _over_images([pairs[seed] for seed in by_seed], quantity), _over_seeds(by_seed.values()))


def _over_images(pairs: Sequence[tuple[Measurement, Measurement]], quantity: Quantity) -> Interval | None:
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
