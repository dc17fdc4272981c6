"""What makes a state settle: probes, the contraction, the stop rule, and how a run is damaged on purpose."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lego.satipatthana.dynamics import Drunk, Sati, Vicara, Vitakka, settle
from lego.satipatthana.specs import spec_of
from lego.satipatthana.training import run_stage
from tests.satipatthana.conftest import COMPAT, PARAMS, clusters, small, system


def test_r3_3a_gates_say_so_and_do_not_zero_and_b_probes_are_of_length_1_when_read():
    vitakka = Vitakka(8, small(vitakka__inference_gate_threshold=0.99).vitakka).eval()
    z = torch.randn(20, 8)
    with torch.no_grad():
        vitakka.probes.mul_(1.35)
    start, meta = vitakka(z)
    assert meta.raw_scores.abs().max() <= 1 + 1e-6
    assert not meta.gate_open.any()
    opened = Vitakka(8, small(vitakka__inference_gate_threshold=-1.0).vitakka).eval()
    opened.load_state_dict(vitakka.state_dict())
    assert opened(z)[1].gate_open.all()
    assert torch.equal(start, opened(z)[0])  # a closed gate leaves the start alone
    assert start.norm(dim=1).min() > 0.1
    zeroed = Vitakka(8, small(COMPAT, vitakka__inference_gate_threshold=0.99).vitakka).eval()
    assert not zeroed(z)[0].any()  # the original: every rejected input is one point
    rows = torch.randn(4, 8)
    vitakka.load_probes(rows)
    torch.testing.assert_close(vitakka.probes.detach(), functional.normalize(rows, dim=1))
    with pytest.raises(ValueError, match=r"probes must be \(4, 8\), got \(5, 8\)"):
        vitakka.load_probes(torch.randn(5, 8))


def test_r3_3a_the_gate_of_inference_is_learned_so_that_train_rows_are_known():
    vitakka, generator = Vitakka(8, small().vitakka).eval(), torch.Generator().manual_seed(0)
    z = vitakka.read().detach().repeat(125, 1) + 0.1 * torch.randn(500, 8, generator=generator)
    assert vitakka(z)[1].gate_open.all()  # open until it is learned
    vitakka.learn_gate(z)
    _, meta = vitakka(z)
    assert float(meta.gate_open.double().mean()) == pytest.approx(0.99, abs=0.003)
    assert not vitakka(-vitakka.read().sum(dim=0, keepdim=True))[1].gate_open.any()  # away from all probes
    assert vitakka.train()(z)[1].gate_open.all()
    fixed = Vitakka(8, small(vitakka__inference_gate_threshold=0.6).vitakka).eval()
    fixed.learn_gate(z)
    assert float(fixed.learned_gate) == -1


def test_r3_3c_soft_attention_by_hand_and_the_same_in_training_and_inference():
    vitakka, z = Vitakka(8, small().vitakka), torch.randn(6, 8)
    probes = functional.normalize(vitakka.probes, dim=1)
    scores = functional.normalize(z, dim=1) @ probes.T
    weights = torch.softmax(scores / 0.2, dim=1)
    vitakka.train()
    start, meta = vitakka(z)
    torch.testing.assert_close(start, 0.5 * z + 0.5 * weights @ probes)
    torch.testing.assert_close(meta.probs, weights)
    assert torch.equal(meta.winner_id, scores.argmax(1))
    assert torch.equal(vitakka.eval()(z)[0], start)


@pytest.mark.parametrize("kind", ["standard", "probe_mixed", "probe_picked"])
def test_r3_4_the_map_is_a_contraction_whose_fixed_point_depends_on_the_input(kind):
    params = small(vicara__kind=kind, sati__kind="fixed")
    vitakka, vicara, sati = Vitakka(8, params.vitakka), Vicara(8, 4, params.vicara), Sati(params.sati)
    with torch.no_grad():
        vicara.inner.mul_(7)  # training may grow it; the bound holds all the same
    assert float(torch.linalg.matrix_norm(vicara.contraction().detach(), 2).max()) == pytest.approx(1, abs=1e-5)
    z = torch.randn(10, 8)
    _, meta = vitakka(z)
    prepared = vicara.prepare(z, meta)
    a, b = torch.randn(10, 8), torch.randn(10, 8)
    factor = params.vicara.inertia + (1 - params.vicara.inertia) * params.vicara.rho
    apart = (vicara(a, prepared) - vicara(b, prepared)).norm(dim=1)
    assert (apart <= factor * (a - b).norm(dim=1) + 1e-6).all()
    ends = [settle(start, z, meta, vicara, sati, 300).state for start in (a, b)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)
    rows = settle(a, z, meta, vicara, sati, 20).log.to_tensor()
    distances = (rows - ends[0]).norm(dim=2)
    assert (distances <= factor ** torch.arange(21)[:, None] * distances[0] + 1e-4).all()
    assert len(torch.unique((ends[0] / 1e-3).round(), dim=0)) == 10  # one for each input


def test_r9_1_the_map_without_the_input_forgets_it():
    params = small(COMPAT)
    vitakka, vicara, sati = Vitakka(8, params.vitakka), Vicara(8, 4, params.vicara), Sati(params.sati)
    with torch.no_grad():
        for body in vicara.bodies:
            body[3].weight.mul_(0.1)  # as the theory has it: a contraction of the state alone
    z = torch.randn(10, 8)
    start, meta = vitakka.train()(z)
    end = settle(start, z, meta, vicara, sati, 400).state
    assert (end - end[0]).abs().max() < 1e-4


def test_r9_1_twenty_times_the_steps_change_nothing_of_what_a_trained_system_knows():
    made, train = system(small()), clusters(90)
    for number in range(2):
        run_stage(
            made, spec_of(number, made, train, small(stage1__epochs=25, stage1__lr=0.01, stage1__batch_size=16), 0), 0
        )
    horizon = PARAMS.samatha.max_steps
    short, long = (made.samatha(train.x, max_steps=factor * horizon, rests=False) for factor in (1, 20))
    near, far = (float(made.recon_error(one.state, train.x).mean()) for one in (short, long))
    assert far == pytest.approx(near, rel=0.02)
    assert float((made.aux(short.state).argmax(1) == train.y).float().mean()) > 0.9
    assert torch.equal(made.aux(short.state).argmax(1), made.aux(long.state).argmax(1))
    assert float(((short.pair[0] - short.pair[1]).norm(dim=1) / short.state.norm(dim=1)).max()) < 1e-2


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 2, 9, 60]), st.integers(0, 10**6))
def test_r3_5_a_row_settles_alone_as_in_any_batch(rows, seed):
    made = system(small(sati__eps_rel=0.05, vipassana__prototypes=40))
    made.vipassana.prototypes.copy_(torch.randn(40, 8, generator=torch.Generator().manual_seed(seed)))
    x = torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed))
    together = made(x)
    for row in range(0, rows, max(1, rows // 7)):
        alone = made(x[row : row + 1])
        assert int(alone.steps) == int(together.steps[row])
        assert bool(alone.known) == bool(together.known[row])
        torch.testing.assert_close(alone.s_star[0], together.s_star[row], rtol=0, atol=1e-6)
        for name in ("trust", "output", "v_ctx", "conformity", "confidence", "recon_error", "features"):
            one, many = getattr(alone, name)[0], getattr(together, name)[row]
            torch.testing.assert_close(one, many, rtol=0, atol=2e-6, msg=name)


def test_r3_5_the_original_asks_the_batch_and_ours_the_row():
    before, state = torch.zeros(3, 8), torch.zeros(3, 8)
    state[0], state[1], state[2] = 1e-6, 1.0, 1e-6
    rule = small(sati__eps_rel=0.0, sati__eps_abs=1e-2, sati__min_steps=2).sati
    assert Sati(rule)(before, state, 2).tolist() == [True, False, True]
    assert not Sati(rule)(before, state, 1).any()  # too early
    whole = rule.model_copy(update={"per_sample": False})
    assert not Sati(whole)(before, state, 2).any()


@pytest.mark.parametrize("steps", [3, PARAMS.samatha.max_steps])
def test_r8_1_stability_reaches_every_parameter_of_vicara_and_falls(steps):
    made, x = system(small(sati__kind="fixed")).train(), torch.randn(16, 12)
    before = None
    optimizer = torch.optim.Adam(made.vicara.parameters(), lr=1e-2)
    for _ in range(11):
        last, previous = made.samatha(x, max_steps=steps).pair
        loss = (last - previous).square().sum(1).mean()
        before = before or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.vicara.parameters())
        optimizer.step()
    assert float(loss.detach()) <= 0.5 * before


def test_r8_4_gates_are_open_and_states_differ_from_the_start():
    made = system(PARAMS, (64,))
    with torch.no_grad():
        found = made.train().samatha(torch.randn(200, 64))
    assert found.meta.gate_open.all()
    rows = functional.normalize(found.state, dim=1)
    cosines = rows @ rows.T
    assert float((cosines.sum() - 200) / (200 * 199)) < 0.95
    assert len(torch.unique((found.state / 1e-3).round(), dim=0)) > 198


SOBER = {"samatha__drunk_skip_prob": 0.0, "samatha__drunk_perturbation_std": 0.0, "samatha__drunk_s0_std": 0.0}


def test_r8_11_every_number_of_the_damage_counts_and_none_of_it_stays():
    x = torch.randn(40, 12)

    def states(**changes):
        made = system(small(sati__kind="fixed", **(SOBER | changes))).requires_grad_(False)
        return made, made.samatha(x, drunk=True, generator=torch.Generator().manual_seed(0)).state

    made, none = states()
    clean = made.samatha(x).state
    assert torch.equal(none, clean)
    _, skipped = states(samatha__drunk_skip_prob=1.0)
    assert torch.equal(skipped, made.samatha(x).log.initial)
    for key, values in (
        ("samatha__drunk_skip_prob", (0.2, 0.9)),
        ("samatha__drunk_perturbation_std", (0.1, 0.5)),
    ):
        few, many = ((states(**{key: value})[1] - clean).norm(dim=1).mean() for value in values)
        assert 0 < float(few) < float(many), key
    start = {value: states(samatha__drunk_s0_std=value, samatha__max_steps=2)[1] for value in (0.0, 0.1, 0.5)}
    assert (start[0.1] - start[0.0]).norm() < (start[0.5] - start[0.0]).norm()
    with pytest.raises(ValueError, match="a drunk run needs a generator"):
        made.samatha(x, drunk=True)
    with_dropout = system(small(adapter__dropout=0.1, **SOBER))
    rates = [one.p for one in with_dropout.modules() if isinstance(one, torch.nn.Dropout)]
    damaged = with_dropout.samatha(x, drunk=True, generator=torch.Generator().manual_seed(0)).state
    assert not torch.equal(damaged, with_dropout.samatha(x).state)
    assert [one.p for one in with_dropout.modules() if isinstance(one, torch.nn.Dropout)] == rates == [0.1, 0.1]
    assert not any(one.training for one in with_dropout.modules())


def test_r8_11_no_number_of_the_damage_is_in_the_code():
    tree = ast.parse(inspect.getsource(Drunk))
    numbers = [one.value for one in ast.walk(tree) if isinstance(one, ast.Constant) and type(one.value) in (int, float)]
    assert set(numbers) <= {1}
    few, many = (
        system(small(adapter__dropout=0.1, samatha__drunk_dropout_min=rate, **SOBER)).requires_grad_(False)
        for rate in (0.1, 0.9)
    )
    x = torch.randn(400, 12, generator=torch.Generator().manual_seed(4))
    moved = [
        float(
            (
                one.samatha(x, drunk=True, generator=torch.Generator().manual_seed(0)).latent - one.samatha(x).latent
            ).norm()
        )
        for one in (few, many)
    ]
    assert 0 < moved[0] < moved[1]


def test_r6_2_draws_are_per_sample_and_a_skipped_step_is_no_rest():
    params = small(samatha__drunk_skip_prob=0.5, sati__eps_abs=1e-3, sati__min_steps=1)
    made, x = system(params), torch.randn(200, 12)
    log = made.samatha(x, drunk=True, generator=torch.Generator().manual_seed(0)).log
    skipped = log.energies()[0] == 0
    assert 60 < int(skipped.sum()) < 140  # not one coin for all
    assert (log.lengths[skipped] > 2).all()
    drunk = Drunk(params.samatha.model_copy(update={"drunk_per_sample": False}), torch.Generator().manual_seed(1))
    assert len(drunk.step(torch.zeros(50, 8), torch.ones(50, 8))[1].unique()) == 1  # the original's one coin
