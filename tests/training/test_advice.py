"""What a training says about itself, on losses and validations made by hand."""

import math

from dimaskdino.training.advice import WINDOW, Adviser


def said(records: list[dict], warmup: int = 0) -> list[tuple[int, str]]:
    adviser = Adviser(warmup)
    return [(record["step"], text) for record in records for text in adviser.see(record)]


def losses(values, first: int = 1) -> list[dict]:
    return [{"step": first + i, "loss": value} for i, value in enumerate(values)]


def validation(step: int, ap: float) -> dict:
    return {"step": step, "validation": {"box_AP": ap, "mask_AP": ap, "images": 4}}


def test_a_falling_loss_needs_no_advice():
    noisy = [100 / (1 + i / 50) * (1 + 0.4 * math.sin(i)) for i in range(400)]
    assert said(losses(noisy)) == []


def test_a_rising_loss_is_told_once_and_only_after_the_warmup():
    values = [100 - i for i in range(60)] + [41 + 2 * i for i in range(100)]
    told = said(losses(values))
    assert len(told) == 1
    assert "learning rate" in told[0][1]
    assert 60 + WINDOW / 2 < told[0][0] < 120
    assert said(losses(values), warmup=160) == []


def test_overfitting_needs_a_falling_loss_and_worse_validations():
    records = []
    for part, ap in enumerate((10, 20, 30, 29, 27, 25)):
        records += [*losses([100 - 10 * part] * 10, 1 + 10 * part), validation(10 + 10 * part, ap)]
    told = said(records)
    assert [step for step, _ in told] == [60]
    assert "step 30 for 3 times" in told[0][1]
    flat = [r | {"loss": 50.0} if "loss" in r else r for r in records]
    assert said(flat) == []
    slightly_worse = [r if "loss" in r or r["step"] <= 30 else validation(r["step"], 29.5) for r in records]
    assert said(slightly_worse) == []


def test_a_resumed_run_does_not_repeat_itself():
    records = losses([10.0] * 40 + [30.0] * 40)
    assert len(said(records)) == 1
    assert Adviser(0, records[:70]).see(records[70]) == []
