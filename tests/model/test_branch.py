"""Block 2 that begins below the exit: its definition by brute force, step 0, independence, training, cost, files."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lego import DeepSupervisionTransformer, Ledger, Trainer, create_standard_config, grow_model
from lego.growing.upper_layers import train_gathered
from lego.hub.export import to_hf
from lego.model.checkpoint import load_model, same_block1, save_model
from lego.routing.decoder import ALWAYS_DEEP, RoutedDecoder
from lego.routing.measure import evaluate
from lego.training.trainer import StageConfig, TrainingConfig
from tests.conftest import VOCAB, logits_close, random_batches
from tests.model.test_cost import counted_macs

SHAPES = [(2, 0), (2, 1), (1, 0), (1, 2), (0, 0), (0, 1)]  # layer that block 2 begins at, of 3, and new layers


def block1_of(heads: int = 4) -> DeepSupervisionTransformer:
    torch.manual_seed(2)
    model = DeepSupervisionTransformer(VOCAB, 32, 3, 4, exit_layer=3, num_kv_heads=heads)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


def branched(b: int, new: int, trained: bool = True, **options) -> DeepSupervisionTransformer:
    """Block 1 of three layers with a block 2, changed as by training."""
    options = {"block2_context": "sequence", "head": "own"} | options
    model = grow_model(block1_of(options.pop("heads", 4)), 3 + new, branch_layer=b, **options)
    if trained:
        torch.manual_seed(4)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def by_definition(model: DeepSupervisionTransformer, ids: list[int]) -> Tensor:
    """Deep logits (T, V), one token after another, with attention written out (ashem section 8)."""
    k, b = model.exit_layer, model.branch_layer
    states = [model.embedding(torch.tensor(ids))]  # (T, D) below each layer of block 1
    for number in range(1, k + 1):
        states.append(model.layer(number)(states[-1][None])[0])

    def attended(layer, x: Tensor, at: int, keys_of, source: Tensor) -> Tensor:
        """Of one token (D,) over the keys and values that `keys_of` makes of source (T, D) up to it."""
        attention, seen = layer.self_attn, source[: at + 1]
        rotary = attention.rotary(torch.arange(at + 1))
        k, v = keys_of.keys_values(seen[None], rotary)  # (1, G, t, d)
        heads, d = attention.num_heads, attention.head_dim
        q = attention.q_proj(layer.input_layernorm(x)).view(heads, d)
        cos, sin = (part[at] for part in rotary)
        first, second = q.chunk(2, dim=-1)
        q = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        k, v = (part[0].repeat_interleave(heads // part.shape[1], dim=0) for part in (k, v))  # (H, t, d)
        weights = (k @ q.unsqueeze(-1)).squeeze(-1).div(math.sqrt(d)).softmax(-1)  # (H, t)
        x = x + attention.o_proj((weights.unsqueeze(1) @ v).flatten())
        return x + layer.mlp(layer.post_attention_layernorm(x))

    logits = []
    for at in range(len(ids)):
        x = states[b][at]
        for number in range(b + 1, k + 1):
            x = attended(model.layer(number + k - b), x, at, model.layer(number), states[number - 1])
        for number in model.own_layers:
            x = attended(model.layer(number), x, at, model.layer(number), states[k])
        logits.append(model.logits_at(x, model.num_layers))
    return torch.stack(logits)


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(("b", "new"), SHAPES)
@torch.no_grad()
def test_every_way_of_running_it_is_its_definition(b, new, heads):
    model, ids = branched(b, new, heads=heads), torch.randint(0, VOCAB, (9,)).tolist()
    expected, x = by_definition(model, ids), torch.tensor([ids])
    logits_close(model(x)[0], expected)
    logits_close(model.forward_train(x)["deep_logits"][0], expected)
    logits_close(model.forward_all_layers(x)[-1][0], expected)
    for always in (None, ALWAYS_DEEP):
        logits_close(RoutedDecoder(model, always).read(x).logits, expected)
    h, hard = model.trunk(x), torch.rand(1, 9) < 0.5
    logits_close(model.logits_at(model.deepen(h, hard, b), model.num_layers), expected[hard[0]])
    shallow = block1_of(heads)(x)[0]
    logits_close(RoutedDecoder(model, 0.0).read(x).logits, shallow)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("b", "new"), SHAPES)
@torch.no_grad()
def test_at_step_0_deep_is_shallow_bit_for_bit(b, new, rank):
    model, x = branched(b, new, trained=False, init="zero", branch_rank=rank), torch.randint(0, VOCAB, (2, 9))
    shallow = RoutedDecoder(model, 0.0, 2).read(x).logits
    assert torch.equal(RoutedDecoder(model, ALWAYS_DEEP, 2).read(x).logits, shallow)
    assert torch.equal(RoutedDecoder(model, None, 2).read(x).logits, shallow)
    logits_close(model(x).flatten(0, 1), block1_of()(x).flatten(0, 1))


@pytest.mark.parametrize(("b", "new"), SHAPES)
@torch.no_grad()
def test_who_else_goes_deep_changes_nothing_and_easy_tokens_are_block_1s(b, new):
    model, x = branched(b, new), torch.randint(0, VOCAB, (1, 12))
    h = model.trunk(x)
    every = model.logits_at(model.deepen(h, torch.ones(1, 12, dtype=torch.bool), b), model.num_layers)
    for seed in range(3):
        hard = torch.rand(1, 12, generator=torch.Generator().manual_seed(seed)) < 0.4
        logits_close(model.logits_at(model.deepen(h, hard, b), model.num_layers), every[hard[0]])
    logits, confidence = model.route(x, 3, 0.05)
    alone = RoutedDecoder(block1_of(), 0.0).read(x).logits
    easy = (confidence >= 0.05)[0]
    read = RoutedDecoder(model, 0.05).read(x)
    assert torch.equal(read.logits[~read.deep], alone[~read.deep])
    logits_close(logits[0][~easy], every[~easy])


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("head", ["shared", "own"])
@pytest.mark.parametrize(("b", "new"), SHAPES)
def test_training_moves_block_2_alone_and_costs_what_the_ledger_says(b, new, head, rank):
    model = branched(b, new, trained=False, head=head, branch_rank=rank)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hard = torch.zeros(3, 12, dtype=torch.bool)
    hard[:, ::3] = True  # as many in each block: nothing is padded
    batch = (model.trunk(torch.randint(0, VOCAB, (3, 12))).detach(), hard, torch.randint(0, VOCAB, (3, 12)))
    optimizer = Trainer(create_standard_config(3), VOCAB).create_optimizer(model, 1e-2)
    counted = counted_macs(lambda: train_gathered(model, [batch], optimizer, "cpu"))
    ledger = Ledger.of(model, 12)
    assert counted == ledger.train_block2(int(hard.sum()), head == "own", hard.numel())
    kept = model.reach(batch[0]).packed().detach()
    counted = counted_macs(lambda: train_gathered(model, [(kept, *batch[1:])], optimizer, "cpu"))
    assert counted == replace(ledger, kept=True).train_block2(int(hard.sum()), head == "own", hard.numel())
    grown = Ledger.of(block1_of(), 12).grown(3 + new, "sequence", b)
    assert replace(grown, branch_rank=rank) == ledger
    assert same_block1(block1_of(), model)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[1] for name in moved if name.startswith("layers.")} == {
        str(index) for index in range(3, 3 + (3 - b) + new)
    }


@pytest.mark.parametrize(("b", "new"), SHAPES)
@torch.no_grad()
def test_inference_costs_what_the_ledger_says(b, new):
    model, x = branched(b, new), torch.randint(0, VOCAB, (3, 12))
    ledger = Ledger.of(model, 12)
    spared = 0 if new else ledger.layer - ledger.keys_values  # without an exit nobody asks for its states
    assert counted_macs(lambda: model(x)) == (ledger.full - spared) * x.numel()
    assert counted_macs(lambda: RoutedDecoder(model, ALWAYS_DEEP, 3).read(x)) == ledger.routed(0.0) * x.numel()
    assert counted_macs(lambda: RoutedDecoder(model, 0.0, 3).read(x)) == ledger.shallow() * x.numel()


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("b", "new"), SHAPES)
def test_block_1_runs_once_where_both_exits_are_asked_for(b, new, rank):
    model, x = branched(b, new, branch_rank=rank, trained=rank == 0), torch.randint(0, VOCAB, (3, 12))
    ledger = Ledger.of(model, 12)
    if not rank:
        model.routing_threshold = ALWAYS_DEEP
        assert counted_macs(lambda: model.forward_inference(x)) == ledger.routed(0.0) * x.numel()
        with torch.no_grad():
            assert counted_macs(lambda: model.forward_train(x)) == (ledger.full + ledger.head) * x.numel()
    trainer = Trainer(TrainingConfig([StageConfig((layer, layer), 0.5) for layer in (3, model.num_layers)]), VOCAB)
    model.requires_grad_(True)
    counted = counted_macs(lambda: trainer.compute_loss(model, x, x).backward())
    assert counted == ledger.train_joint(x.numel(), exits=2)


@pytest.mark.parametrize(("b", "new"), SHAPES)
@torch.no_grad()
def test_every_layer_is_read_as_it_is_reached_alone(b, new):
    model, x = branched(b, new), torch.randint(0, VOCAB, (2, 9))
    for number, state in model.outputs(x, reversed(range(1, model.num_layers + 1))):
        logits_close(state, model.run_layers(model.embedding(x), 1, number))
    for layer in range(1, model.num_layers + 1):
        logits, _ = model.route(x, layer, 0.0)
        logits_close(logits, model(x))


@torch.no_grad()
@pytest.mark.parametrize("context", ["full", "token", "sequence"])
def test_a_branch_at_the_exit_is_none(context):
    grown = []
    for layer in (3, None):
        torch.manual_seed(0)
        grown.append(grow_model(block1_of(), 5, block2_context=context, branch_layer=layer).eval())
    x = torch.randint(0, VOCAB, (2, 9))
    assert [model.num_layers for model in grown] == [5, 5]
    assert torch.equal(grown[0](x), grown[1](x))


@pytest.mark.parametrize(("b", "new"), SHAPES)
def test_nothing_is_remembered_for_branch_layers(b, new):
    decoder = RoutedDecoder(branched(b, new), ALWAYS_DEEP)
    decoder.read(torch.randint(0, VOCAB, (1, 6)))
    assert len(decoder.cache) == 3 + new
    assert not any(decoder.waiting)


@pytest.mark.parametrize(("b", "new"), SHAPES)
def test_the_trainers_measures_are_the_decoders(b, new):
    model, batches = branched(b, new), random_batches(3, seed=5)
    for threshold in (0.0, 0.04):
        config = TrainingConfig([StageConfig((3, 3))], routing_threshold=threshold, exit_layer=3)
        theirs = evaluate(model, batches, threshold or None, "cpu")
        mine = Trainer(config, VOCAB).evaluate(model, batches)
        assert mine == pytest.approx(theirs, rel=1e-5)
        assert (mine["shallow_ratio"] > 0) is (threshold > 0)


@pytest.mark.parametrize(("b", "new"), [(1, 0), (0, 2)])
@torch.no_grad()
def test_a_folder_brings_it_back(b, new, tmp_path):
    model, x = branched(b, new), torch.randint(0, VOCAB, (2, 9))
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert (again.branch_layer, again.branches) == (b, 3 - b)
    assert torch.equal(again(x), model(x))


@torch.no_grad()
def test_low_rank_changes_are_added_to_the_layers_they_change_when_saved(tmp_path):
    model, x = branched(1, 1, branch_rank=3, init="zero"), torch.randint(0, VOCAB, (2, 9))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and ".3." in name}
    low = [f"{name}.{part}" for name in ("self_attn.q_proj", "mlp.up_proj") for part in ("down", "up")]
    assert {f"layers.3.{name}.weight" for name in low} < trained
    assert not {"layers.3.self_attn.q_proj.weight", "layers.3.mlp.up_proj.weight"} & trained
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.branch_rank == 0
    assert "layers.3.mlp.up_proj.down.weight" not in again.state_dict()
    logits_close(again(x).flatten(0, 1), model(x).flatten(0, 1))
    projection = model.layer(4).mlp.up_proj
    change = again.layer(4).mlp.up_proj.weight - projection.weight
    logits_close(change, projection.up.weight @ projection.down.weight, 1e-6)
    assert torch.linalg.matrix_rank(change, rtol=1e-3) == 3
    logits_close(to_hf(model, None)(x).logits.flatten(0, 1), model(x).flatten(0, 1))


def test_what_cannot_be_is_named():
    for arguments, sentence in (
        ({"branch_layer": 4}, r"branch_layer must be in 0\.\.3, block 1's last, got 4"),
        ({"branch_layer": -1}, r"branch_layer must be in 0\.\.3, block 1's last, got -1"),
        ({"branch_layer": 1, "block2_context": "token"}, "needs block2_context sequence, got 'token'"),
        ({"branch_rank": 4}, "branch_rank needs a branch_layer below the exit"),
        ({"branch_layer": 1, "branch_rank": 32}, r"branch_rank must be in 0\.\.31, got 32"),
        ({"num_layers": 2, "branch_layer": 1}, "num_layers must exceed block 1's 3, got 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            grow_model(block1_of(), **{"num_layers": 4, "block2_context": "sequence"} | arguments)
    with pytest.raises(ValueError, match="grow the model that it was grown from"):
        grow_model(branched(1, 1), 7, block2_context="sequence")
    model, x = branched(1, 1), torch.randn(1, 4, 32)
    with pytest.raises(ValueError, match="layers above the exit run from the output of layer 1 on, got first = 4"):
        model.run_layers(x, 4, model.num_layers)
    with pytest.raises(ValueError, match=r"branch_layer must be in 2\.\.exit_layer = 3, got 1"):
        DeepSupervisionTransformer(VOCAB, 32, 4, 4, exit_layer=3, branch_layer=1, block2_context="sequence")
