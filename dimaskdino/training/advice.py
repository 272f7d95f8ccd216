"""Advice during a training: a learning rate that is too high, and overfitting.

The rules, each reported once per training:

* The learning rate is too high: after the warm-up, the mean loss of the last `WINDOW` records is more than `RISE` times
  the lowest mean of `WINDOW` records before them.
* Overfitting: `VALIDATIONS` validations in a row were worse than the best one, the last by more than `DROP` of its
  score, while the mean loss since then is lower than that of as many records before it.

`dimaskdino.data.check.advice` reports at the start what depends on the data alone, such as classes without examples.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dimaskdino.training.validation import score_of

WINDOW = 20
RISE = 1.5
VALIDATIONS = 3
DROP = 0.05


class Adviser:
    """Reads the records of a training as they are written.

    Args:
        warmup: steps of the warm-up, whose losses are ignored.
        records: those of the run so far, when it resumes.
    """

    def __init__(self, warmup: int, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.warmup = warmup
        self.losses: list[tuple[int, float]] = []  # step, loss
        self.validations: list[tuple[int, float]] = []  # step, score
        self.reported: set[str] = set()
        for record in records:
            self.see(record)

    def see(self, record: Mapping[str, Any]) -> list[str]:
        """Take a record and return new advice."""
        step = record["step"]
        said = []
        if "loss" in record and step > self.warmup:
            self.losses.append((step, record["loss"]))
            said.append(("rate", self._rate()))
        if "validation" in record:
            self.validations.append((step, score_of(record["validation"])))
            said.append(("overfitting", self._overfitting()))
        texts = []
        for kind, text in said:
            if text and kind not in self.reported:
                self.reported.add(kind)
                texts.append(text)
        return texts

    def _rate(self) -> str | None:
        values = np.array([loss for _, loss in self.losses])
        if len(values) < 2 * WINDOW:
            return None
        means = np.convolve(values, np.full(WINDOW, 1 / WINDOW), "valid")
        now, lowest = means[-1], means[:-WINDOW].min()
        if now <= RISE * lowest:
            return None
        return (
            f"the mean loss has risen from {lowest:.1f} to {now:.1f}: the learning rate is probably too high. Stop, "
            "and run the same command with a third of optimizer.lr"
        )

    def _overfitting(self) -> str | None:
        best_step, best = max(self.validations, key=lambda found: found[1])
        since = [score for step, score in self.validations if step > best_step]
        if len(since) < VALIDATIONS or best <= 0 or since[-1] > (1 - DROP) * best:
            return None
        after = [loss for step, loss in self.losses if step > best_step]
        before = [loss for step, loss in self.losses if step <= best_step][-len(after) :]
        if not after or not before or np.mean(after) >= np.mean(before):
            return None
        return (
            f"the validation has been worse than at step {best_step} for {len(since)} times while the loss falls: the "
            "model overfits. best.safetensors has the weights of that step; more variety (data.augmentation=strong, "
            "data.copy_paste=0.5), fewer steps or train.validation.patience help"
        )
