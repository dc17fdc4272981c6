"""Endless shuffled batches of a store's hard tokens: each once in a pass, any epoch alone, one shard in memory."""

from __future__ import annotations

import weakref

import pytest
import torch

from lego import DeepSupervisionTransformer, HiddenStateStore
from lego.growing.hard_batches import HardBlockBatches, HardTokenBatches
from tests.mining.test_hidden_states import random_block1, write


@pytest.fixture(scope="module")
def model() -> DeepSupervisionTransformer:
    return random_block1()


def epoch(store, number, batch_size=50, tokens=120, seed=3):
    batches = HardTokenBatches(store, batch_size, tokens, seed)
    batches.set_epoch(number)
    return list(batches)


def test_two_passes_of_the_stream_hold_every_hard_token_twice(tmp_path, model):
    store, _ = write(tmp_path, model)
    parts = [batch for number in range(8) for batch in epoch(store, number, batch_size=20, tokens=60)]  # 480 = 2 * 240
    assert {h.shape for h, _ in parts} == {(20, 1, 32)}
    states = torch.cat([h[:, 0] for h, _ in parts])
    everything = torch.cat([store.hard_examples(i)["hidden_states"] for i in range(4)])
    for number in range(2):
        one_pass = states[number * 240 : (number + 1) * 240]
        assert torch.equal(one_pass.sum(1).sort().values, everything.sum(1).sort().values)
    assert not torch.equal(states[:240], states[240:])


def test_an_epoch_can_be_had_without_those_before_it(tmp_path, model):
    store, _ = write(tmp_path, model)
    running = HardTokenBatches(store, 50, 120, seed=3)
    for number in range(5):
        running.set_epoch(number)
        for (a, b), (c, d) in zip(running, epoch(store, number), strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
    assert not torch.equal(epoch(store, 0)[0][0], epoch(store, 0, seed=4)[0][0])
    assert (running.streamed(1), running.seen(2)) == (150, [150, 300])  # whole batches


def test_blocks_come_whole_shuffled_and_counted(tmp_path, model):
    store, threshold = write(tmp_path, model)
    batches = HardBlockBatches(store, batch_size=30, tokens_per_epoch=60, seed=3)
    assert (batches.blocks, len(batches)) == (5, 2)  # 6 of 12 tokens are hard, on average
    seen, blocks = 0, []
    for number in range(4):  # 40 blocks: one pass
        batches.set_epoch(number)
        for h, hard, y in batches:
            assert (h.shape, hard.shape, y.shape) == ((5, 12, 32), (5, 12), (5, 12))
            assert h.untyped_storage().nbytes() == h.numel() * 4
            assert torch.equal(model.compute_confidence(h) < threshold, hard)
            seen += int(hard.sum())
            blocks += list(h)
        assert (batches.streamed(number + 1), batches.seen(number + 1)[-1]) == ((number + 1) * 120, seen)
    assert seen == store.hard_tokens
    stored = torch.cat([store.read_shard(index)["exit_states"] for index in range(4)])
    assert torch.equal(torch.stack(blocks).sum((1, 2)).sort().values, stored.sum((1, 2)).sort().values)
    again = HardBlockBatches(store, batch_size=30, tokens_per_epoch=60, seed=3)
    again.set_epoch(3)
    assert all(
        torch.equal(a, b) for one, other in zip(again, batches, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_one_shard_at_a_time_is_in_memory(tmp_path, model, monkeypatch):
    store, _ = write(tmp_path, model)
    read: list[int] = []
    earlier: list[weakref.ref] = []
    original = HiddenStateStore.read_shard

    def watched(self, index):
        assert all(reference() is None for reference in earlier), "an earlier shard is still held"
        shard = original(self, index)
        read.append(index)
        earlier.extend(weakref.ref(tensor.untyped_storage()) for tensor in shard.values())
        return shard

    monkeypatch.setattr(HiddenStateStore, "read_shard", watched)
    batches = HardTokenBatches(store, batch_size=70, tokens_per_epoch=240, seed=3)  # batches span shards
    tokens = 0
    for h, y in batches:
        tokens += len(y)
        assert h.untyped_storage().nbytes() == h.numel() * 4  # a batch holds no more than itself
    assert tokens == 280
    assert sorted(read[:4]) == [0, 1, 2, 3]  # each once in a pass
