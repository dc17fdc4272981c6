"""Any number of blocks: their definition by brute force, every way of running them, independence, step 0, training."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lego import DeepSupervisionTransformer, Trainer, add_block, create_standard_config, grow_model
from lego.growing.upper_layers import train_gathered
from lego.mining.hard_tokens import climbing_states
from lego.model.blocks import blocks_above, source_of
from lego.model.checkpoint import load_model, save_model
from lego.model.gate import Gate
from lego.model.reached import Reached
from lego.routing.cascade import CascadeDecoder
from lego.routing.decoder import ALWAYS_DEEP, RoutedDecoder
from tests.conftest import VOCAB, logits_close

SHAPES = [  # layers of block 1 that block 2 repeats, its new layers; repeats and new layers of each later block
    [(0, 2)],
    [(1, 1)],
    [(0, 1), (0, 1)],
    [(2, 1), (1, 1)],
    [(1, 2), (3, 0)],
    [(0, 2), (1, 1), (2, 1)],
    [(2, 0), (2, 1), (0, 2)],
]


def stirred(model: DeepSupervisionTransformer) -> DeepSupervisionTransformer:
    """What trains of it, changed as by training."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def models(shape: list[tuple[int, int]], heads: int = 2, trained: bool = True, vocab: int = VOCAB, **options) -> list:
    """Block 1 of three layers, and what grows on it, block by block."""
    torch.manual_seed(2)
    block1 = DeepSupervisionTransformer(vocab, 32, 3, 4, exit_layer=3, num_kv_heads=heads)
    for parameter in block1.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    (repeats, new), *later = shape
    branch = 3 - repeats if repeats else None
    grown = [block1.eval(), grow_model(block1, 3 + new, block2_context="sequence", branch_layer=branch, **options)]
    for repeats, new in later:
        if trained:
            stirred(grown[-1])
        grown.append(add_block(grown[-1], new, repeats=repeats, **options))
    return [*grown[:-1], stirred(grown[-1]) if trained else grown[-1].eval()]


@torch.no_grad()
def by_definition(model: DeepSupervisionTransformer, ids: list[int]) -> dict[int, Tensor]:
    """Logits (T, V) of every exit, one token after another, with attention written out (docs/ashem.md)."""
    k = model.exit_layer
    states = [model.embedding(torch.tensor(ids))]  # (T, D) below each layer of block 1
    for number in range(1, k + 1):
        states.append(model.layer(number)(states[-1][None])[0])

    def attended(number: int, x: Tensor, at: int) -> Tensor:
        source = source_of(number, model.blocks)
        layer, keys_of = model.layer(number), model.layer(source)
        read = states[source - 1] if source <= k else states[k]
        attention = layer.self_attn
        rotary = attention.rotary(torch.arange(at + 1))
        keys, values = keys_of.keys_values(read[None, : at + 1], rotary)  # (1, G, t, d)
        heads, d = attention.num_heads, attention.head_dim
        q = attention.q_proj(layer.input_layernorm(x)).view(heads, d)
        cos, sin = (part[at] for part in rotary)
        first, second = q.chunk(2, dim=-1)
        q = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        keys, values = (part[0].repeat_interleave(heads // part.shape[1], dim=0) for part in (keys, values))
        weights = (keys @ q.unsqueeze(-1)).squeeze(-1).div(math.sqrt(d)).softmax(-1)  # (H, t)
        x = x + attention.o_proj((weights.unsqueeze(1) @ values).flatten())
        return x + layer.mlp(layer.post_attention_layernorm(x))

    found = {exit_layer: [] for exit_layer in model.exits}
    for at in range(len(ids)):
        path = [state[at] for state in states]  # of this token, from its embedding on
        found[k].append(model.logits_at(path[-1], k))
        for block in model.blocks:
            path = path[: len(path) - block.repeats]
            for number in range(block.first, block.last + 1):
                path.append(attended(number, path[-1], at))
            found[block.last].append(model.logits_at(path[-1], block.last))
    return {exit_layer: torch.stack(rows) for exit_layer, rows in found.items()}


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_way_of_running_it_is_its_definition(shape, heads):
    *_, model = models(shape, heads)
    ids = torch.randint(0, VOCAB, (9,)).tolist()
    expected, x = by_definition(model, ids), torch.tensor([ids])
    last = expected[model.num_layers]
    logits_close(model(x)[0], last)
    for layer, logits in enumerate(model.forward_all_layers(x), 1):
        if layer in expected:
            logits_close(logits[0], expected[layer])
    logits_close(model.forward_train(x)["deep_logits"][0], last)
    logits_close(RoutedDecoder(model, None).read(x).logits, last)
    logits_close(CascadeDecoder(model, None).read(x).logits, last)
    logits_close(CascadeDecoder(model, [ALWAYS_DEEP] * len(shape)).read(x).logits, last)
    hard = torch.rand(1, 9) < 0.5
    logits_close(
        model.logits_at(model.deepen(model.trunk(x), hard, model.branch_layer), model.num_layers), last[hard[0]]
    )


def answers_of(model, expected: dict[int, Tensor], thresholds: list[float], gates: list) -> tuple[Tensor, Tensor]:
    """Logits (T, V) and exits (T,) of each token, by what every exit says of it."""
    logits, exits = [], []
    for at in range(len(expected[model.exit_layer])):
        answer = expected[model.exit_layer][at]
        for number, threshold in enumerate([*thresholds, None], 1):
            if threshold is None or answer.softmax(-1).max() >= threshold:
                break
            deeper, gate = expected[model.exits[number]][at], gates[number - 1]
            answer = deeper if gate is None else gate.mixed(answer, deeper)
        logits.append(answer)
        exits.append(number)
    return torch.stack(logits), torch.tensor(exits)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_routed_answers_are_those_of_the_exit_where_each_token_leaves(shape, gated):
    """Read at once, in pieces, token by token, in a batch with padding: the same as by definition."""
    *_, model = models(shape)
    sequences = [torch.randint(0, VOCAB, (length,)) for length in (11, 7)]
    gates = [Gate.at(0.5 + place, -0.3) if gated else None for place in range(len(shape))]
    found = [by_definition(model, ids.tolist()) for ids in sequences]
    sure = found[0][model.exit_layer].softmax(-1).amax(-1)
    thresholds = [float(sure.quantile(0.77)) * 0.9**place for place in range(len(shape))]
    wanted = [answers_of(model, one, thresholds, gates) for one in found]
    assert len({int(number) for _, exits in wanted for number in exits}) > 1
    decoder = CascadeDecoder(model, thresholds, gates=gates)
    pieces = [decoder.read(part[None]) for part in sequences[0].split([4, 1, 3, 1, 1, 1])]
    logits_close(torch.cat([one.logits for one in pieces]), wanted[0][0])
    assert torch.equal(torch.cat([one.exits for one in pieces]), wanted[0][1])
    padded, mask = torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.bool)
    padded[0], padded[1, 4:] = sequences[0], sequences[1]
    mask[0], mask[1, 4:] = True, True
    decoder = CascadeDecoder(model, thresholds, 2, gates=gates)
    read = decoder.read(padded, mask)
    logits_close(read.logits, torch.cat([logits for logits, _ in wanted]))
    assert torch.equal(read.exits, torch.cat([exits for _, exits in wanted]))
    more = torch.randint(0, VOCAB, (2, 3))
    last = decoder.read(more, last_only=True)
    for row, ids in enumerate(sequences):
        of_all = by_definition(model, [*ids.tolist(), *more[row].tolist()])
        logits, exits = answers_of(model, of_all, thresholds, gates)
        logits_close(last.logits[row], logits[-1])
        assert int(last.exits[row]) == int(exits[-1])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 1])
@torch.no_grad()
def test_who_leaves_at_an_exit_has_the_answer_of_the_model_without_later_blocks(shape):
    *_, below, model = models(shape)
    x = torch.randint(0, VOCAB, (2, 12))
    confidence = RoutedDecoder(model, 0.0, 2).read(x).score
    thresholds = [float(confidence.quantile(0.7))] * len(shape)
    routed, before = CascadeDecoder(model, thresholds, 2).read(x), CascadeDecoder(below, thresholds[:-1], 2).read(x)
    stays = routed.exits < before.exits.max()
    assert torch.equal(routed.logits[stays], before.logits[stays])
    assert torch.equal(routed.exits.clamp(max=len(shape)), before.exits)
    for name, tensor in below.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 1])
@torch.no_grad()
def test_at_step_0_a_block_of_repeats_or_zero_layers_changes_nothing(shape, rank):
    *_, below, model = models([*shape[:-1], (shape[-1][0], 1)], trained=False, init="zero")
    model = add_block(below, 1, repeats=1, init="zero", rank=rank)
    x = torch.randint(0, VOCAB, (2, 9))
    assert torch.equal(model(x), below(x))
    assert torch.equal(CascadeDecoder(model, None, 2).read(x).logits, CascadeDecoder(below, None, 2).read(x).logits)


def between(values: Tensor, share: float) -> float:
    """Half-way between two neighbours, so that no rounding decides who leaves."""
    ordered, place = [0.0, *values.sort().values.tolist(), 1.0], round(share * len(values))
    return (ordered[place] + ordered[place + 1]) / 2


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)).filter(any), min_size=1, max_size=3),
    ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=7),
    shares=st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_any_blocks_mined_trained_on_and_decoded_are_one_model(shape, ids, shares):
    """What phase 2 of a later block computes of stored states is what decoding answers, token by token."""
    layers = 3
    for place, (repeats, new) in enumerate(shape):
        shape[place] = (min(repeats, layers), new + (not min(repeats, layers) and not new))
        layers = sum(shape[place])
    *_, below, model = models(shape)
    x = torch.tensor([ids])
    expected = by_definition(model, ids)
    confidences = [expected[layer].softmax(-1).amax(-1) for layer in model.exits]
    thresholds = [between(one, share) for one, share in zip(confidences, shares, strict=False)]
    _, exits = answers_of(model, expected, thresholds[: len(shape)], [None] * len(shape))
    hard = exits == len(shape) + 1  # these reach the last block
    with torch.no_grad():
        decoder = CascadeDecoder(model, thresholds[: len(shape)])
        read = [decoder.read(x[:, at : at + 1]) for at in range(len(ids))]
        assert [int(one.exits) for one in read] == exits.tolist()
        if len(shape) > 1 and hard.any():
            (((_, _, packed, confidence), _),) = climbing_states(
                below, thresholds[: len(shape) - 1], [(x, x)], "cpu", model.blocks[-1].repeats
            )
            mined = confidence < thresholds[len(shape) - 1]
            assert torch.equal(mined[0], hard)
            reached = Reached.unpacked(packed, model.sizes)
            logits_close(
                model.logits_at(model.deepened(reached, mined), model.num_layers), expected[model.num_layers][hard]
            )


@pytest.mark.parametrize("rank", [0, 3])
def test_training_a_further_block_moves_it_alone(rank):
    *_, below, model = models([(1, 1), (2, 1)], trained=False)
    model = add_block(below, 1, repeats=2, rank=rank)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = torch.randint(0, VOCAB, (3, 12)), torch.randint(0, VOCAB, (3, 12))
    (((_, _, packed, confidence), _),) = climbing_states(below, [ALWAYS_DEEP], [(x, y)], "cpu", 2)
    hard = confidence < float(confidence.quantile(0.5))
    optimizer = Trainer(create_standard_config(3), VOCAB).create_optimizer(model, 1e-2)
    losses = [train_gathered(model, [(packed, hard, y)], optimizer, "cpu") for _ in range(10)]
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {int(name.split(".")[1]) + 1 for name in moved} == set(range(model.blocks[-1].first, model.num_layers + 1))


def test_it_is_saved_and_read_again(tmp_path):
    *_, model = models([(1, 2), (2, 1), (0, 1)])
    save_model(model, tmp_path)
    again, x = load_model(tmp_path), torch.randint(0, VOCAB, (2, 9))
    assert (again.blocks, again.exits) == (model.blocks, model.exits)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"later_blocks": [[0, 0]]}, r"block 3 needs at least one layer"),
        ({"later_blocks": [[2, 3]]}, r"can repeat 0 to 2 of those of the block below, got \[2, 3\]"),
        ({"later_blocks": [[4, 0]]}, r"leave block 2 no layer of 6"),
        ({"later_blocks": [[1, 0]], "block2_context": "token"}, r"later_blocks need block2_context sequence"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(change, said):
    options = {"exit_layer": 2, "block2_context": "sequence"} | change
    with pytest.raises(ValueError, match=said):
        DeepSupervisionTransformer(VOCAB, 32, 6, 4, **options)


def test_what_a_further_block_cannot_be_is_refused():
    block1, model = models([(1, 1)])
    for layers, options, said in (
        (0, {}, "layers must be at least 1"),
        (1, {"repeats": 3}, r"repeats must be in 0\.\.2"),
        (1, {"rank": 2}, "rank must be 0"),
        (1, {"init": "best"}, "init must be one of copy, zero, random"),
    ):
        with pytest.raises(ValueError, match=said):
            add_block(model, layers, **options)
    with pytest.raises(ValueError, match="needs a model of two blocks"):
        add_block(block1, 1)
    with pytest.raises(ValueError, match="thresholds must be 1, one for each exit but one, got 2"):
        CascadeDecoder(model, [0.5, 0.5])
    with pytest.raises(ValueError, match="thresholds must be at least"):
        CascadeDecoder(model, [math.nan])


def test_sources_go_down_to_the_layer_that_has_keys_and_values():
    blocks = blocks_above(3, 11, 2, [(2, 1), (3, 2)])
    assert [source_of(number, blocks) for number in range(1, 12)] == [1, 2, 3, 2, 3, 6, 6, 8, 6, 8, 11]
