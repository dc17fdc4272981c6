"""Intervals against scipy and brute force, verdicts by rule, calibration on probabilities whose error is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from lego.report.stats import (
    Interval,
    bootstrap_coverage,
    bootstrap_ppl_difference,
    calibration_error,
    fit_temperature,
    mean_interval,
    verdict,
    with_temperature,
)

VALUES = [3.0, 4.5, 2.5, 4.0, 3.5]


def test_the_interval_is_students():
    found = mean_interval(VALUES)
    expected = reference.ttest_1samp(VALUES, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == 3.5


def test_one_value_has_no_interval_and_none_is_an_error():
    assert math.isnan(mean_interval([2.0]).low)
    assert f"{mean_interval([2.0]):.2f}" == "2.00"
    assert f"{Interval(1, -1, 3):+.1f}" == "+1.0 [-1.0, +3.0]"
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    intervals = [mean_interval(generator.normal(2, 1, size=5).tolist()) for _ in range(2000)]
    assert np.mean([one.low <= 2 <= one.high for one in intervals]) == pytest.approx(0.95, abs=0.015)


def test_the_bootstrap_is_that_of_a_loop():
    generator = np.random.default_rng(1)
    tokens, nll = generator.integers(50, 500, size=9), generator.uniform(2, 4, size=(3, 9))
    a, b = nll * tokens, (nll + generator.normal(0.1, 0.2, size=(3, 9))) * tokens
    found = bootstrap_ppl_difference(a, b, tokens, draws=4000, seed=5)
    draws = []
    for weights in np.random.default_rng(5).multinomial(9, np.full(9, 1 / 9), size=4000):
        total = sum(weights * tokens)
        by_seed = [math.exp(sum(weights * a[s]) / total) - math.exp(sum(weights * b[s]) / total) for s in range(3)]
        draws.append(sum(by_seed) / 3)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    whole = [math.exp(a[s].sum() / tokens.sum()) - math.exp(b[s].sum() / tokens.sum()) for s in range(3)]
    assert found.mean == pytest.approx(np.mean(whole))


def test_the_bootstrap_is_paired_and_takes_counts_by_seed():
    tokens = np.array([[100, 200, 300], [110, 190, 310]])
    nll = tokens * np.array([2.0, 9.0, 3.0])  # documents differ much, models by the same factor
    found = bootstrap_ppl_difference(nll, nll + 0.1 * tokens, tokens)
    assert found.high < 0
    alone = bootstrap_ppl_difference(nll[0], nll[0], tokens[0])
    assert (alone.mean, alone.low, alone.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="do not fit"):
        bootstrap_ppl_difference(nll, nll[:, :2], tokens)


def test_the_bootstraps_spread_is_that_of_new_documents():
    """Of mean differences over samples of documents, as many intervals hold the truth as the level says, or nearly."""
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(300):
        tokens = np.full(40, 100)
        shift = generator.normal(0.05, 0.1, size=40)
        found = bootstrap_ppl_difference(tokens * 3.0, tokens * (3.0 + shift), tokens, draws=400)
        truth = math.exp(3) - math.exp(3.05)
        held += found.low <= truth <= found.high
    assert held / 300 == pytest.approx(0.94, abs=0.04)


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_a_verdict_needs_every_interval_on_one_side(low, high):
    low, high = min(low, high), max(low, high)
    said = verdict(Interval(0, low, high), Interval(0, -1, -0.5))
    assert said == ("better" if high < 0 else "not distinguishable")
    assert verdict(Interval(0, 1, 2), Interval(0, low, high)) == ("worse" if low > 0 else "not distinguishable")
    assert verdict(Interval(-1, math.nan, math.nan)) == "not distinguishable"


def test_the_calibration_error_of_probabilities_that_are_right_is_small_and_of_shifted_ones_the_shift():
    generator = np.random.default_rng(3)
    probability = generator.uniform(0, 0.8, size=200_000)
    happened = generator.uniform(size=200_000) < probability
    assert calibration_error(probability, happened) < 0.01
    assert calibration_error(probability + 0.2, happened) == pytest.approx(0.2, abs=0.01)


def test_temperature_finds_the_factor_of_the_log_odds():
    generator = np.random.default_rng(4)
    odds = generator.normal(0, 2, size=100_000)
    happened = generator.uniform(size=100_000) < 1 / (1 + np.exp(-odds))
    sure = 1 / (1 + np.exp(-3 * odds))
    temperature = fit_temperature(sure, happened)
    assert temperature == pytest.approx(3, abs=0.1)
    assert calibration_error(with_temperature(sure, temperature), happened) < 0.02 < calibration_error(sure, happened)


def test_a_bootstrap_over_few_unequal_documents_is_too_narrow():
    assert bootstrap_coverage(np.full(200, 5000)) == pytest.approx(0.95, abs=0.03)
    assert bootstrap_coverage(np.array([9000] * 3 + [10] * 40)) < 0.88
    assert bootstrap_coverage(np.full(3, 100)) < 0.85
