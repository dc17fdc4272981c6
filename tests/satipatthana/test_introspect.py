"""What looks at the way: velocity, energy and features by hand, and trust beyond the rows of training."""

from __future__ import annotations

import torch

from lego.satipatthana.introspect import Vipassana, dynamics2, grounded8, velocity
from lego.satipatthana.log import SantanaLog
from tests.satipatthana.conftest import COMPAT, a_log, small, system


def test_r8_5_and_r8_8_velocity_and_energy_by_hand_and_by_row():
    log, states = a_log(), a_log().to_tensor()
    found = dynamics2(log.final, log)
    for row in range(6):
        last = int(log.lengths[row]) - 1
        steps = [states[t, row] - states[t - 1, row] for t in range(1, last + 1)]
        energy = sum(float(one.square().sum()) for one in steps) / last
        expected = torch.tensor([float(steps[-1].norm()), energy]).log1p()
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-6)
    assert found.shape == (6, 2)
    assert len(found[:, 1].unique()) == 6
    alone = dynamics2(log.rows(torch.tensor([3])).final, log.rows(torch.tensor([3])))
    torch.testing.assert_close(alone[0], found[3])  # unaffected by the other rows


def test_r3_7a_the_trust_of_the_note_reads_two_numbers_and_nothing_of_the_state():
    made = system(small(COMPAT))
    assert made.vipassana.trust_head[0].in_features == 2
    log = a_log()
    axes = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    probes, error = made.vitakka.read(), torch.zeros(6, 1)

    def trust(change) -> torch.Tensor:
        other = SantanaLog()
        energies = log.energies()
        for place, state in enumerate(log.to_tensor()):
            active = None if not place else energies[place - 1] > 0
            other.add(change(state), None if not place else energies[place - 1], active=active)
        return made.vipassana(change(log.final), other, probes, error, 5).trust.detach()

    plain = trust(lambda rows: rows)
    torch.testing.assert_close(trust(lambda rows: rows[:, axes]), plain)
    torch.testing.assert_close(trust(lambda rows: rows @ rotation), plain)
    assert float(plain.std()) > 0
    scaled = trust(lambda rows: torch.cat([3 * rows[:1], rows[1:]]))
    assert scaled[0] != plain[0]
    assert torch.equal(scaled[1:], plain[1:])  # only that row's trust changes


def test_r3_7_velocity_sees_the_state_that_is_shown():
    log = a_log()
    shown = log.final.roll(1, 0)
    assert (velocity(shown, log) > velocity(log.final, log)).float().mean() > 0.6
    whole = (shown - log.initial).norm(dim=1).log1p()
    torch.testing.assert_close(dynamics2(shown, log, "whole_way")[:, 0], whole)


def test_grounded_features_by_hand():
    log, probes, error = a_log(), torch.randn(4, 8), torch.rand(6, 1)
    found = grounded8(log.final, log, probes, error, 10)
    distances = torch.cdist(log.final, probes)
    p = torch.softmax(-distances, 1)
    assert found.shape == (6, 8)
    torch.testing.assert_close(found[:, 0], log.steps / 10)
    torch.testing.assert_close(found[:, 1], -(p * p.log()).sum(1))
    torch.testing.assert_close(found[:, 2], distances.amin(1).log1p())
    torch.testing.assert_close(found[:, 3], torch.cdist(log.initial, probes).amin(1).log1p())
    torch.testing.assert_close(found[:, 4], (log.final - log.initial).norm(dim=1).log1p())
    torch.testing.assert_close(found[:, 5], error[:, 0].log1p())
    torch.testing.assert_close(found[:, 6:], dynamics2(log.final, log))


def test_r3_7b_no_norm_over_the_batch_and_c_every_parameter_from_construction_on():
    for params in (small(), small(COMPAT)):
        look = Vipassana(8, params.vipassana)
        assert not [one for one in look.modules() if "Norm" in type(one).__name__]
        before = {id(one) for one in look.parameters()}
        look(a_log().final, a_log(), torch.randn(4, 8), torch.rand(6, 1), 10)
        assert {id(one) for one in look.parameters()} == before
        assert (
            look(a_log().final, a_log(), torch.randn(4, 8), torch.rand(6, 1), 10).context.shape[1] == look.context_dim
        )


def test_beyond_the_range_of_the_training_rows_trust_only_falls():
    head = Vipassana(8, small().vipassana).trust_head
    inside, direction = torch.zeros(1, 8), torch.ones(1, 8)
    trusted = [float(head(inside + scale * direction).detach()) for scale in (head.limit, 5, 50, 500)]
    assert trusted == sorted(trusted, reverse=True)
    assert trusted[-1] < trusted[0] - 100
