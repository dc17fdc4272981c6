"""What phase 2 learns from: endless shuffled streams of the store's hard tokens, alone or in their blocks.

Each pass takes the shards in a new order and shuffles within a shard, so one shard is in memory at a time. Any epoch
can be had without those before it, so a resumed run sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor

from lego.base.artifacts import derived_seed
from lego.mining.hidden_states import HiddenStateStore
from lego.tokens.batches import stream_indices


def shuffled_segments(sizes: list[int], start: int, count: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Items start..start+count of the stream over shards of the given sizes: (shard, places in it (m,)) in turn."""
    number, skip = divmod(start, sum(sizes))
    while count > 0:
        order = stream_indices(len(sizes), number * len(sizes), len(sizes), derived_seed(seed, "shards"))
        for index in order.tolist():
            take = min(sizes[index] - skip, count)
            if take > 0:
                yield index, stream_indices(sizes[index], number * sizes[index] + skip, take, derived_seed(seed, index))
                count -= take
            skip = max(0, skip - sizes[index])
        number += 1


class _Epochs:
    """A stream of batches cut into epochs of `steps`, which ends after `total_steps` of them; None = never."""

    steps: int
    total_steps: int | None = None
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def steps_until(self, epochs: int) -> int:
        """Batches in the first epochs."""
        return epochs * self.steps if self.total_steps is None else min(epochs * self.steps, self.total_steps)

    def steps_by_epoch(self, epochs: int) -> list[int]:
        """Batches in each of the first epochs."""
        return [self.steps_until(n + 1) - self.steps_until(n) for n in range(epochs)]

    def __len__(self) -> int:
        """Batches in the current epoch."""
        return self.steps_until(self.epoch + 1) - self.steps_until(self.epoch)


class HardTokenBatches(_Epochs):
    """One epoch of batches ((B, 1, D), (B,)) of hard tokens, each without its context.

    Args:
        store: where the tokens are.
        batch_size: tokens per batch.
        tokens_per_epoch: tokens per epoch, rounded up to whole batches.
        seed: of the shuffling.
    """

    def __init__(self, store: HiddenStateStore, batch_size: int, tokens_per_epoch: int, seed: int) -> None:
        self.store, self.batch_size, self.seed = store, batch_size, seed
        self.steps = -(-tokens_per_epoch // batch_size)

    def streamed(self, epochs: int) -> int:
        """Tokens read in the first epochs: all of them are hard."""
        return self.steps_until(epochs) * self.batch_size

    def seen(self, epochs: int) -> list[int]:
        """Hard tokens seen by the end of each of the first epochs."""
        return [self.streamed(number) for number in range(1, epochs + 1)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        sizes = [shard["hard_tokens"] for shard in self.store.shards]
        count = len(self) * self.batch_size
        states: list[Tensor] = []  # parts of the batch that is being filled
        targets: list[Tensor] = []
        missing = self.batch_size
        for index, places in shuffled_segments(sizes, self.epoch * self.steps * self.batch_size, count, self.seed):
            shard = self.store.read_shard(index)
            rows = shard["hard"].flatten().nonzero().squeeze(1)[places]  # (m,)
            h, y = self.store.states(shard).flatten(0, 1), shard["targets"].flatten()
            while len(rows):
                part, rows = rows[:missing], rows[missing:]
                states.append(h[part].float())
                targets.append(y[part].long())
                missing -= len(part)
                if not missing:
                    yield torch.cat(states).unsqueeze(1), torch.cat(targets)  # (B, 1, D), (B,)
                    states, targets, missing = [], [], self.batch_size
            del shard, h, y  # before the next one is read


class HardBlockBatches(_Epochs):
    """One epoch of batches of whole blocks: exit states (B, T, D), hard mask (B, T), targets (B, T).

    Args:
        store: where the blocks are.
        batch_size: hard tokens per batch, on average; the number of blocks follows.
        tokens_per_epoch: hard tokens per epoch, on average, rounded up to whole batches.
        seed: of the shuffling.
    """

    def __init__(self, store: HiddenStateStore, batch_size: int, tokens_per_epoch: int, seed: int) -> None:
        self.store, self.seed = store, seed
        self.counts = [store.hard_counts(index) for index in range(len(store.shards))]
        self.seq_len = store.shards[0]["tokens"] // store.shards[0]["blocks"]
        hard_per_block = store.hard_tokens / sum(len(counts) for counts in self.counts)
        self.blocks = max(1, round(batch_size / hard_per_block))
        self.steps = max(1, -(-tokens_per_epoch // round(self.blocks * hard_per_block)))

    def _segments(self, first_step: int, steps: int) -> Iterator[tuple[int, Tensor]]:
        sizes = [len(counts) for counts in self.counts]
        return shuffled_segments(sizes, first_step * self.blocks, steps * self.blocks, self.seed)

    def streamed(self, epochs: int) -> int:
        """Tokens read in the first epochs, hard or not."""
        return self.steps_until(epochs) * self.blocks * self.seq_len

    def seen(self, epochs: int) -> list[int]:
        """Hard tokens seen by the end of each of the first epochs."""
        hard = [
            sum(int(self.counts[index][places].sum()) for index, places in self._segments(epoch * self.steps, steps))
            for epoch, steps in enumerate(self.steps_by_epoch(epochs))
        ]
        return list(accumulate(hard))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        parts: list[tuple[Tensor, Tensor, Tensor]] = []  # of the batch that is being filled
        missing = self.blocks
        for index, places in self._segments(self.epoch * self.steps, len(self)):
            shard = self.store.read_shard(index)
            while len(places):
                part, places = places[:missing], places[missing:]
                states = self.store.states(shard, part).float()
                parts.append((states, shard["hard"][part], shard["targets"][part].long()))
                missing -= len(part)
                if not missing:
                    h, hard, y = (torch.cat(column) for column in zip(*parts, strict=True))
                    yield h, hard, y  # (B, T, D), (B, T), (B, T)
                    parts, missing = [], self.blocks
            del shard  # before the next one is read
