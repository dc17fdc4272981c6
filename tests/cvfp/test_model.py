"""CVFP's layers against hand-computed numbers, sizes of the original, and statistics that layers own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from lego.cvfp.model import LLM, CVFPBlock, CVFPLayer, NewLLMResidual
from lego.cvfp.moments import RunningMoments
from lego.cvfp.passes import parallel_pass, sequential_pass, settle
from lego.cvfp.phase1 import ContextTrainer
from lego.cvfp.sections import changed
from tests.cvfp.conftest import PARAMS, SMALL, VOCAB, network, seed_params, text


def layer(**changes) -> CVFPLayer:
    arguments = {
        "context_dim": 3,
        "embed_dim": 2,
        "hidden_dim": 5,
        "layernorm_mix": 0.0,
        "update": "relu",
        "writes": "both",
        "diversity": "none",
        "ema_momentum": 0.99,
    }
    return CVFPLayer(**(arguments | changes))


def test_a_layer_is_the_formula_of_the_specification():
    one = layer(layernorm_mix=0.3)
    torch.nn.init.normal_(one.context_norm.weight)
    torch.nn.init.normal_(one.token_norm.bias)
    c, t = torch.randn(4, 3), torch.randn(4, 2)
    u = torch.relu(torch.cat([c, t], 1) @ one.fnn.weight.T + one.fnn.bias)
    after_c, after_t = c + u[:, :3], t + u[:, 3:]
    expected_c = 0.7 * after_c + 0.3 * functional.layer_norm(
        after_c, (3,), one.context_norm.weight, one.context_norm.bias
    )
    expected_t = 0.7 * after_t + 0.3 * functional.layer_norm(after_t, (2,), one.token_norm.weight, one.token_norm.bias)
    context, token = one(context=c, token=t)
    torch.testing.assert_close(context, expected_c)
    torch.testing.assert_close(token, expected_t)


def test_the_gated_update_is_signed_and_writes_its_half_alone():
    one = layer(update="gated", writes="context")
    c, t = torch.randn(200, 3), torch.randn(200, 2)
    context, token = one(context=c, token=t)
    assert token is t
    assert (context < c).any()
    assert (context > c).any()
    z = torch.cat([c, t], 1)
    gate = torch.sigmoid(one.gate(z))
    torch.testing.assert_close(context, (1 - gate) * c + gate * torch.tanh(one.proposal(torch.relu(one.fnn(z)))))
    assert "context_norm.weight" not in one.state_dict()  # no LayerNorm without a share of it


def test_b8_hidden_dim_must_be_the_sum_in_layer_and_model():
    with pytest.raises(ValueError, match="hidden_dim must be context_dim \\+ embed_dim = 5, got 6"):
        layer(hidden_dim=6)
    params = seed_params()
    wrong = params.model.model_dump(exclude={"embedding", "embedding_from", "train_embedding"}) | {"hidden_dim": 41}
    with pytest.raises(ValueError, match="= 40, got 41"):
        NewLLMResidual(**wrong, vocab_size=9, diversity="none", normalize="none", ema_momentum=0.9)


def test_b9_arguments_are_named_and_a_swap_fails():
    one, model = layer(), network(seed_params())
    with pytest.raises(TypeError):
        one(torch.zeros(1, 3), torch.zeros(1, 2))
    with pytest.raises(TypeError):
        model(torch.zeros(1, 24), torch.zeros(1, 16))
    with pytest.raises(ValueError, match=r"context must be \(n, 24\) and token \(n, 16\), got \(1, 16\) and \(1, 24\)"):
        model(context=torch.zeros(1, 16), token=torch.zeros(1, 24))


def test_b9_a_parallel_pass_under_the_same_weights_equals_the_sequential_one_from_the_second_token():
    model = network(seed_params())
    embeddings = model.embed(text(80)).detach()
    first = sequential_pass(model, embeddings)
    second = parallel_pass(model, embeddings, first, first[-1], chunk=7)
    torch.testing.assert_close(second[1:], first[1:], rtol=0, atol=1e-4)
    assert (second[0] - first[0]).abs().max() > 1e-3


def test_b10_two_blocks_and_two_tokens_by_hand():
    """The token vector goes through all blocks of a position and restarts from its embedding at the next."""
    blocks = [CVFPBlock(layers=[layer(context_dim=1, embed_dim=1, hidden_dim=2)]) for _ in range(2)]
    with torch.no_grad():
        for block, (a, b, c, d) in zip(blocks, ((1.0, 2.0, 0.5, -1.0), (0.0, 1.0, 2.0, 0.0)), strict=True):
            block.layers[0].fnn.weight.copy_(torch.tensor([[a, b], [c, d]]))
            block.layers[0].fnn.bias.zero_()

    params = seed_params(
        model__context_dim=1,
        model__embed_dim=1,
        model__hidden_dim=2,
        model__layer_structure=[1, 1],
        model__layernorm_mix=0.0,
    )
    model = network(params)
    for mine, block in zip(model.blocks, blocks, strict=True):
        mine.load_state_dict(block.state_dict())

    # token 1: c 0, t 1 -> block 1: u = (2, 0): c 2, t 1 -> block 2: u = (1, 4): c 3, t 5
    context, token = model(context=torch.tensor([[0.0]]), token=torch.tensor([[1.0]]))
    assert (context.item(), token.item()) == (3.0, 5.0)
    # token 2 restarts from its embedding 2: u = (3 + 4, 1.5 - 2 < 0): c 10, t 2 -> u = (2, 20): c 12, t 22
    context, token = model(context=context, token=torch.tensor([[2.0]]))
    assert (context.item(), token.item()) == (12.0, 22.0)


def test_parity_sizes_of_the_original():
    with torch.device("meta"):
        params = seed_params(model__context_dim=768, model__embed_dim=768, model__hidden_dim=1536)
        sizes = params.model.model_dump(exclude={"embedding", "embedding_from", "train_embedding"})
        model = NewLLMResidual(
            **(sizes | {"layer_structure": [1] * 6}),
            vocab_size=50257,
            diversity="centroid_batch",
            normalize="none",
            ema_momentum=0.99,
        )
    assert sum(p.numel() for p in model.parameters()) == 130_027_345
    head = sum(p.numel() for p in model.token_output.parameters())
    blocks = sum(p.numel() for block in (*model.blocks, model.embed_norm) for p in block.parameters())
    assert (blocks, head, blocks + head) == (14_184_960, 77_245_009, 91_429_969)
    assert LLM is NewLLMResidual


def test_b16_one_way_from_ids_to_vectors():
    model = network(seed_params())
    ids = torch.arange(5)
    expected = functional.layer_norm(
        model.token_embedding.weight[ids], (16,), model.embed_norm.weight, model.embed_norm.bias
    )
    torch.testing.assert_close(model.embed(ids), expected)


def test_b20_the_head_is_zero_and_frozen_before_phase_2():
    model = network(seed_params())
    assert all(not p.any() and not p.requires_grad for p in model.token_output.parameters())
    assert not model.token_embedding.weight.requires_grad
    trainer = ContextTrainer(model, model.embed(text(9)).detach(), seed_params().phase1)
    head = {id(one) for one in (*model.token_output.parameters(), model.token_embedding.weight)}
    assert not head & {id(one) for group in trainer.optimizer.param_groups for one in group["params"]}
    logits = model.logits(context=torch.randn(3, 24), token=torch.randn(3, 16))
    loss = functional.cross_entropy(logits, torch.tensor([1, 2, 3]))
    assert math.exp(loss) == pytest.approx(VOCAB)


def test_b4_statistics_are_the_layers_own_and_their_memory_does_not_grow():
    model = network(seed_params(phase1__diversity="ema_live"))
    for n in (10, 10_000):
        model(context=torch.randn(n, 24), token=torch.randn(n, 16))
        model.get_distribution_loss(torch.zeros(1, 24))
        owned = [buffer.numel() for buffer in model.buffers()]
        assert sum(owned) == 2 * (4 * 24 + 2)
        assert [one._latest for block in model.blocks for one in block.layers] == [None, None]


def test_b6_single_rows_give_the_right_variance():
    moments, generator = RunningMoments(dim=8, momentum=0.99), torch.Generator().manual_seed(0)
    for _ in range(5000):
        moments.update(torch.randn(1, 8, generator=generator))
    assert float(moments.var.mean()) == pytest.approx(1.0, rel=0.1)
    assert int(moments.steps) == 5000


def test_b7_the_debiased_estimate_is_right_after_20_steps_where_the_plain_one_is_not():
    moments, generator = RunningMoments(dim=64, momentum=0.99), torch.Generator().manual_seed(0)
    rows = 5 + 2 * torch.randn(20, 64, generator=generator)
    for row in rows:
        moments.update(row[None])
    mean, var = moments.debiased()
    assert float(mean.mean()) == pytest.approx(float(rows.mean()), rel=0.01)
    assert float(var.mean()) == pytest.approx(float(rows.var(0, correction=0).mean()), rel=0.05)
    assert moments.mean.mean() < 0.2 * rows.mean()
    assert int(moments.steps) == 20
    with pytest.raises(ValueError, match="no row yet"):
        RunningMoments(dim=2, momentum=0.9).debiased()


@pytest.mark.parametrize("params", [seed_params(), changed(PARAMS, SMALL, "test")], ids=["seed", "sound"])
def test_frozen_steps_are_those_of_the_modules(params):
    model, context = network(params), torch.zeros(1, 24)
    embeddings, rows = model.embed(text(40)).detach(), []
    with torch.no_grad():
        for token in embeddings.split(1):
            context, _ = model(context=context, token=token)
            rows.append(context)
    torch.testing.assert_close(sequential_pass(model, embeddings), torch.cat(rows))
    torch.testing.assert_close(settle(model, embeddings, 4, 0.0).contexts, torch.cat(rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__update": "gated"}, {"model__layernorm_mix": 0.3}, {"model__token_structure": [1]}],
    ids=str,
)
def test_the_next_context_alone_is_that_of_forward_with_equal_gradients(changes):
    model = network(seed_params(**changes))
    context, token = torch.randn(7, 24), torch.randn(7, 16)
    whole, alone = model(context=context, token=token)[0], model.next_context(context=context, token=token)
    torch.testing.assert_close(alone, whole)
    used = [parameter for block in model.blocks for parameter in block.parameters()]
    found = [torch.autograd.grad(one.square().sum(), used, allow_unused=True) for one in (alone, whole)]
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
