"""The endless stream of blocks and the ordered pass."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.tokens.batches import EvaluationBatches, TrainingBatches, blocks_in_epoch, stream_indices, tokens_in_epoch


class Counting:
    """Blocks whose ids name their position."""

    seq_len = 3

    def __init__(self, n: int) -> None:
        self.n = n
        self.tokens = 3 * n

    def __len__(self) -> int:
        return self.n

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return indices[:, None] * 10 + torch.arange(4)  # (b, 4)


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 30), start=st.integers(0, 200), count=st.integers(0, 90), seed=st.integers(0, 2**32 - 1))
def test_any_part_of_the_stream_can_be_had_alone_and_each_pass_is_a_permutation(n, start, count, seed):
    whole = stream_indices(n, 0, start + count, seed)
    assert torch.equal(stream_indices(n, start, count, seed), whole[start:])
    for at in range(0, len(whole) - n + 1, n):
        assert sorted(whole[at : at + n].tolist()) == list(range(n))


def test_passes_and_seeds_have_orders_of_their_own():
    orders = [stream_indices(50, 50 * number, 50, seed).tolist() for number in range(20) for seed in (0, 1, 2**31)]
    assert len({tuple(order) for order in orders}) == 60


def test_epochs_follow_each_other_through_the_stream():
    batches = TrainingBatches(Counting(10), batch_size=4, blocks_per_epoch=6, seed=1)
    assert (batches.count, len(batches)) == (8, 2)
    seen = []
    for epoch in range(5):
        batches.set_epoch(epoch)
        for x, y in batches:
            assert x.shape == y.shape == (4, 3)
            assert torch.equal(x + 1, y)
            seen += (x[:, 0] // 10).tolist()
    assert seen == stream_indices(10, 0, 40, 1).tolist()
    assert [x.tolist() for x, _ in batches] == [x.tolist() for x, _ in batches]  # re-iterable: the same epoch again


def test_an_epoch_of_short_text_is_a_few_passes_and_says_so(capsys):
    assert [tokens_in_epoch(1000, there) for there in (5000, 250, 249, 100)] == [1000, 1000, 996, 400]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[1].startswith("an epoch is 4 passes over the 100 tokens there are, fewer than train.tokens_per_epoch 1")
    assert [blocks_in_epoch(wanted, Counting(5)) for wanted in (40, 60, 61, 10**6)] == [14, 20, 20, 20]


def test_a_total_ends_the_stream_in_the_middle_of_a_batch():
    batches = TrainingBatches(Counting(10), batch_size=4, blocks_per_epoch=8, seed=1, total_blocks=11)
    sizes = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        assert len(batches) == len(list(batches))
        sizes.append([len(x) for x, _ in batches])
    assert sizes == [[4, 4], [3], []]


def test_evaluation_takes_every_block_once_in_order():
    batches = EvaluationBatches(Counting(10), batch_size=4)
    assert len(batches) == 3
    assert torch.cat([x[:, 0] // 10 for x, _ in batches]).tolist() == list(range(10))
