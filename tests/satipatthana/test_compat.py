"""Profile compat: sizes, modes and draws of the original, and what counts as reproduced."""

from __future__ import annotations

import pytest
import torch

from lego.satipatthana import jobs
from lego.satipatthana.paths import Way, damaged
from lego.satipatthana.specs import spec_of
from lego.satipatthana.system import Satipatthana
from lego.satipatthana.targets import REFERENCE, reproduced
from lego.satipatthana.training import freeze, run_stage
from tests.satipatthana.conftest import COMPAT, PARAMS, clusters, small, spied, system


def test_compat_has_as_many_parameters_as_the_original():
    """Section 11: 123,361 for digits, which pins its widths."""
    assert sum(one.numel() for one in Satipatthana((64,), 8, COMPAT).parameters()) == 123_361


def test_r3_3c_frozen_probes_are_read_as_at_inference_but_in_compat():
    train = clusters()
    for params, mode in ((small(), False), (small(COMPAT), True)):
        made = system(params)
        freeze(made)
        assert {name for name, one in made.named_children() if one.training} == ({"vitakka"} if mode else set())
        for number in (2, 3):
            run_stage(made, spec_of(number, made, train, params, 0), 0)
            assert not any(one.training for one in made.modules())  # in use it is as ever
    places = torch.arange(20)
    spec = spec_of(3, made, train, params, 0)
    found = spec.loss(places, torch.Generator())["loss"]
    made.vitakka.train()  # soft, where inference is hard
    with torch.no_grad():
        thought = made.samatha(train.x[places])
        soft = made.decoder(thought.state, made.look(thought)[0].context)
    torch.testing.assert_close(found, jobs.loss("classification", soft, train.y[places]))
    hard = jobs.loss("classification", made.eval()(train.x[places]).output, train.y[places])
    assert abs(float(hard) - float(found)) > 1e-4


@pytest.mark.parametrize(("kind", "share"), [("derangement", 0.0), ("permutation", 0.25)])
def test_r6_3_a_permutation_leaves_one_row_of_a_mismatch_with_itself_on_average(kind, share):
    made, x = system(small()), clusters(4).x
    clean, generator = Way.of(made, x), torch.Generator().manual_seed(0)
    settings = PARAMS.stage2.model_copy(update={"mismatch": kind})
    own = []
    for _ in range(300):
        rows = damaged(made, clean, {"mismatch": 4}, settings, None, generator)
        own.append((rows.state == rows.log.final).all(dim=1).float().mean())
    assert float(torch.stack(own).mean()) == pytest.approx(share, abs=0.05)


def test_rows_that_look_at_each_other_settle_with_their_batch(monkeypatch):
    """As the original's do: one coin for a batch that is drunk, one stop, one severity."""
    made, train, seen = system(small(COMPAT)), clusters(40), spied(monkeypatch)
    spec = spec_of(2, made, train, small(COMPAT, stage2__batch_size=20), 0)
    seen.clear()
    drawn = list(spec.draw(list(torch.arange(40).split(20)), torch.Generator().manual_seed(0)))
    assert seen == [5, 5] * 2  # augmented and drunk, batch by batch
    assert [len(rows.target) for rows in drawn] == [20, 20]


def test_what_counts_as_reproduced_follows_the_deviation_where_there_is_one():
    exact = {key: value for key, (value, _) in REFERENCE.items()}
    assert all(within for _, _, within in reproduced(exact).values())
    apart = reproduced(exact | {"accuracy": 0.927 - 0.13, "auroc_near": 0.668 - 0.051, "trust_clean": 0.53})
    assert {key for key, (_, _, within) in apart.items() if not within} == {"auroc_near"}
