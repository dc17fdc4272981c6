"""The n-gram references against brute force."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.text.ngram import KneserNey, references, unigram_nll


def brute_force_kneser_ney(train: list[int], test: list[int], vocab: int, order: int) -> list[float]:
    """The textbook recursion over dictionaries of tuples."""
    grams = {n: Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1)) for n in range(1, order + 1)}
    counts = {order: grams[order]}
    for n in range(1, order):
        counts[n] = Counter(g[1:] for g in grams[n + 1])

    def probability(context: tuple[int, ...], word: int) -> float:
        n = len(context) + 1
        lower = probability(context[1:], word) if context else 1 / vocab
        once, twice = (sum(c == k for c in counts[n].values()) for k in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.0
        following = {g: c for g, c in counts[n].items() if g[:-1] == context}
        total = sum(following.values())
        if not total:
            return lower
        kept = max(following.get((*context, word), 0) - discount, 0)
        return (kept + discount * len(following) * lower) / total

    return [probability(tuple(test[max(0, i - order + 1) : i]), word) for i, word in enumerate(test)]


@settings(max_examples=100, deadline=None)
@given(
    train=st.lists(st.integers(0, 5), min_size=6, max_size=60),
    test=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    order=st.integers(1, 5),
)
def test_kneser_ney_equals_brute_force(train, test, order):
    model = KneserNey(np.array(train), 6, order)
    expected = brute_force_kneser_ney(train, test, 6, order)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(model.probabilities(np.array(test)), expected, rtol=1e-9, atol=1e-15)


@settings(max_examples=100, deadline=None)
@given(train=st.lists(st.integers(0, 5), min_size=6, max_size=60), history=st.lists(st.integers(0, 5), max_size=6))
def test_kneser_ney_sums_to_one(train, history):
    model = KneserNey(np.array(train), 6, 3)
    total = sum(model.probabilities(np.array([*history, word]))[-1] for word in range(6))
    assert total == pytest.approx(1.0)


def test_unigram_is_add_one():
    nll = unigram_nll(np.array([0, 0, 1]), np.array([0, 2]), 3)
    assert nll == pytest.approx(-(math.log(3 / 6) + math.log(1 / 6)) / 2)


def test_references_are_perplexities_and_bits_per_byte_of_each_split():
    train, held_out = np.arange(40) % 5, {"validation": np.arange(20) % 5, "test": np.array([4, 3, 2, 1, 0])}
    metrics = references(train, held_out, 6, {"validation": 0.5, "test": 0.25})
    assert metrics["validation_fivegram_ppl"] < 1.5 < metrics["test_fivegram_ppl"]
    for split, rate in (("validation", 0.5), ("test", 0.25)):
        expected = KneserNey(train, 6, 5).nll(held_out[split])
        assert metrics[f"{split}_fivegram_bits_per_byte"] == pytest.approx(expected / math.log(2) * rate)
        assert metrics[f"{split}_unigram_ppl"] == pytest.approx(math.exp(unigram_nll(train, held_out[split], 6)))
