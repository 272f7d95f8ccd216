"""Differences between variants: against hand-worked cases, SciPy's tests and simulation."""

import numpy as np
import pytest
from scipy.stats import nct, ttest_ind, ttest_rel
from scipy.stats import t as student
from study_files import stage_ap

from dimaskdino.evaluation.bootstrap import BootstrapAP
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.studies.comparison import (
    Comparison,
    Quantity,
    Variance,
    _p_value,
    compare,
    first_at,
    minimum_detectable_effect,
    planned_mde,
    pooled_deviation,
)
from dimaskdino.studies.runs import EvaluatedRun
from dimaskdino.utils.errors import UserError

BOX = Quantity.parse("last.box")
B_MINUS_A = Comparison("B − A", ("b",), ("a",), BOX)


def run(ap, draws=None, images=200):
    """A run with this box AP at its only stage, and its bootstrap samples."""
    result = LayerwiseAP({"decoder.1": stage_ap(ap)}, images, "synthetic")
    return EvaluatedRun(result, None if draws is None else BootstrapAP("same", {"decoder.1/box": np.array(draws)}))


def runs(**values):
    """Runs with these box APs by name of the variant and seed."""
    return {name: {seed: run(ap) for seed, ap in enumerate(found)} for name, found in values.items()}


def test_two_variants_are_a_welch_test():
    a, b = [30.0, 34.0, 32.0, 33.0], [32.0, 41.0, 36.0]
    [found] = compare([B_MINUS_A], runs(a=a, b=b), seeds=3)
    expected = ttest_ind(b, a, equal_var=False)
    interval = expected.confidence_interval()
    assert found.difference == pytest.approx(np.mean(b) - np.mean(a))
    assert found.p == found.adjusted_p == pytest.approx(expected.pvalue)
    assert (found.joint.low, found.joint.high) == pytest.approx((interval.low, interval.high))
    assert found.joint == found.over_trainings
    assert found.over_images is None
    assert found.runs == {"b": 3, "a": 4}


def test_a_factor_of_a_two_by_two_by_hand():
    """Variances 1, 4, 9 and 16 and three runs each; weights ±1/2."""
    measured = runs(neither=[9, 10, 11], one=[18, 20, 22], other=[27, 30, 33], both=[41, 45, 49])
    factor = Comparison("one", ("one", "both"), ("neither", "other"), BOX)
    [found] = compare([factor], measured, seeds=3)
    assert found.difference == pytest.approx((20 - 10 + 45 - 30) / 2)
    variance = (1 + 4 + 9 + 16) / 3 / 4
    df = variance**2 / sum((v / 3 / 4) ** 2 / 2 for v in (1, 4, 9, 16))
    half = student.ppf(0.975, df) * variance**0.5
    assert (found.joint.low, found.joint.high) == pytest.approx((12.5 - half, 12.5 + half))


def test_variants_with_a_common_start_are_compared_in_pairs():
    """Differences of the seeds that both variants have: 1, 2 and 3."""
    measured = {
        "a": {seed: run(ap) for seed, ap in {0: 10, 1: 20, 2: 40, 3: 50}.items()},
        "b": {seed: run(ap) for seed, ap in {2: 43, 1: 22, 0: 11}.items()},
    }
    [found] = compare([B_MINUS_A], measured, seeds=3, paired=True)
    expected = ttest_rel([11, 22, 43], [10, 20, 40])
    interval = expected.confidence_interval()
    assert (found.difference, found.runs) == (pytest.approx(2), {"b": 3, "a": 3})
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.joint.low, found.joint.high) == pytest.approx((interval.low, interval.high))


def test_pairs_stay_pairs_where_a_run_has_no_value():
    """Seed 1 of b has no AP: the pairs are seeds 0 and 2, differences 1 and 3."""
    measured = runs(a=[10, 20, 40], b=[11, None, 43])
    [found] = compare([B_MINUS_A], measured, seeds=2, paired=True)
    assert (found.difference, found.runs) == (2, {"b": 2, "a": 2})
    assert found.p == pytest.approx(ttest_rel([11, 43], [10, 40]).pvalue)


def test_pooled_deviation():
    """Variances 1 and 9. In pairs, (0, 1, 2) and (0, 3, 6) without effects of variant and seed leave ±(1, 0, −1)."""
    values = {"a": {0: 0.0, 1: 1.0, 2: 2.0}, "b": {0: 0.0, 1: 3.0, 2: 6.0}, "c": {0: 5.0}}
    assert pooled_deviation(values, paired=False) == pytest.approx(((1 + 9) / 2) ** 0.5)
    assert pooled_deviation(values, paired=True) == pytest.approx((4 / 2) ** 0.5)
    under_way = {"a": values["a"] | {3: 9.0}, "b": values["b"]}  # seed 3 is not compared yet
    assert pooled_deviation(under_way, paired=True) == pytest.approx((4 / 2) ** 0.5)
    assert pooled_deviation({"c": {0: 5.0}}, paired=False) is None
    assert pooled_deviation({"a": values["a"]}, paired=True) is None
    effect = planned_mde(B_MINUS_A, seeds=6, deviation=1.5, comparisons=1, paired=True)
    draw = np.random.default_rng(5).normal(0, 1.5, size=(2, 6, 20_000))
    assert np.mean(ttest_rel(draw[0] + effect, draw[1]).pvalue < 0.05) == pytest.approx(0.8, abs=0.02)


def test_images_widen_the_joint_interval_by_their_variance():
    """Draws of the difference: −3, 0 and +3 around 4, variance 6; the degrees of freedom stay those over trainings."""
    measured = {
        "a": {0: run(9, [9, 9, 9], images=7), 1: run(11, [11, 11, 11], images=7)},
        "b": {0: run(13, [10, 13, 16], images=7), 1: run(15, [12, 15, 18], images=7)},
    }
    [found] = compare([B_MINUS_A], measured, seeds=2)
    trainings = 2 / 2 + 2 / 2
    # the two variants' variances of 1 have one degree of freedom each, their sum has two
    half = student.ppf(0.975, 2) * (trainings + 6) ** 0.5
    assert (found.joint.low, found.joint.high) == pytest.approx((4 - half, 4 + half))
    assert found.over_trainings.high - 4 == pytest.approx(student.ppf(0.975, 2) * trainings**0.5)
    assert (found.over_images.low, found.over_images.high) == pytest.approx((1.15, 6.85))


def test_p_values_are_adjusted_by_holm():
    measured = runs(a=[10, 11, 12], b=[20, 21, 22], c=[12, 13, 14], d=[11, 12, 13])
    comparisons = [Comparison(name, (name,), ("a",), BOX) for name in "bcd"]
    found = {c.comparison.label: c for c in compare(comparisons, measured, seeds=3)}
    p = [found[name].p for name in "bcd"]
    assert p == sorted(p)
    first, second = min(1, 3 * p[0]), min(1, 2 * p[1])
    assert [found[name].adjusted_p for name in "bcd"] == pytest.approx(
        [first, max(first, second), max(first, second, p[2])]
    )


@pytest.mark.parametrize(
    ("values", "seeds", "published", "expected"),
    [
        ({"a": [10, 11, 12], "b": [20, 21, 22]}, 3, 0.4, "supported"),
        ({"a": [10, 11, 12], "b": [20, 21, 22]}, 3, -0.4, "contradicted"),
        ({"a": [10, 11, 12], "b": [20, 21, 22]}, 3, 0.0, "inconclusive"),
        ({"a": [10, 11, 12], "b": [20, 21, 22]}, 4, 0.4, "inconclusive"),  # a seed is missing
        ({"a": [10, 11], "b": [20, 20.1]}, 2, 0.4, "inconclusive"),  # two seeds are never enough
        ({"a": [10, 11, 12], "b": [11, 12, 13]}, 3, 0.4, "inconclusive"),
        ({"a": [10, 11, 12], "b": [20]}, 1, 0.4, "inconclusive"),
    ],
)
def test_the_rule_of_verdicts(values, seeds, published, expected):
    [found] = compare([B_MINUS_A], runs(**values), seeds)
    assert found.verdict(published) == expected


def test_single_runs_have_a_difference_and_nothing_more():
    [found] = compare([B_MINUS_A], runs(a=[10, 11, 12], b=[20]), seeds=3)
    assert found.difference == 9
    assert (found.over_trainings, found.joint, found.p, found.adjusted_p, found.mde) == (None,) * 5
    assert compare([B_MINUS_A], runs(a=[10]), seeds=1) == []


def test_detectable_difference_is_found_four_times_of_five():
    effect = minimum_detectable_effect(Variance(0.8, 9.0), level=0.01)
    critical, shift = student.ppf(1 - 0.01 / 2, 9), effect / 0.8**0.5
    assert nct.sf(critical, 9, shift) + nct.cdf(-critical, 9, shift) == pytest.approx(0.8, abs=1e-6)
    assert minimum_detectable_effect(Variance(0.0, 9.0), 0.05) is None


def test_planned_power_holds_in_simulated_studies():
    effect = planned_mde(B_MINUS_A, seeds=5, deviation=1.5, comparisons=4)
    assert planned_mde(B_MINUS_A, seeds=1, deviation=1.5, comparisons=4) is None
    draw = np.random.default_rng(7).normal(0, 1.5, size=(2, 5, 20_000))
    p = ttest_ind(draw[0] + effect, draw[1], equal_var=False).pvalue
    assert np.mean(p < 0.05 / 4) == pytest.approx(0.8, abs=0.02)


def test_the_joint_interval_covers_trainings_and_images():
    """Simulated studies: the true difference is 2; runs scatter by 1, this draw of 100 images shifts b by σ = 1.

    An interval over trainings alone misses what the images do; the joint one covers as often as it says.
    """
    random = np.random.default_rng(1)
    covered = {"joint": 0, "over_trainings": 0}
    for _ in range(400):
        shift, resampled = random.normal(), random.normal(size=200)
        measured = {
            name: {
                seed: run(ap, ap + of_images * resampled, images=100)
                for seed, ap in enumerate(mean + of_images * shift + random.normal(size=5))
            }
            for name, mean, of_images in (("a", 10.0, 0.0), ("b", 12.0, 1.0))
        }
        [found] = compare([B_MINUS_A], measured, seeds=5)
        for name in covered:
            interval = getattr(found, name)
            covered[name] += interval.low < 2 < interval.high
    assert 0.93 < covered["joint"] / 400 < 0.985
    assert covered["over_trainings"] / 400 < 0.85


def test_a_value_is_read_where_the_ap_is_reached_first():
    points = [(0.0, 1.0), (20.0, 5.0), (40.0, 3.0), (30.0, -1.0), (50.0, -3.0)]
    assert first_at(points, 20) == 5
    assert first_at(points, 25) == pytest.approx(5 - 2 * 5 / 20)
    assert first_at(points, 35) == pytest.approx(5 - 2 * 15 / 20)  # not where it falls back, or rises again
    assert first_at(points, 45) == pytest.approx(-1 - 2 * 15 / 20)
    assert first_at(points, 51) is None
    assert first_at(points[1:], 10) is None  # reached before the first validation
    assert first_at([], 10) is None


def test_imbalance_at_equal_ap_by_hand():
    """In both variants the imbalance falls by 0.2 points per point of box AP, so it is equal at equal AP."""

    def trained(*boxes):
        during = tuple({"decoder.1": {"box": ap, "mask": 12 + 0.8 * ap}} for ap in boxes)
        return EvaluatedRun(run(boxes[-1]).result, validations=during)

    measured = {
        "a": {0: trained(0, 10, 30), 1: trained(0, 14, 34)},
        "b": {0: trained(0, 30, 50), 1: trained(0, 40, 60)},
    }
    imbalance = Quantity.parse("first.imbalance@25")
    assert imbalance == Quantity("first", "imbalance", 25)
    assert str(imbalance) == "first.imbalance@25"
    assert imbalance.label == "imbalance, first layer, at 25 box AP"
    for of_variant in measured.values():
        assert imbalance.by_seed(of_variant) == pytest.approx({0: 12 - 0.2 * 25, 1: 12 - 0.2 * 25})
    [found] = compare([Comparison("B − A", ("b",), ("a",), imbalance)], measured, seeds=2)
    assert found.difference == pytest.approx(0)
    assert found.over_images is None
    assert Quantity.parse("first.mask@25").by_seed(measured["a"]) == pytest.approx({0: 32, 1: 32})
    assert Quantity.parse("first.imbalance@32").by_seed(measured["a"]) == pytest.approx({1: 12 - 0.2 * 32})
    with pytest.raises(UserError, match=r"train\.validation\.stages="):
        imbalance.in_run(run(30))
    with pytest.raises(ValueError, match=r"STAGE\.imbalance@25"):
        Quantity.parse("first.imbalance@")


def test_few_seeds_give_no_more_false_positives_than_the_level():
    """No difference, five paired seeds; the images add as much variance as the trainings."""
    random = np.random.default_rng(0)
    n, draws = 5, 4000
    trainings, images = random.normal(0, 1, (draws, n)), random.normal(0, (1 / n) ** 0.5, draws)
    found = 0
    for sample, shift in zip(trainings, images, strict=True):
        variance = Variance(float(sample.var(ddof=1)) / n + 1 / n, n - 1.0)
        found += _p_value(float(sample.mean() + shift), variance) < 0.0056
    assert found / draws <= 0.0056 + 3 * (0.0056 / draws) ** 0.5
