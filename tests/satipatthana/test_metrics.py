"""Numbers of scores against brute force and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.satipatthana import metrics

# metrics against brute force


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_metrics_equal_brute_force(rows):
    confidence = np.array([float(one) for one, _ in rows])
    wrong = np.array([one for _, one in rows])
    order = sorted(range(len(rows)), key=lambda i: -confidence[i])
    risks = [sum(wrong[order[:k]]) / k for k in range(1, len(rows) + 1)]
    assert metrics.aurc(confidence, wrong) == pytest.approx(np.mean(risks))
    general = [sum(wrong[order[:k]]) / len(rows) for k in range(1, len(rows) + 1)]
    assert metrics.augrc(confidence, wrong) == pytest.approx(np.mean(general))
    inside, outside = confidence[~wrong], confidence[wrong]
    if len(inside) and len(outside):
        wins = np.mean([[1.0 if a > b else 0.5 if a == b else 0.0 for b in outside] for a in inside])
        assert metrics.auroc(inside, outside) == pytest.approx(wins)
    else:
        assert math.isnan(metrics.auroc(inside, outside))
        assert math.isnan(metrics.fpr95(inside, outside))
    half = max(1, round(0.5 * len(rows)))
    assert metrics.risk_at(confidence, wrong, 0.5) == pytest.approx(risks[half - 1])


def test_metrics_of_known_cases():
    inside, outside = np.linspace(0.5, 1, 101), np.array([0.1, 0.52, 0.53, 0.9])
    assert metrics.fpr95(inside, outside) == 0.5  # the 5 % quantile is .525
    confidence = np.linspace(0.1, 0.9, 150)
    assert metrics.ece(confidence, confidence) == pytest.approx(0)
    assert metrics.ece(np.full(150, 0.8), np.arange(150) % 2 == 0) == pytest.approx(0.3, abs=0.01)
    wrong = np.array([False] * 90 + [True] * 10)
    best = metrics.eaurc(-np.arange(100.0), wrong)
    assert abs(best) < 0.002
    assert metrics.eaurc(np.arange(100.0), wrong) > 0.1
    p = np.array([[0.7, 0.3], [0.2, 0.8]])
    assert metrics.brier(p, np.array([0, 1])) == pytest.approx((0.18 + 0.08) / 2)
    assert metrics.nll(p, np.array([0, 1])) == pytest.approx(-(math.log(0.7) + math.log(0.8)) / 2)
    assert math.isnan(metrics.ece(np.array([]), np.array([])))
