"""Noise of a known severity, which needs an augmenter."""

from __future__ import annotations

import pytest
import torch

from lego.base.parameter_files import ParamsError
from lego.satipatthana.augment import Augmenter
from tests.satipatthana.conftest import COMPAT, PARAMS, small


def test_r3_2_severity_is_per_sample_and_level_0_changes_no_bit():
    one = Augmenter(PARAMS.augmenter)
    one.scale.fill_(2.0)
    x, generator = torch.randn(4000, 40), torch.Generator().manual_seed(0)
    same, none = one(x, 0.0)
    assert same is x
    assert not none.any()
    noisy, severity = one(x, 0.8, generator)
    assert 0 <= float(severity.min()) < 0.01
    assert 0.79 < float(severity.max()) <= 0.8
    spread = (noisy - x).std(dim=1, correction=0)
    expected = severity * PARAMS.augmenter.max_noise_std * 2
    assert torch.corrcoef(torch.stack([spread, expected]))[0, 1] > 0.95
    assert float((noisy - x).square().mean()) == pytest.approx(float(expected.square().mean()), rel=0.1)
    _, old = Augmenter(COMPAT.augmenter)(x, 0.5, generator)  # the original: one number for all
    assert len(old.unique()) == 1


def test_r3_2_augmented_rows_need_an_augmenter():
    with pytest.raises(ParamsError, match=r"augmenter\.kind must not be identity when paths\.augmented is above 0"):
        small(augmenter__kind="identity")
