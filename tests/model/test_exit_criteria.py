"""Exit criteria by their definitions, and fitted ones against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neural_network import MLPRegressor

from lego.base.artifacts import ArtifactError
from lego.model.exit_criteria import (
    Ridge,
    StateCriterion,
    entropy,
    features,
    fit_mlp,
    log_odds,
    margin,
    max_prob,
    needs_logits,
)


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


@pytest.mark.parametrize("criterion", [max_prob, margin, entropy])
def test_impossible_tokens_and_a_vocabulary_of_one_give_scores(criterion):
    logits = torch.tensor([[-math.inf, 2.0, 2.0], [-math.inf, 0.0, -math.inf]])
    expected = {max_prob: [0.5, 1.0], margin: [0.0, 1.0], entropy: [1 - math.log(2) / math.log(3), 1.0]}
    assert criterion(logits, logits).tolist() == pytest.approx(expected[criterion], abs=1e-6)
    assert criterion(logits[:, :1], torch.ones(2, 1)).tolist() == [1.0, 1.0]


def exits(n: int = 400, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    states = torch.randn(n, dim) * torch.rand(n, 1).add(0.1) * 50
    x = features(states)
    return states, x[:, 0] - 2 * x[:, 3] + 0.3 * torch.randn(n) + 0.7


def read(states: torch.Tensor, logits: torch.Tensor, reads: bool) -> torch.Tensor:
    """What a criterion reads, written out: states at unit root mean square, and the largest logit."""
    x = states.double() / states.double().square().mean(1, keepdim=True).sqrt()
    return (torch.cat([x, logits.double().sort(1).values[:, -1:]], dim=1) if reads else x).float()


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("l2", [1e-4, 0.5])
def test_the_linear_fit_is_ridge_regression(l2, reads):
    states, targets = exits()
    logits = torch.randn(400, 9)
    fit, x = Ridge(12, reads), read(states, logits, reads)
    targets = targets + reads * x[:, -1]
    for rows in torch.arange(400).split(150):
        fit.add(states[rows], targets[rows], logits.amax(1)[rows])
    reference = SklearnRidge(alpha=l2 * len(states)).fit(x.double().numpy(), targets.double().numpy())
    criterion = fit.solve(l2)
    np.testing.assert_allclose(criterion.output.weight.numpy()[0], reference.coef_, rtol=1e-3, atol=1e-5)
    expected = torch.from_numpy(reference.predict(x.double().numpy())).float().sigmoid()
    torch.testing.assert_close(criterion(states, logits), expected, rtol=1e-4, atol=1e-5)
    assert criterion.macs == 12 + reads
    assert needs_logits(criterion) == reads
    scaled = criterion(states * 7, logits)
    torch.testing.assert_close(scaled, criterion(states, logits), rtol=1e-4, atol=1e-5)  # scale says nothing


@pytest.mark.parametrize("reads", [False, True])
def test_the_fit_with_a_hidden_layer_is_scikit_learns(reads):
    states, targets = exits()
    logits = 7 + 3 * torch.randn(400, 9)
    criterion = fit_mlp(states, targets, 6, 1e-3, seed=2**40, largest=logits.amax(1) if reads else None)
    options = {"early_stopping": True, "random_state": 2**40 % 2**32, "max_iter": 1000}
    reference = MLPRegressor(hidden_layer_sizes=(6,), alpha=1e-3, **options)
    x = read(states, logits, reads)
    if reads:  # fitted at the scale of the others
        x[:, -1] = (x[:, -1] - x[:, -1].mean()) / x[:, -1].std()
    reference.fit(x.numpy(), targets.numpy())
    expected = torch.from_numpy(reference.predict(x.numpy())).float().sigmoid()
    torch.testing.assert_close(criterion(states, logits), expected, rtol=1e-4, atol=1e-5)
    assert criterion.macs == (12 + reads) * 6 + 6


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("width", [0, 5])
def test_scores_are_those_of_float32_in_any_model(width, reads):
    states, logits = torch.randn(200, 12), torch.randn(200, 9)
    criterion = StateCriterion(12, width, reads)
    expected = criterion(states, logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(criterion(states, logits), expected)
    for dtype in (torch.bfloat16, torch.float16):
        scores = criterion.to(dtype)(states.to(dtype), logits.to(dtype))
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, rtol=0, atol=0.02)


def test_a_largest_logit_that_never_changes_is_no_news():
    states, targets = exits()
    criterion = fit_mlp(states, targets, 6, 1e-3, seed=0, largest=torch.full((400,), 9.0))
    assert criterion.hidden.weight[:, -1].abs().max() < 5


def test_a_criterion_that_reads_impossible_tokens_says_a_number():
    logits = torch.full((2, 9), -math.inf)
    logits[:, 3], logits[1, 4] = 5.0, 5.0
    assert StateCriterion(12, 5, reads_logits=True)(torch.randn(2, 12), logits).isfinite().all()


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("width", [0, 5])
def test_fitted_criteria_come_back_as_they_were_saved(width, reads, tmp_path):
    criterion, states, logits = StateCriterion(12, width, reads), torch.randn(9, 12), torch.randn(9, 7)
    criterion.save(tmp_path / "probe.safetensors")
    again = StateCriterion.load(tmp_path / "probe.safetensors", 12, reads)
    torch.testing.assert_close(again(states, logits), criterion(states, logits))
    with pytest.raises(ArtifactError, match=r"probe\.safetensors: does not fit exit states of width 16 \("):
        StateCriterion.load(tmp_path / "probe.safetensors", 16, reads)
    with pytest.raises(ArtifactError, match="exit_criterion_reads_logits"):
        StateCriterion.load(tmp_path / "probe.safetensors", 12, not reads)


def test_log_odds_are_finite_for_certain_tokens():
    assert log_odds(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([-13.8155, 0.0, 13.8155], rel=1e-4)
