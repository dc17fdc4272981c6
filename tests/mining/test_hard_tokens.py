"""Hard tokens by brute force: the regressions of ashem section 3 on mining, each named after its number."""

from __future__ import annotations

import pytest
import torch

from lego import collect_hard_examples, compute_confidence_threshold
from tests.conftest import random_batches


def test_3_1_mining_is_per_token(block1):
    data = random_batches(10, batch=8, length=24, seed=5)
    threshold = compute_confidence_threshold(block1, data, 0.5, "cpu")
    hard = collect_hard_examples(block1, data, threshold, "cpu")
    tokens = sum(y.numel() for _, y in data)
    assert len(hard["targets"]) == pytest.approx(0.5 * tokens, abs=1)
    sequences_with_a_hard_token = sum(
        (block1.compute_confidence(block1.forward_to_hidden(x)) < threshold).any(dim=1).sum().item() for x, _ in data
    )
    assert sequences_with_a_hard_token == 80  # every sequence: mining those would mine everything


def test_3_2_hard_examples_are_exactly_the_tokens_below_the_threshold(block1, batches):
    threshold = compute_confidence_threshold(block1, batches, 0.4, "cpu")
    hard = collect_hard_examples(block1, batches, threshold, "cpu")
    expected = {key: [] for key in hard}
    with torch.no_grad():
        for x, y in batches:  # brute force, token by token
            h = block1.forward_to_hidden(x)
            for b in range(x.shape[0]):
                for t in range(x.shape[1]):
                    confidence = block1.compute_confidence(h)[b, t]
                    if confidence < threshold:
                        for key, value in zip(hard, (x[b, t], h[b, t], y[b, t], confidence), strict=True):
                            expected[key].append(value)
    for key, tensor in hard.items():
        assert torch.equal(tensor, torch.stack(expected[key]))
    n = len(hard["targets"])
    assert hard["hidden_states"].shape == (n, 32)
    assert hard["inputs"].shape == hard["targets"].shape == hard["confidences"].shape == (n,)
    assert hard["hidden_states"].dtype == block1.embedding.weight.dtype


def test_no_hard_token_is_an_error_that_says_so(block1, batches):
    with pytest.raises(ValueError, match="no hard token: no confidence lies below the threshold 0"):
        collect_hard_examples(block1, batches, 0.0, "cpu")
