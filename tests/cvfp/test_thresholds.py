"""B26 for the section checks: every threshold decides something, and none is forgotten."""

from __future__ import annotations

import pytest
from torch import Tensor

from lego.cvfp.checks import convergence, flags, identity, trend, validation_trend
from lego.cvfp.dependence import dependence
from lego.cvfp.passes import sequential_pass
from lego.cvfp.ranks import Spread
from lego.cvfp.sections import ChecksParams
from tests.cvfp.conftest import PARAMS, network, seed_params, text

CHECKS = PARAMS.checks

CHECKED = {  # a key of checks and another value
    "passes": 3,
    "num_trials": 4,
    "final_diff": 10.0,
    "identity_cosine": 0.0,
    "identity_norm": 100.0,
    "identity_pairs": 20,
    "blind_cosine": 0.0,
    "slope": 1.0,
    "loss_std": 1e-9,
    "level_share": 1e-6,
    "forgetting": 1.0,
    "lags": 2,
    "ridge": 10.0,
    "attractor_distance": 100.0,
    "attractor_cosine": 0.0,
}


def all_checks(settings: ChecksParams) -> list[object]:
    """Everything that the section checks decides, on a small network and on made-up losses."""
    model, ids = network(seed_params(phase1__diversity="none")), text(120)
    embeddings = model.embed(ids).detach()
    contexts = sequential_pass(model, embeddings)
    losses = [[0.3, 0.2, 0.1], [0.005, 0.005, 0.006], [0.05, 0.05, 0.09]]
    still = convergence(Fading(), embeddings[:12], settings)
    return [
        len(still.differences),
        still.passed,
        len(validation_trend(model, embeddings, 0.1, settings).losses),
        identity(model, contexts, embeddings, settings, 0),
        dependence(model, contexts, embeddings, settings, 0),
        flags(model, settings, 0),
        [trend(one, 0.1, 1.0, settings) for one in losses],
        Spread.of(contexts, 0).is_attractor(settings.attractor_distance, CHECKS.attractor_cosine - 1),
        Spread.of(0.001 * (contexts + contexts[0]), 0).is_attractor(1.0, settings.attractor_cosine),
    ]


class Fading:
    """A network that forgets half of its context a token."""

    context_dim = 16

    def __call__(self, *, context: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        return 0.9 * context + token, token

    def frozen_step(self):
        return lambda context, token: self(context=context, token=token)[0]


@pytest.mark.parametrize("key", CHECKED)
def test_b26_every_threshold_decides_something(key):
    other = CHECKS.model_copy(update={key: CHECKED[key]})
    assert all_checks(CHECKS) != all_checks(other)


def test_b26_no_threshold_is_forgotten():
    of_the_page = {"rank_tokens", "rank_bands", "final_diff_bands"}  # how much is measured, and what the page quotes
    assert CHECKED.keys() | of_the_page == set(ChecksParams.model_fields)
