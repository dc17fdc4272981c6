"""Thresholds of trust, the temperature, and trust mapped to the share of right answers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lego.satipatthana import metrics
from lego.satipatthana.reject import fit_temperature, fit_trust, threshold


def test_thresholds_give_what_was_wanted():
    random = np.random.default_rng(0)
    trust = random.uniform(size=2000)
    right = random.uniform(size=2000) < trust
    assert (trust >= threshold(trust, right, "coverage", 0.8)).mean() == pytest.approx(0.8, abs=0.001)
    for rows, wanted in itertools.product((10, 100, 1000), (0.5, 0.8, 0.9, 0.95)):
        kept = (trust[:rows] >= threshold(trust[:rows], right[:rows], "coverage", wanted)).sum()
        assert kept == math.ceil(round(wanted * rows, 6)), (rows, wanted)
    cut = threshold(trust, right, "risk", 0.2)
    assert 0.15 < (~right[trust >= cut]).mean() <= 0.2
    assert threshold(trust, np.zeros(2000, bool), "risk", 0.2) > 1
    tied = np.repeat([0.9, 0.5, 0.1], 20)  # rows of equal trust are accepted together
    half = np.concatenate([np.ones(20, bool), np.arange(20) < 10, np.zeros(20, bool)])
    assert threshold(tied, half, "risk", 0.2) == 0.9
    assert threshold(tied[20:40], half[20:40], "risk", 0.2) > 1
    for n in (10, 19, 20, 152):  # at least 90 % of new rows, whatever the number of validation rows
        cuts = [threshold(random.uniform(size=n), np.ones(n, bool), "conformal", 0.9) for _ in range(4000)]
        kept = 1 - np.mean(cuts)  # of uniform rows
        assert 0.9 - 0.003 <= kept <= 0.9 + 1 / n, n
    assert threshold(trust[:5], right[:5], "conformal", 0.9) == 0  # too few to promise more
    with pytest.raises(ValueError, match="needs validation rows"):
        threshold(trust[:0], right[:0], "coverage", 0.8)


def test_calibration_finds_the_temperature_and_keeps_the_order():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(torch.softmax(logits / 3, 1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(3, rel=0.1)
    trust = np.random.default_rng(0).uniform(size=4000)
    share = 1 / (1 + np.exp(-(0.5 * np.log(trust / (1 - trust)) + 0.8)))
    right = np.random.default_rng(1).uniform(size=4000) < share
    for kind in ("temperature", "isotonic"):
        mapped = fit_trust(trust, right, kind)(trust)
        assert metrics.ece(mapped, right) < 0.04 < metrics.ece(trust, right), kind
        assert (np.diff(mapped[np.argsort(trust)]) >= -1e-9).all()
    assert fit_trust(trust, right, "none")(trust) == pytest.approx(trust)
