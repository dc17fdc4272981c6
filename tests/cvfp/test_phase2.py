"""Phase 2 with fixed contexts: what changes, what must not, and that each position stands alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional

from lego.base.artifacts import ArtifactError, write_json, write_tensors
from lego.cvfp.passes import NonFiniteContextError, sequential_pass, shifted
from lego.cvfp.phase2 import FixedText, Score, logits_at, nll, score, train_head, zeroed
from lego.cvfp.run import MADE_OF, fixed_text, weights_digest
from lego.cvfp.sections import changed
from lego.cvfp.store import from_weights, load_network, parameter_counts, save
from lego.cvfp.text import Text
from tests.cvfp.conftest import PARAMS, SMALL, VOCAB, network, seed_params, text

SOUND = changed(PARAMS, SMALL | {"predict.epochs": 2, "predict.streams": 4, "phase2.batch_tokens": 32}, "test")


def fixed(model, tokens: int = 80, seed: int = 1) -> FixedText:
    ids = text(tokens, seed=seed)
    return FixedText(ids, sequential_pass(model, model.embed(ids).detach()))


def learnable(tokens: int, seed: int = 0) -> torch.Tensor:
    """Ids of which the next follows from the last two, most of the time."""
    generator = torch.Generator().manual_seed(seed)
    ids = [1, 2]
    for draw in torch.rand(tokens - 2, generator=generator).tolist():
        ids.append((ids[-1] + ids[-2]) % 8 if draw < 0.9 else int(draw * 10**6) % 8)
    return torch.tensor(ids)


@pytest.mark.parametrize("params", [seed_params(), SOUND], ids=["seed", "sound"])
def test_the_first_epoch_begins_at_the_perplexity_of_the_vocabulary(params):
    model = network(params)
    found = fixed(model)
    assert score(model, found, "v2").ppl == pytest.approx(VOCAB, rel=1e-4)
    _, result = train_head(model, found, fixed(model, 40, 2), params.phase2.model_copy(update={"batch_tokens": 0}), 0)
    assert math.exp(result.train[0]) == pytest.approx(VOCAB, rel=1e-4)


@pytest.mark.parametrize("params", [seed_params(), SOUND], ids=["seed", "sound"])
def test_positions_are_independent_given_the_contexts(params):
    model = network(params)
    torch.nn.init.normal_(model.token_output.weight)
    found = fixed(model)
    before = shifted(found.contexts, torch.zeros(24))
    together, _ = logits_at(model, found, before, torch.arange(79))
    alone = torch.cat([logits_at(model, found, before, torch.tensor([i]))[0] for i in range(79)])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(
        nll(model, found, "v2", 7)[0], functional.cross_entropy(together, found.ids[1:], reduction="none")
    )


def test_b16_contexts_of_stage_one_equal_those_of_the_forward_before_training():
    model = network(seed_params())
    found = fixed(model)
    _, made = logits_at(model, found, shifted(found.contexts, torch.zeros(24)), torch.arange(79))
    torch.testing.assert_close(made, found.contexts[:79], rtol=0, atol=1e-5)


def test_b17_contexts_depend_on_earlier_tokens():
    model = network(seed_params())
    ids = text(10)
    other = ids.clone()
    other[2] = (ids[2] + 1) % VOCAB
    a, b = (sequential_pass(model, model.embed(one).detach()) for one in (ids, other))
    assert torch.equal(a[:2], b[:2])
    assert (a[5] - b[5]).abs().max() > 1e-4


def test_b18_gradients_reach_what_they_should():
    model = network(seed_params())
    model.token_output.requires_grad_(True)
    torch.nn.init.normal_(model.token_output.weight)
    found = fixed(model)
    logits, _ = logits_at(model, found, shifted(found.contexts, torch.zeros(24)), torch.arange(79))
    functional.cross_entropy(logits, found.ids[1:]).backward()
    last, first = model.blocks[-1].layers[0], model.blocks[0].layers[0]
    assert not last.fnn.weight.grad[:24].any()
    assert not last.fnn.bias.grad[:24].any()
    assert last.context_norm.weight.grad is None or not last.context_norm.weight.grad.any()
    assert last.fnn.weight.grad[24:].any()
    assert first.fnn.weight.grad[:24].any()  # the next layer's token half reads the context
    assert model.token_output.weight.grad.any()


@pytest.mark.parametrize("params", [seed_params(), SOUND], ids=["seed", "sound"])
def test_b19_the_snapshot_keeps_the_contexts_valid(params, tmp_path):
    model = network(params)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train, validation = fixed(model), fixed(model, 40, 2)
    digests = train.sha256(), validation.sha256()
    after, result = train_head(model, train, validation, params.phase2, 0)
    assert (train.sha256(), validation.sha256()) == digests
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert result.updates >= len(result.train)
    save(model, params, tmp_path, updates=3)
    snapshot, _, facts = load_network(tmp_path)
    assert facts["updates"] == 3
    again = sequential_pass(snapshot, snapshot.embed(validation.ids).detach())
    assert torch.equal(again, validation.contexts)
    from_trained = sequential_pass(after, after.embed(validation.ids).detach())
    same = torch.allclose(from_trained, validation.contexts, atol=1e-6)
    assert same == bool(params.model.token_structure)  # with shared parameters phase 2 moved them


def test_contexts_of_another_text_or_network_are_refused(tmp_path):
    model, ids = network(SOUND), text(60)
    splits = Text(dict.fromkeys(("train", "validation", "test"), ids), VOCAB, torch.ones(VOCAB), "")
    contexts = sequential_pass(model, model.embed(ids).detach())
    write_tensors(tmp_path / "train.safetensors", {"contexts": contexts})
    write_json(tmp_path / MADE_OF, splits.digests() | {"network": weights_digest(model)})
    assert torch.equal(fixed_text(splits, "train", tmp_path, model).contexts, contexts)
    other = Text({**splits.ids, "train": ids.flip(0)}, VOCAB, splits.token_bytes, "")
    with pytest.raises(ArtifactError, match=r"train\.safetensors: is not of this text; run dvc repro"):
        fixed_text(other, "train", tmp_path, model)
    with pytest.raises(ArtifactError, match=r"train\.safetensors: is not of this network; run dvc repro"):
        fixed_text(splits, "train", tmp_path, network(SOUND, seed=1))


def test_the_loss_of_ema_kinds_needs_no_contexts_and_that_of_a_batch_does():
    model = network(seed_params(phase1__diversity="ema_live"))
    model(context=torch.randn(5, 24), token=torch.randn(5, 16))
    assert float(model.get_distribution_loss().detach()) > 0
    with pytest.raises(ValueError, match="the diversity centroid_batch is computed from contexts; give them"):
        network(seed_params()).get_distribution_loss()


def test_freeze_context_trains_the_head_alone():
    params = seed_params(phase2__freeze_context=True)
    model = network(params)
    after, _ = train_head(model, fixed(model), fixed(model, 40, 2), params.phase2, 0)
    changed_names = {
        name for name, tensor in after.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])
    }
    assert changed_names == {"token_output.weight", "token_output.bias"}


@pytest.mark.parametrize("mode", ["v1_mse", "propagate"])
def test_9_10_the_older_forms_of_phase_2_learn_too(mode):
    params = seed_params(phase2__mode=mode, phase2__epochs=4, phase2__patience=4)
    model = network(params)
    ids = learnable(120)
    train = FixedText(ids, sequential_pass(model, model.embed(ids).detach()))
    after, result = train_head(model, train, train, params.phase2, 0)
    assert result.train[-1] < result.train[0]
    judged = score(after, zeroed(train), mode)  # as it was trained: C* is not read
    assert judged.loss == pytest.approx(min(one.loss for one in result.validation), rel=1e-5)
    with torch.no_grad():  # token by token, by hand
        context, losses = torch.zeros(1, 24), []
        for here, following in itertools.pairwise(ids):
            context, token = after(context=context, token=after.embed(here[None]))
            seen = context if mode == "v1_mse" else torch.zeros_like(context)
            losses.append(functional.cross_entropy(after.logits(context=seen, token=token), following[None]))
    assert judged.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


@pytest.mark.parametrize("mode", ["v2", "v1_mse", "propagate"])
def test_a_step_in_chunks_is_the_step_as_a_whole(mode):
    found = []
    for chunk in (8192, 7):
        params = seed_params(phase2__mode=mode, phase2__epochs=3, phase2__chunk_tokens=chunk)
        model = network(params)
        after, result = train_head(model, fixed(model), fixed(model, 40, 2), params.phase2, 0)
        found.append((result.train, after.state_dict()["token_output.weight"]))
        assert result.updates == 3
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)


def test_patience_keeps_the_best_epoch():
    params = seed_params(phase2__epochs=30, phase2__patience=2, phase2__lr=0.05)
    model = network(params)
    after, result = train_head(model, fixed(model), fixed(model, 40, 2), params.phase2, 0)
    assert len(result.validation) == result.best + 2
    losses = [one.loss for one in result.validation]
    assert losses.index(min(losses)) == result.best - 1
    assert score(after, fixed(model, 40, 2), "v2").loss == pytest.approx(min(losses), abs=1e-5)
    assert Score(10_000.0, 0.0).ppl < math.inf


@pytest.mark.parametrize("mode", ["v1_mse", "propagate"])
def test_b27_phase_2_names_the_token_whose_context_it_cannot_hand_on(mode):
    params = seed_params(model__layernorm_mix=0.0, phase2__mode=mode, phase2__chunk_tokens=40)
    model = network(params)
    with torch.no_grad():
        model.token_embedding.weight[VOCAB - 1] = torch.inf
    ids = text(80, VOCAB - 1)
    ids[57] = VOCAB - 1
    fixed = FixedText(ids, torch.zeros(80, 24))
    with pytest.raises(NonFiniteContextError, match="phase 2: the context of token 57 is not finite"):
        train_head(model, fixed, fixed, params.phase2, 0)


def test_weights_come_from_a_plain_dict_or_a_clear_error():
    params = seed_params()
    weights = network(params).state_dict()
    again = from_weights(weights, params)
    assert again.state_dict().keys() == weights.keys()
    with pytest.raises(RuntimeError, match=r"the weights lack token_embedding\.weight; lego\.cvfp\.model lists"):
        from_weights({}, params)
    with pytest.raises(RuntimeError, match="the weights do not fit"):
        from_weights(weights | {"blocks.0.norm.weight": torch.zeros(3)}, params)
    with pytest.raises(RuntimeError, match="the weights do not fit"):
        from_weights(weights | {"blocks.0.layers.0.fnn.bias": torch.zeros(3)}, params)
    counts = parameter_counts(again)
    assert sum(counts.values()) == sum(p.numel() for p in again.parameters())
