"""Thresholds of confidence: the quantile by brute force and where torch refuses it; the share of hard tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego import compute_confidence, compute_confidence_threshold
from lego.mining import thresholds
from lego.mining.thresholds import quantile_threshold


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60),
    ratio=st.floats(0, 1),
)
def test_quantile_threshold_equals_brute_force(values, ratio):
    ordered = sorted(values)
    rank = ratio * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    expected = ordered[low] + (rank - low) * (ordered[high] - ordered[low])
    threshold = quantile_threshold(torch.tensor(values), ratio)
    assert threshold == pytest.approx(expected, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 3000), ratio=st.floats(0, 1), seed=st.integers(0, 2**20))
def test_large_quantiles_interpolate_as_torch_does(n, ratio, seed):
    values = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    expected = torch.quantile(values.double(), ratio).item()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "TORCH_QUANTILE_LIMIT", 0)
        assert quantile_threshold(values, ratio) == pytest.approx(expected, abs=1e-7)


def test_quantiles_where_torch_refuses_and_just_below():
    values = torch.arange(2**24 + 3, dtype=torch.float64).div(2**25).float().flip(0)
    assert quantile_threshold(values, 0.5) == pytest.approx((2**23 + 1) / 2**25, rel=1e-7)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.5)
    below = values[: 2**24]
    expected = torch.quantile(below, 0.3).item()
    assert quantile_threshold(below, 0.3) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "TORCH_QUANTILE_LIMIT", 0)
        assert quantile_threshold(below, 0.3) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"need confidences and a ratio in \[0, 1\], got 0 and 0\.5"):
        quantile_threshold(torch.empty(0), 0.5)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(2, 400), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 2**31))
def test_the_share_below_the_threshold_is_the_ratio(n, ratio, seed):
    confidences = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    threshold = quantile_threshold(confidences, ratio)
    assert abs((confidences < threshold).float().mean().item() - ratio) <= 1 / n + 1e-6


def test_threshold_of_a_model_is_the_quantile_of_its_confidences(block1, batches):
    with torch.no_grad():
        confidences = torch.cat([compute_confidence(block1, block1.forward_to_hidden(x)).flatten() for x, _ in batches])
    threshold = compute_confidence_threshold(block1, batches, 0.3, "cpu")
    assert threshold == torch.quantile(confidences, 0.3).item()
