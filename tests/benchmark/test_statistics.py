"""Intervals that cover, tests that agree with scipy's, and Holm's worked example."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from detente.benchmark.statistics import Estimate, bootstrap, holm, paired

EXPERIMENTS = 2000  # the coverage found is within 1.0 points (two standard errors) of the true one


def coverage(draw, seeds: int, mean: float) -> float:
    samples = draw(np.random.default_rng(5), (EXPERIMENTS, seeds))
    intervals = [Estimate(dict(enumerate(map(float, row)))).interval for row in samples]
    return sum(low <= mean <= high for low, high in intervals) / EXPERIMENTS


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 8])
def test_intervals_cover_the_true_mean_in_93_to_97_of_100_experiments(seeds):
    assert 0.93 <= coverage(lambda rng, size: rng.normal(3.0, 0.5, size), seeds, 3.0) <= 0.97


def test_no_interval_is_absurdly_wide_because_some_seeds_happen_to_agree():
    """As the studentised bootstrap's are: it gave .91 +- .17 for an accuracy that five seeds had within .02."""
    values = (0.9100, 0.9101, 0.9102, 0.9101, 0.9300)
    low, high = Estimate(dict(enumerate(values))).interval
    assert high - low < 6 * stats.sem(values)


def test_the_bootstrap_interval_follows_shifts_and_scales_exactly_as_a_mean_does():
    values = (0.3, 0.9, 0.4, 0.45, 0.7)
    low, high = bootstrap(values)
    moved = bootstrap([100 - 3 * value for value in values])
    assert moved == pytest.approx((100 - 3 * high, 100 - 3 * low), rel=1e-12)  # rounding
    assert low < np.mean(values) < high
    assert high - np.mean(values) > np.mean(values) - low  # the long tail is on the right
    assert bootstrap(values) == (low, high)


def test_resamples_of_six_and_more_are_drawn_alike_every_time():
    values = list(np.random.default_rng(1).normal(size=9))
    assert bootstrap(values) == bootstrap(values)


def test_values_that_agree_have_an_interval_of_no_width():
    assert bootstrap([0.5] * 5) == (0.5, 0.5)
    assert Estimate(dict.fromkeys(range(3), 0.25)).interval == (0.25, 0.25)


def test_two_and_three_seeds_have_students_interval():
    values = (0.91, 0.87, 0.94)
    estimate = Estimate(dict(enumerate(values)))
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert estimate.interval == pytest.approx(expected, rel=1e-12)  # summed in another order
    assert estimate.student() == estimate.interval


def test_one_seed_and_a_diverged_seed_have_no_interval():
    assert Estimate({0: 0.5}).interval is None
    assert Estimate({0: 0.5, 1: math.inf}).interval is None
    assert Estimate({0: 0.5}).half_width is None


@pytest.mark.parametrize("seed", range(5))
def test_the_paired_test_is_that_of_scipy(seed):
    one, other = np.random.default_rng(seed).normal([[0.0], [0.4]], 1.0, (2, 6))
    expected = stats.ttest_rel(one, other).pvalue
    found = paired(Estimate(dict(enumerate(map(float, one - other)))))
    assert found == pytest.approx(expected, rel=1e-10)  # the same formula, summed in another order


def test_differences_without_spread_are_certain():
    assert paired(Estimate({0: 0.5, 1: 0.5, 2: 0.5})) == 0.0
    assert paired(Estimate({0: 0.0, 1: 0.0})) == 1.0


def test_holms_correction_on_a_worked_example():
    # by hand: sorted, .005 x 4, .01 x 3, .03 x 2, and .04 x 1 raised to the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], rel=1e-12)
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_is_that_of_scipy_in_the_two_cases_it_shares():
    # with equal p-values Holm's first step is Bonferroni's; with one there is nothing to correct
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06] * 3)
    assert holm([0.02]) == [0.02]
