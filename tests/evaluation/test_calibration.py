"""What calibration text teaches: the gain of block 2 from exit states."""

from __future__ import annotations

import pytest
import torch

from lego.evaluation.calibration import GainFit
from tests.model.test_exit_criteria import exits


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("width", [0, 8])
def test_a_gain_that_is_linear_in_what_is_read_is_found(width, reads):
    """The score's log-odds are the negative gain: 0.5 parts what block 2 helps from what it does not."""
    states, gain = exits(4000)
    logits = torch.randn(4000, 9)
    largest = logits.amax(1)
    gain = gain - reads * largest
    fit = GainFit(12, width, reads)
    for rows in torch.arange(4000).split(1000):
        fit.add(states[rows], gain[rows], largest[rows])
    score = fit.solve(1e-5, seed=0)(states, logits)
    error = (-torch.logit(score) - gain).std()
    assert 0.25 < error < (0.35 if width == 0 else 0.6)  # the noise is 0.3
    agree = ((score < 0.5) == (gain > 0)).float().mean()
    assert agree > 0.85
