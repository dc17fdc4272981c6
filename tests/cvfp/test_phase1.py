"""Phase 1: parity with an implementation written from the specification alone, and every recorded bug of it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional

from lego.cvfp import losses, modes, passes
from lego.cvfp.losses import ZeroGradientError, centroid_batch, cvfp_loss, vicreg
from lego.cvfp.passes import NonFiniteContextError, sequential_pass
from lego.cvfp.phase1 import ContextTrainer
from lego.cvfp.ranks import effective_rank
from lego.cvfp.run import first_phase
from lego.cvfp.store import from_weights
from lego.cvfp.text import Text
from tests.cvfp.conftest import VOCAB, network, seed_params, text, trained


def reference(weights: dict, ids: torch.Tensor, blocks: int, iterations: int, w: float, lr: float) -> list:
    """Contexts of every iteration from section 2 and 3.1 of the specification: plain tensors, one formula a line."""
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    names = [name for name in weights if name.startswith("blocks.")]
    for name in names:
        weights[name].requires_grad_()
    d = len(weights["blocks.0.layers.0.context_norm.weight"])
    norm = weights["embed_norm.weight"], weights["embed_norm.bias"]
    tokens = functional.layer_norm(weights["token_embedding.weight"][ids], norm[0].shape, *norm)

    def f(c, t):
        for block in range(blocks):
            at = f"blocks.{block}.layers.0."
            u = (torch.cat([c, t], -1) @ weights[at + "fnn.weight"].T + weights[at + "fnn.bias"]).clamp_min(0)
            c, t = c + u[:, :d], t + u[:, d:]
            c = functional.layer_norm(c, (d,), weights[at + "context_norm.weight"], weights[at + "context_norm.bias"])
            t = functional.layer_norm(
                t, t.shape[1:], weights[at + "token_norm.weight"], weights[at + "token_norm.bias"]
            )
        return c

    found, context = [], torch.zeros(1, d)
    with torch.no_grad():
        rows = [context := f(context, token[None]) for token in tokens]
    found.append(torch.cat(rows))
    moments = {name: (torch.zeros_like(weights[name]), torch.zeros_like(weights[name])) for name in names}
    for step in range(1, iterations):
        before = found[-1]
        x = f(torch.cat([before[-1:], before[:-1]]), tokens)
        loss = (1 - w) * ((x - before) ** 2).mean() - w * (x - x.mean(0)).norm() / len(x)
        gradients = torch.autograd.grad(loss, [weights[name] for name in names], allow_unused=True)
        total = math.sqrt(sum(float((one**2).sum()) for one in gradients if one is not None))
        scale = min(1.0, 1.0 / (total + 1e-6))
        with torch.no_grad():
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is None:
                    continue
                m, v = moments[name]
                m.mul_(0.9).add_(0.1 * scale * gradient)
                v.mul_(0.999).add_(0.001 * (scale * gradient) ** 2)
                weights[name] -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        found.append(x.detach())
        if iterations == 2 and float(((x - before) ** 2).mean(1).lt(0.1).float().mean()) >= 0.95:
            break
    return found


@pytest.mark.parametrize(("early", "iterations"), [(True, 2), (False, 5)])
@pytest.mark.parametrize("chunk", [8192, 17])
def test_a1_every_iteration_matches_an_independent_implementation(early, iterations, chunk):
    params = seed_params(
        model__layer_structure=[1, 1, 1],
        phase1__early_stop=early,
        phase1__min_updates=0,
        phase1__max_iterations=iterations if not early else 10,
        phase1__chunk_tokens=chunk,
    )
    weights = network(params, seed=3).state_dict()
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("token_output")}
    ids = text(200)
    model = from_weights(weights, params)
    trainer = ContextTrainer(model, model.embed(ids).detach(), params.phase1)
    found = [one.contexts.values for one in trainer.iterations()]
    expected = reference(weights, ids, 3, iterations, 0.9, 0.002)
    assert len(found) == len(expected) == iterations  # with early stop it ends after one step (finding 1.2)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_b1_the_loss_sees_norms():
    x = torch.randn(5, 4, requires_grad=True)
    loss = cvfp_loss(x, 2 * x.detach())
    assert loss.item() == pytest.approx(x.detach().square().mean().item())
    assert (x - torch.autograd.grad(loss, x)[0]).norm() > x.norm()


@pytest.mark.parametrize("diversity", [*losses.BATCH, "centroid_ema", "ema_target", "ema_live"])
@pytest.mark.parametrize("mode", ["parallel", "sequential_batch"])
def test_b5_every_loss_moves_weights(diversity, mode):
    past = diversity in ("ema_target", "centroid_ema")  # of which the first step of all has no gradient
    params = seed_params(
        phase1__diversity=diversity,
        phase1__mode=mode,
        phase1__max_iterations=3 if past else 2,
        phase1__dist_reg_weight=1.0,
    )
    before = network(params).state_dict()
    trainer, iterations = trained(params, tokens=20)
    assert trainer.updates == (2 if past else 1)
    after = trainer.model.state_dict()
    moved = [name for name in before if name.startswith("blocks") and not torch.equal(before[name], after[name])]
    assert any(name.endswith("fnn.weight") for name in moved)
    assert all(math.isfinite(one.diversity) for one in iterations[1:])


def test_b5_a_loss_without_gradient_is_refused_or_warned_of():
    params = seed_params(phase1__diversity="ema_buffer")
    with pytest.raises(ZeroGradientError, match=r"phase1\.diversity: ema_buffer has weight 0\.9 and no gradient"):
        trained(params)
    allowed = seed_params(phase1__diversity="ema_buffer", phase1__allow_zero_gradient_loss=True)
    with pytest.warns(UserWarning, match="trains nothing"):
        trainer, _ = trained(allowed)
    assert trainer.updates > 0
    with pytest.raises(ZeroGradientError, match=r"phase1\.diversity: centroid_ema has weight 0\.9"):
        trained(seed_params(phase1__diversity="centroid_ema", phase1__max_iterations=2))  # one step, which has no past
    trained(seed_params(phase1__diversity="centroid_ema", phase1__max_iterations=3))
    online = seed_params(phase1__mode="sequential_online")  # the centroid of one row is the row
    with pytest.raises(ZeroGradientError, match="centroid_batch"):
        trained(online)


def test_b11_nothing_stops_before_min_updates_and_all_iterations_step():
    trainer, iterations = trained(seed_params(phase1__convergence_threshold=0.0), tokens=200)
    assert (len(iterations), trainer.updates) == (10, 9)
    assert [one.converged for one in iterations] == [0] * 10
    _, eager = trained(seed_params(phase1__min_updates=0), tokens=200)
    assert len(eager) == 2  # the first parallel pass repeats the sequential one under the same weights
    assert eager[1].converged == 199
    _, patient = trained(seed_params(phase1__min_updates=4), tokens=200)
    assert len(patient) >= 5


def test_b12_contexts_know_their_weights_and_are_recomputed_after_the_last_step():
    trainer, iterations = trained(seed_params())
    assert [one.contexts.weights_version for one in iterations] == [max(0, one.number - 1) for one in iterations]
    final = trainer.final(iterations[-1])
    assert final.weights_version == trainer.updates == iterations[-1].contexts.weights_version + 1
    before = iterations[-1].contexts.values
    expected = passes.parallel_pass(trainer.model, trainer.embeddings, before, before[-1], 10**6)
    assert torch.equal(final.values, expected)
    legacy, last = trained(seed_params(phase1__recompute_contexts=False))
    assert legacy.final(last[-1]) is last[-1].contexts


@pytest.mark.parametrize("w", [0.0, 0.01, 0.5, 0.9, 1.0])
def test_b13_a_negative_loss_is_a_loss(w):
    trainer, iterations = trained(seed_params(phase1__dist_reg_weight=w, phase1__early_stop=False))
    assert trainer.updates == 9
    assert trainer.skipped == 0
    assert iterations[-1].diversity < 0


def test_b13_only_what_is_not_finite_is_skipped_and_counted(monkeypatch):
    real, calls = losses.cvfp_loss, itertools.count()

    def sometimes(contexts, target):
        return real(contexts, target) * (math.nan if next(calls) == 3 else 1.0)

    monkeypatch.setattr(modes, "cvfp_loss", sometimes)
    trainer, _ = trained(seed_params(phase1__early_stop=False))
    assert (trainer.updates, trainer.skipped) == (8, 1)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_b14_and_b15_contexts_follow_ids_and_not_positions():
    model = network(seed_params())
    ids = text(12)
    embeddings = model.embed(torch.cat([text(5, seed=9), ids])).detach()
    alone = sequential_pass(model, model.embed(ids).detach())
    moved = sequential_pass(model, embeddings[5:], start=torch.zeros(24))  # the same ids at other positions of a text
    assert torch.equal(alone, moved)
    same = torch.tensor([7, 3, 7, 3, 7])
    context = torch.randn(24).expand(5, -1)
    after, _ = model(context=context, token=model.embed(same).detach())
    assert torch.equal(after[0], after[2])
    assert torch.equal(after[1], after[3])
    assert not torch.equal(after[0], after[1])


def test_b27_without_layer_norm_a_clear_error_names_the_token():
    params = seed_params(model__layernorm_mix=0.0, model__init_weight_std=0.6)
    model = network(params)
    trainer = ContextTrainer(model, model.embed(text(1000)).detach(), params.phase1)
    with pytest.raises(NonFiniteContextError, match=r"the context of token \d+ is not finite; set model.layernorm_mix"):
        list(trainer.iterations())


def test_b28_the_centroid_is_blind_to_rank_and_vicreg_is_not():
    generator = torch.Generator().manual_seed(0)
    one = functional.layer_norm(torch.randn(64, generator=generator), (64,))
    flat = torch.cat([one.expand(500, -1), -one.expand(500, -1)])
    full = functional.layer_norm(torch.randn(1000, 64, generator=generator), (64,))
    assert float(centroid_batch(flat)) == pytest.approx(-0.25298, abs=1e-4)
    assert float(centroid_batch(full)) == pytest.approx(-0.2529, abs=1e-3)
    assert effective_rank(flat) == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(full) == pytest.approx(62.5, abs=0.5)
    assert vicreg(flat) > 10 * vicreg(full)


def test_b29_per_token_normalization_removes_the_number_of_tokens():
    x = torch.randn(50, 8)
    assert float(centroid_batch(x) / centroid_batch(x.repeat(4, 1))) == pytest.approx(2.0)
    for kind in ("centroid_batch", "oacd"):
        normalized = [losses.diversity_of(one, kind, "per_token") for one in (x, x.repeat(4, 1))]
        assert float(normalized[0]) == pytest.approx(float(normalized[1]))


def test_b27_an_overflow_of_the_loss_is_not_called_a_missing_gradient():
    """Contexts that are huge and still finite: the step is skipped and counted."""
    params = seed_params(model__layernorm_mix=0.0, phase1__max_iterations=3, phase1__early_stop=False)
    trainer, iterations = trained(params, tokens=100)
    assert not math.isfinite(iterations[-1].diversity)
    assert (trainer.updates, trainer.skipped) == (0, 2)
    of_text = Text({"train": text(100)}, VOCAB, torch.ones(VOCAB), "heldout_in_vocab")
    with pytest.raises(
        NonFiniteContextError, match=r"iteration 2: .* 1 steps were skipped; .* is that of token \d+; set"
    ):
        first_phase(params, of_text, 0)  # the pipeline stops, since no number is one
