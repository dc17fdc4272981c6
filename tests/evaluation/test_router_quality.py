"""How well a criterion routes, beside what can be had: by brute force on made-up tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lego import Ledger
from lego.evaluation.routed import ATTAINABLE, Route, TokenTable
from lego.evaluation.router_quality import SHARES, captured_by_share, captured_of_attainable, router_quality
from tests.routing.conftest import MODELS


def table(n: int = 400, seed: int = 0) -> TokenTable:
    """Tokens whose gain is what both exits' answers expect, plus much chance; `half` is a noisy view of the first."""
    rng = np.random.default_rng(seed)
    expected = rng.exponential(0.2, n)
    shallow = rng.exponential(2.0, n) + 2
    deep = shallow - expected - rng.normal(size=n) * 0.5
    scores = {
        ATTAINABLE: 1 / (1 + np.exp(expected)),
        "half": 1 / (1 + np.exp(expected + rng.normal(size=n) * 0.2)),
        "chance": rng.random(n),
        "worst": 1 / (1 + np.exp(-expected)),
    }
    right = np.zeros(n, bool)
    return TokenTable(shallow, deep, right, right, rng.random(n), scores)


def test_the_share_of_what_can_be_had_by_brute_force():
    made = table()
    for n_deep in (1, 120, 399):
        gains = {}
        for name, score in made.scores.items():
            order = sorted(range(len(score)), key=lambda token: score[token])
            gains[name] = sum(made.gain[token] for token in order[:n_deep]) - n_deep * made.gain.mean()
        for name, gained in gains.items():
            found = captured_of_attainable(made, name, n_deep)
            assert found == pytest.approx(gained / gains[ATTAINABLE]) if gains[ATTAINABLE] > 0 else found is None


def test_a_noisy_view_of_it_gets_less_and_the_opposite_loses():
    found = captured_by_share(table(20_000), [ATTAINABLE, "half", "chance", "worst"])
    assert list(found) == [f"{share:g}" for share in SHARES]
    for row in found.values():
        assert row[ATTAINABLE] == 1
        assert 0.4 < row["half"] < 0.9
        assert abs(row["chance"]) < 0.2
        assert row["worst"] < -0.5


def test_the_oracle_is_no_less_than_what_can_be_had():
    made, ledger = table(), Ledger.of(MODELS["sequence", 2], 16)
    quality = router_quality(made, Route(ATTAINABLE, float(np.median(made.scores[ATTAINABLE]))), ledger)
    assert quality["of_attainable"] == pytest.approx(1)
    assert 0 < quality["gain_captured"] < 1
    assert quality["oracle_ppl"] < quality["oracle_at_ratio_ppl"] < quality["ppl"]


def test_without_a_mixture_or_a_gain_there_is_no_such_share():
    made = table()
    del made.scores[ATTAINABLE]
    assert captured_of_attainable(made, "half", 100) is None
    flat = replace(made, nll_deep=made.nll_shallow, scores=made.scores | {ATTAINABLE: made.scores["half"]})
    assert captured_of_attainable(flat, "half", 100) is None
    quality = router_quality(flat, Route("half", 0.4), Ledger.of(MODELS["sequence", 2], 16))
    assert quality["of_attainable"] is quality["gain_captured"] is None
