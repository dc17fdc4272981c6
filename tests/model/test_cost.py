"""The ledger against torch's own counter of matrix products, and its identities."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lego import DeepSupervisionTransformer, Ledger, Trainer, create_standard_config, grow_model, train_upper_layers
from lego.growing.upper_layers import train_gathered
from lego.model.exit_criteria import StateCriterion, max_prob
from lego.model.gate import Gate
from lego.routing.decoder import RoutedDecoder
from tests.conftest import VOCAB

B, T = 3, 20
SHAPES = [dict(num_heads=4), dict(num_heads=4, num_kv_heads=2, ffn_dim=50), dict(num_heads=2, num_kv_heads=1)]


def counted_macs(run) -> int:
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def two_blocks(context: str, sizes: dict) -> DeepSupervisionTransformer:
    return DeepSupervisionTransformer(VOCAB, 32, 5, exit_layer=2, block2_context=context, **sizes)


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("context", ["full", "token", "sequence"])
@torch.no_grad()
def test_inference_costs_equal_the_flop_counter(context, sizes):
    model, x = two_blocks(context, sizes), torch.randint(0, VOCAB, (B, T))
    ledger = Ledger.of(model, T)
    assert counted_macs(lambda: model(x)) == ledger.full * B * T
    assert counted_macs(lambda: model.logits_at(model.forward_to_hidden(x), 2)) == ledger.shallow() * B * T
    confidence = model.compute_confidence(model.forward_to_hidden(x))
    model.routing_threshold = confidence.median().item()
    ratio = (confidence >= model.routing_threshold).double().mean().item()
    counted = counted_macs(lambda: model.forward_inference(x))
    if context == "sequence":  # gathered rows are padded to the longest hard count in the batch
        hard = (confidence < model.routing_threshold).sum(dim=1)
        padding = (hard.max() - hard).sum().item() * 3 * 2 * T * 32  # scores and mixing of 3 layers
        counted -= padding
    assert counted == pytest.approx(ledger.routed(ratio) * B * T)


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("tied", [True, False])
def test_training_block_1_costs_what_the_flop_counter_says(sizes, tied):
    model = DeepSupervisionTransformer(VOCAB, 32, 2, exit_layer=2, tie_embeddings=tied, **sizes)
    trainer = Trainer(create_standard_config(2), VOCAB)
    optimizer = trainer.create_optimizer(model, 1e-3)
    x = torch.randint(0, VOCAB, (B, T))
    assert counted_macs(lambda: trainer.train_epoch(model, [(x, x)], optimizer)) == Ledger.of(model, T).train_block1(
        B * T
    )


@pytest.mark.parametrize("head", ["shared", "own"])
@pytest.mark.parametrize("context", ["full", "token"])
def test_training_block_2_costs_what_the_flop_counter_says(head, context):
    block1 = DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2)
    grown = grow_model(block1, 5, head=head, block2_context=context)
    optimizer = Trainer(create_standard_config(5), VOCAB).create_optimizer(grown, 1e-3)
    batch = (torch.randn(40, 1, 32), torch.randint(0, VOCAB, (40,)))
    counted = counted_macs(lambda: train_upper_layers(grown, [batch], optimizer, VOCAB, "cpu", 2))
    assert counted == Ledger.of(grown, T).train_block2(40, head_trains=head == "own")


@pytest.mark.parametrize("head", ["shared", "own"])
def test_training_block_2_on_blocks_costs_what_the_flop_counter_says(head):
    block1 = DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2, num_kv_heads=2)
    grown = grow_model(block1, 5, head=head, block2_context="sequence")
    optimizer = Trainer(create_standard_config(5), VOCAB).create_optimizer(grown, 1e-3)
    hard = torch.zeros(B, T, dtype=torch.bool)
    hard[:, ::3] = True  # as many in each block: nothing is padded
    batch = (torch.randn(B, T, 32), hard, torch.randint(0, VOCAB, (B, T)))
    counted = counted_macs(lambda: train_gathered(grown, [batch], optimizer, "cpu"))
    assert counted == Ledger.of(grown, T).train_block2(int(hard.sum()), head == "own", B * T)


def test_making_states_anew_costs_block_1_without_its_head():
    block1 = DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2)
    grown, x = grow_model(block1, 5, block2_context="sequence"), torch.randint(0, VOCAB, (B, T))
    ledger = Ledger.of(grown, T)
    made = replace(ledger, online=True).train_block2(7, False, B * T) - ledger.train_block2(7, False, B * T)
    with torch.no_grad():
        assert made == counted_macs(lambda: block1.forward_to_hidden(x))
    assert ledger.states_line(2**20, 2, "online") == (
        f"states: {2 * 32:,}.0 MiB stored, or {ledger.block1 * 2**20:.3e} MACs a pass to make them anew; "
        "they are made anew"
    )
    kv, lower = ledger.keys_values // 32, ledger.layer * 2**20
    assert ledger.states_line(2**20, 2, "keys_values", 1) == (
        f"states: {2 * 32:,}.0 MiB stored, or {2 * (2 * 32 + kv):,}.0 MiB with keys and values and {lower:.3e} MACs a "
        f"pass less, or {lower:.3e} MACs a pass to make them anew; all is stored"
    )


@pytest.mark.parametrize(("macs", "reads"), [(None, False), (300, False), (300, True)])
@pytest.mark.parametrize("context", ["sequence", "token"])
@torch.no_grad()
def test_a_gate_costs_hard_tokens_the_exits_head(macs, reads, context):
    """Counted on the decoder that reads whole sequences, at half of the tokens hard and at all."""
    model, x = two_blocks(context, SHAPES[0]), torch.randint(0, VOCAB, (B, T))
    criterion = max_prob if macs is None else StateCriterion(32, 8, reads).requires_grad_(False)
    h = model.forward_to_hidden(x).flatten(0, 1)
    scores = criterion(h, model.logits_at(h, 2))
    ledger = replace(Ledger.of(model, T), gated=True)
    for threshold in (2.0, 0.0):
        decoder = RoutedDecoder(model, threshold, B, criterion, Gate())
        counted = counted_macs(lambda decoder=decoder: decoder.read(x))
        ratio = float((scores >= threshold).float().mean())
        asked = None if macs is None else criterion.macs
        spared = ratio * ledger.kv_fill()  # of exited tokens nothing is filled before one goes deep
        assert counted == pytest.approx(round((ledger.routed(ratio, asked) - spared) * B * T), rel=1e-9)
    off = counted_macs(lambda: RoutedDecoder(model, None, B, criterion, Gate()).read(x))
    assert off == ledger.always_deep * B * T
    even = ledger.break_even_shallow_ratio(macs)
    assert even == 1.0 or ledger.routed(even, macs) == pytest.approx(ledger.full)


sizes = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(2, 70_000),
        "dim": st.integers(1, 64).map(lambda n: 8 * n),
        "num_heads": st.just(4),
        "num_kv_heads": st.sampled_from([1, 2, 4]),
        "ffn_dim": st.integers(1, 2048),
        "num_layers": st.integers(2, 12),
        "exit_layer": st.just(1),
        "seq_len": st.integers(1, 512),
    }
)


@settings(max_examples=100, deadline=None)
@given(sizes=sizes, ratio=st.floats(0, 1))
def test_break_even_is_where_routing_costs_as_much_as_the_full_model(sizes, ratio):
    ledger = Ledger(**sizes, block2_context="token")
    even = ledger.break_even_shallow_ratio()
    assert 0 < even < 1
    assert ledger.flops_ratio(even) == pytest.approx(1.0)
    assert (ledger.flops_ratio(ratio) < 1) == (ratio > even) or ratio == pytest.approx(even)
    assert ledger.routed(1.0) == ledger.shallow()


def test_whole_sequences_above_the_exit_never_pay():
    """The historic context: a hard token attends to every token's upper states, so all of them must be computed."""
    ledger = Ledger(4096, 128, 4, 4, 352, 4, 2, 128, block2_context="full")
    assert ledger.break_even_shallow_ratio() == 1.0
    assert ledger.flops_ratio(1.0) == 1.0 < ledger.flops_ratio(0.5)


def test_the_head_of_the_originals_model_is_94_percent_of_its_macs():
    """Section 4: d = 64, V = 69,830, two of four layers; the head costs, so routing pays only from 97 % exits."""
    ledger = Ledger(69_830, 64, 4, 4, 192, 4, 2, 32, block2_context="token")
    assert ledger.head / ledger.full == pytest.approx(0.95, abs=0.015)
    assert ledger.break_even_shallow_ratio() > 0.97


def test_counting_needs_the_math_kernel():
    """Why the tests above choose it: fused attention is counted as nothing on the CPU."""
    q = torch.randn(1, 2, 8, 4)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), counter:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert counter.get_total_flops() == 0
