"""The whole system: a row's output is its own, and below the threshold it abstains."""

from __future__ import annotations

import pytest
import torch

from lego.satipatthana.curriculum import advance, begin, how_to_use, judge
from lego.satipatthana.made import outside_sets
from lego.satipatthana.tasks import Task
from tests.satipatthana.conftest import ONCE, PARAMS, a_task, clusters, small, system


def test_r4_2_every_output_of_a_row_is_that_of_the_row_alone():
    made, x = system(small()), clusters(rows=9).x
    whole = made(x)
    for row in range(len(x)):
        alone = made(x[row : row + 1])
        for name in ("output", "s_star", "v_ctx", "trust", "conformity", "confidence", "recon_error", "features"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(whole, name)[row], atol=1e-6, rtol=0)
        assert int(alone.steps[0]) == int(whole.steps[row])


def test_predict_abstains_below_the_threshold_and_numbers_are_flat():
    params, task = small(**ONCE), a_task()
    made = begin(task, params, 0)
    for number in range(4):
        advance(made, number, task, params, 0)
    found = made(task.test.x)
    cut = float(found.trust.median())
    output, accepted, trust = made.predict(task.test.x, reject_below=cut)
    assert torch.equal(accepted, trust[:, 0] >= cut)
    assert torch.equal(output, found.output)
    task = Task(**{**vars(task), "outside": outside_sets(task.train.x.numpy(), task.test.x.numpy(), PARAMS.test)})
    facts = judge(made, task, how_to_use(made, task, params.reject), params, 0)
    assert all(isinstance(value, float) for value in facts.values())
    assert 0 <= facts["accuracy"] <= 1
    assert facts["auroc_uniform"] > 0.5
    assert facts["recon_mse_1T"] == pytest.approx(facts["recon_mse_20T"], rel=0.02)
    assert facts["last_step_20T"] < 1e-5 < facts["last_step"]
    longer = made(task.test.x, max_steps=200, rests=False)
    assert (longer.steps == 200).all()  # the sweep takes its steps
    torch.testing.assert_close(longer.s_star, found.s_star, rtol=0, atol=2e-2)
