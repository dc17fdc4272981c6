"""Exit criteria by their definitions, fitted ones against scikit-learn, and the guarantee of Learn-then-Test."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neural_network import MLPRegressor

from lego.base.artifacts import ArtifactError
from lego.evaluation.calibration import GainFit
from lego.evaluation.risk import Certificate, certify, document_units, p_value, smallest_epsilon, unit_losses
from lego.model.exit_criteria import Ridge, StateCriterion, entropy, features, fit_mlp, log_odds, margin, max_prob


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**20), scale=st.floats(0.0, 30.0), vocab=st.integers(2, 50))
def test_scores_of_logits_are_their_definitions_and_lie_between_0_and_1(seed, scale, vocab):
    logits = scale * torch.randn(20, vocab, generator=torch.Generator().manual_seed(seed))
    p = logits.double().softmax(-1)
    best = p.sort(descending=True).values
    h = torch.distributions.Categorical(probs=p).entropy()
    expected = {max_prob: best[:, 0], margin: best[:, 0] - best[:, 1], entropy: 1 - h / math.log(vocab)}
    for criterion, values in expected.items():
        scores = criterion(logits, logits)
        torch.testing.assert_close(scores.double(), values, rtol=0, atol=2e-5)
        assert scores.min() >= -1e-6
        assert scores.max() <= 1 + 1e-6


def exits(n: int = 400, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    states = torch.randn(n, dim) * torch.rand(n, 1).add(0.1) * 50
    x = features(states)
    return states, x[:, 0] - 2 * x[:, 3] + 0.3 * torch.randn(n) + 0.7


@pytest.mark.parametrize("l2", [1e-4, 0.5])
def test_the_linear_fit_is_ridge_regression(l2):
    states, targets = exits()
    fit = Ridge(12)
    for part, target in zip(states.split(150), targets.split(150), strict=True):
        fit.add(part, target)
    reference = SklearnRidge(alpha=l2 * len(states)).fit(features(states).double().numpy(), targets.double().numpy())
    criterion = fit.solve(l2)
    np.testing.assert_allclose(criterion.output.weight.numpy()[0], reference.coef_, rtol=1e-3, atol=1e-5)
    expected = torch.from_numpy(reference.predict(features(states).numpy())).float().sigmoid()
    torch.testing.assert_close(criterion(states), expected, rtol=1e-4, atol=1e-5)
    assert criterion.macs == 12
    torch.testing.assert_close(criterion(states * 7), criterion(states), rtol=1e-4, atol=1e-5)  # scale says nothing


def test_the_fit_with_a_hidden_layer_is_scikit_learns():
    states, targets = exits()
    criterion = fit_mlp(states, targets, 6, 1e-3, seed=2**40)
    options = {"early_stopping": True, "random_state": 2**40 % 2**32, "max_iter": 1000}
    reference = MLPRegressor(hidden_layer_sizes=(6,), alpha=1e-3, **options)
    reference.fit(features(states).numpy(), targets.numpy())
    expected = torch.from_numpy(reference.predict(features(states).numpy())).float().sigmoid()
    torch.testing.assert_close(criterion(states), expected, rtol=1e-4, atol=1e-5)
    assert criterion.macs == 12 * 6 + 6


@pytest.mark.parametrize("width", [0, 8])
def test_a_gain_that_is_linear_in_the_exit_state_is_found(width):
    """The score's log-odds are the negative gain: 0.5 parts what block 2 helps from what it does not."""
    states, gain = exits(4000)
    fit = GainFit(12, width)
    for part, target in zip(states.split(1000), gain.split(1000), strict=True):
        fit.add(part, target)
    score = fit.solve(1e-5, seed=0)(states)
    error = (-torch.logit(score) - gain).std()
    assert 0.25 < error < (0.35 if width == 0 else 0.6)  # the noise is 0.3
    agree = ((score < 0.5) == (gain > 0)).float().mean()
    assert agree > 0.85


@pytest.mark.parametrize("width", [0, 5])
def test_scores_are_those_of_float32_in_any_model(width):
    states = torch.randn(200, 12)
    criterion = StateCriterion(12, width)
    expected = criterion(states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(criterion(states), expected)
    for dtype in (torch.bfloat16, torch.float16):
        scores = criterion.to(dtype)(states.to(dtype))
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("width", [0, 5])
def test_fitted_criteria_come_back_as_they_were_saved(width, tmp_path):
    criterion, states = StateCriterion(12, width), torch.randn(9, 12)
    criterion.save(tmp_path / "probe.safetensors")
    torch.testing.assert_close(StateCriterion.load(tmp_path / "probe.safetensors", 12)(states), criterion(states))
    with pytest.raises(ArtifactError, match=r"probe\.safetensors: does not fit exit states of width 16; run dvc repro"):
        StateCriterion.load(tmp_path / "probe.safetensors", 16)


def test_log_odds_are_finite_for_certain_tokens():
    assert log_odds(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([-13.8155, 0.0, 13.8155], rel=1e-4)


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
