"""The fitted gate: no worse than either exit, a minimum, and what a token table says with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.evaluation.gating import fit_gate, gate_for
from lego.evaluation.routed import ATTAINABLE, perplexity, token_table
from tests.conftest import random_batches
from tests.routing.conftest import MODELS


def mean_loss(gate, confidence: np.ndarray, shallow: np.ndarray, deep: np.ndarray) -> float:
    a = gate(torch.from_numpy(confidence)).double().sigmoid().numpy()
    return float(-np.log(a * np.exp(-shallow) + (1 - a) * np.exp(-deep)).mean())


def text(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.beta(1, 2, size=n), *np.abs(rng.normal(size=(2, n))) * rng.uniform(0.1, 4, size=(2, 1))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 400), seed=st.integers(0, 10**6))
def test_the_fitted_mixture_is_no_worse_than_either_exit_or_a_neighbour(n, seed):
    confidence, shallow, deep = text(n, seed)
    gate = fit_gate(confidence, shallow, deep, l2=0.0)
    loss = mean_loss(gate, confidence, shallow, deep)
    assert loss <= min(shallow.mean(), deep.mean()) + 1e-3
    gate.bias += 0.05
    assert mean_loss(gate, confidence, shallow, deep) >= loss - 1e-4


def test_a_gate_that_made_the_data_is_found():
    """Where block 2 is right exactly when block 1 is unsure, that is what is learned."""
    confidence, *_ = text(20_000, 3)
    rng, log_odds = np.random.default_rng(0), np.log(confidence / (1 - confidence))
    share = 1 / (1 + np.exp(-3 * (log_odds - np.median(log_odds))))
    first_is_right = rng.random(len(share)) < share
    shallow, deep = np.where(first_is_right, 0.1, 5.0), np.where(first_is_right, 5.0, 0.1)
    gate = fit_gate(confidence, shallow, deep)
    assert np.corrcoef(gate(torch.from_numpy(confidence)).sigmoid().numpy(), share)[0, 1] > 0.99
    assert 0.1 < mean_loss(gate, confidence, shallow, deep) < min(shallow.mean(), deep.mean()) - 0.5


@torch.no_grad()
def test_a_table_holds_the_losses_of_the_mixture():
    model, batches = MODELS["sequence", 2], random_batches(3, seed=4)
    gate, said = gate_for(model, batches, "cpu")
    plain = token_table(model, batches, "cpu")
    table = token_table(model, batches, "cpu", gate=gate)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    shallow = model.logits_at(model.states_at(x, 2), 2)
    mixed = gate.mixed(shallow, model(x)).flatten(0, 1)  # (n, V)
    np.testing.assert_allclose(
        table.nll_deep, -mixed.gather(1, y.flatten()[:, None])[:, 0].numpy(), rtol=1e-4, atol=1e-5
    )
    assert (table.right_deep == (mixed.argmax(1) == y.flatten()).numpy()).mean() > 0.99
    assert np.array_equal(table.nll_shallow, plain.nll_shallow)
    assert np.array_equal(table.confidence, plain.confidence)
    expected = (mixed.exp() * (mixed - shallow.flatten(0, 1).log_softmax(1))).sum(1)
    np.testing.assert_allclose(table.scores[ATTAINABLE], torch.sigmoid(-expected).numpy(), rtol=1e-4, atol=1e-5)
    assert ATTAINABLE not in plain.scores
    told = []
    token_table(model, batches, "cpu", gate=gate, on_states=lambda states, spared, largest: told.append(spared))
    np.testing.assert_allclose(torch.cat(told).numpy(), expected.numpy(), rtol=1e-3, atol=1e-5)
    assert said["mixed_ppl"] == pytest.approx(perplexity(table.nll_deep), rel=1e-5)
    assert said["mixed_ppl"] <= min(said["shallow_ppl"], said["deep_ppl"]) * 1.001
    assert (said["shallow_ppl"], said["deep_ppl"]) == (perplexity(plain.nll_shallow), perplexity(plain.nll_deep))
    with pytest.raises(ValueError, match="no token to fit the gate on"):
        fit_gate(np.zeros(0), np.zeros(0), np.zeros(0))
