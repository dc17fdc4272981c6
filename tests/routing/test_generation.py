"""Text from a routed model: equal to recomputing each sequence, and the full model's own where it must be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.routing.generation import Sampling, generate, generate_lossless
from tests.conftest import VOCAB
from tests.routing.conftest import CONTEXTS, MODELS, greedy_by_recomputing, random_model

PROMPTS = [[5, 9, 2], [17], [3, 3, 8, 1, 40]]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("threshold", [None, 0.35])
@torch.no_grad()
def test_greedy_text_of_a_batch_equals_recomputing_each_sequence(context, threshold):
    model = MODELS[context, 4]
    expected = [greedy_by_recomputing(model, prompt, 12, threshold) for prompt in PROMPTS]
    written: list[list[int]] = [[], [], []]
    for token in generate(model, PROMPTS, 12, threshold):
        written[token.sequence].append(token.id)
    assert written == expected
    stop = {expected[0][4], expected[1][2]}
    stopped: list[list[int]] = [[], [], []]
    for token in generate(model, PROMPTS, 12, threshold, stop=stop):
        stopped[token.sequence].append(token.id)
    for short, whole in zip(stopped, expected, strict=True):
        ends = [i for i, token in enumerate(whole) if token in stop]
        assert short == whole[: ends[0] + 1 if ends else None]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("drafts", [1, 3, 8])
@torch.no_grad()
def test_lossless_greedy_text_is_the_full_models(context, drafts):
    model = MODELS[context, 2]
    for prompt in PROMPTS:
        tokens = list(generate_lossless(model, prompt, 20, drafts=drafts))
        assert [token.id for token in tokens] == greedy_by_recomputing(model, prompt, 20, None)
        assert any(token.deep for token in tokens)


@torch.no_grad()
def test_lossless_sampling_has_the_full_models_distribution():
    """Of the first two tokens after a prompt, 1,500 draws against the exact joint distribution: chi-square."""
    from scipy.stats import chisquare

    model, sampling = random_model("sequence", vocab=4), Sampling(temperature=2.0)
    generator = torch.Generator().manual_seed(0)
    counts, accepted = torch.zeros(4, 4), 0
    for _ in range(1500):
        tokens = list(generate_lossless(model, [1, 2], 2, drafts=2, sampling=sampling, generator=generator))
        counts[tokens[0].id, tokens[1].id] += 1
        accepted += sum(not token.deep for token in tokens)
    first = sampling.probabilities(model(torch.tensor([[1, 2]]))[0, -1])
    second = torch.stack([sampling.probabilities(model(torch.tensor([[1, 2, t]]))[0, -1]) for t in range(4)])
    expected = (first[:, None] * second).flatten().double()
    assert 300 < accepted < 2900  # both branches are taken
    assert (
        chisquare(counts.flatten().double(), expected.flatten().double() * 1500 / expected.sum().item()).pvalue > 1e-3
    )


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.3, 0.7, 0.95, 1.0]),
)
def test_sampling_equals_transformers_warpers(seed, temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(seed)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(Sampling(temperature, top_k, top_p).probabilities(logits), expected.softmax(-1))


def test_a_temperature_near_zero_is_greedy_and_not_a_number():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert Sampling(1e-40).probabilities(logits).tolist() == [[0.0, 1.0, 0.0]]


def test_bad_requests_are_named():
    model = MODELS["token", 4]
    with pytest.raises(ValueError, match="prompt 1 is empty; give at least one token"):
        list(generate(model, [[1], []], 3, None))
    with pytest.raises(ValueError, match=f"prompt 0 holds a token outside the vocabulary of {VOCAB}"):
        list(generate_lossless(model, [VOCAB], 3))
    with pytest.raises(ValueError, match=r"need temperature >= 0, top_k >= 0 and top_p in \(0, 1\]"):
        Sampling(top_p=0.0)
    with pytest.raises(ValueError, match="drafts must be at least 1, got 0"):
        list(generate_lossless(model, [1], 3, drafts=0))
    assert list(generate(model, [], 3, None)) == []
