"""The guarantee of Learn-then-Test: p-values, promises over resampled splits, losses of units."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from lego.evaluation.risk import Certificate, certify, document_units, p_value, smallest_epsilon, unit_losses


@settings(max_examples=60, deadline=None)
@given(n=st.integers(500, 3000), mean=st.floats(0, 0.5), epsilon=st.floats(0.001, 0.9))
def test_p_values_are_the_smaller_of_hoeffding_and_bentkus(n, mean, epsilon):
    p = p_value(mean, n, epsilon)
    if mean >= epsilon:
        assert p == 1.0
        return
    hoeffding = math.exp(-2 * n * (epsilon - mean) ** 2)
    assert p <= min(1.0, hoeffding) + 1e-12
    assert p <= math.e * binom.cdf(math.ceil(n * mean), n, epsilon) + 1e-12
    assert p_value(mean, n, min(0.99, epsilon * 1.1)) <= p + 1e-12


def test_the_smallest_promise_is_where_the_p_value_meets_delta():
    assert smallest_epsilon(0.0, 547, 0.1) == pytest.approx(1 - 0.1 ** (1 / 547), rel=1e-6)
    found = smallest_epsilon(0.03, 800, 0.05)
    assert p_value(0.03, 800, found) <= 0.05 < p_value(0.03, 800, found * 0.999)


def test_losses_of_units_are_clipped_means_of_their_tokens():
    routed, full = np.array([3.0, 1.0, 2.0, 2.0, 9.0, 9.0]), np.array([1.0, 2.0, 2.5, 2.5, 1.0, 1.0])
    assert unit_losses(routed, full, np.array([0, 0, 1, 1, 2, 2]), 1.0).tolist() == [0.5, 0.0, 1.0]
    assert unit_losses(routed, full, np.array([-1, 0, 0, 0, 0, -1]), 9.0).tolist() == [6.0 / 4]


def test_a_document_ends_with_its_end_of_text_and_one_that_may_be_cut_counts_for_nothing():
    ids = np.array([7, 0, 5, 6, 0, 0, 3])
    assert document_units(ids, 0).tolist() == [-1, -1, 0, 0, 0, 1, 2]


def risks(generator: np.random.Generator, units: int, candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses in [0, 2] of units under candidates that route more and more, and the true risk of each."""
    share = np.arange(1, candidates + 1) / candidates
    harm = 0.25 * share**2  # chance that a unit loses; it then loses up to 2
    losses = (generator.random((units, 1)) < harm) * generator.random((units, 1)) * 2
    return losses, harm


def test_the_promise_is_kept_over_resampled_splits():
    """Learn-then-Test's guarantee itself: of 400 calibrations at most a share delta exceeds epsilon, within 3 sigma."""
    generator, epsilon, delta, broken, routed = np.random.default_rng(0), 0.1, 0.2, 0, 0
    for _ in range(400):
        losses, true = risks(generator, 500, 40)
        found = certify(losses, epsilon, delta, clip=2.0)
        assert found.chosen is not None
        routed += found.chosen
        broken += true[found.chosen] > epsilon
    assert broken <= 400 * delta + 3 * math.sqrt(400 * delta * (1 - delta))
    allowed = int((risks(generator, 1, 40)[1] <= epsilon).sum()) - 1
    assert routed / 400 > 0.75 * allowed  # the promise is not kept by routing next to nothing


def test_no_candidate_can_keep_a_promise_below_what_units_can_show():
    losses = np.zeros((500, 3))
    best = 1.5 * (1 - 0.1 ** (1 / 500))
    found = certify(losses, best * 0.99, 0.1, clip=1.5)
    assert found == Certificate(None, best * 0.99, 0.1, 500, found.smallest_epsilon, found.best_epsilon)
    assert found.smallest_epsilon == found.best_epsilon == pytest.approx(best)
    assert certify(losses, best * 1.01, 0.1, clip=1.5).chosen == 2
    assert certify(np.full((500, 3), 1.5), 1.6, 0.1, clip=1.5).chosen == 2  # a loss cannot exceed its clip
    with pytest.raises(ValueError, match="needs at least 500 units, got 499"):
        certify(losses[:499], 1.0, 0.1, 1.0)


def test_testing_stops_at_the_first_failure():
    losses = np.zeros((600, 4))
    losses[:, 1] = 1.0
    assert certify(losses, 0.05, 0.1, 1.0).chosen == 0
