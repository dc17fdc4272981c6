"""Batches of packed blocks: a reproducible endless stream for training, one pass in order for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from lego.base.artifacts import derived_seed
from lego.tokens.blocks import PackedBlocks

PASSES = 4  # over text in one epoch; what is read more often is learned by heart (Muennighoff et al. 2023)


class Blocks(Protocol):
    """Packed blocks: `len()` of them, `tokens` predicted in all; `rows` are token ids (b, seq_len + 1) by index."""

    seq_len: int

    def __len__(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    def rows(self, indices: Tensor) -> Tensor: ...


def tokens_in_epoch(wanted: int, there: int) -> int:
    """Tokens between two looks at validation text: so many as are wanted, but of short text PASSES passes at most.

    Args:
        wanted: train.tokens_per_epoch.
        there: tokens that are trained on.
    """
    if wanted <= PASSES * there:
        return wanted
    print(
        f"an epoch is {PASSES} passes over the {there:,} tokens there are, fewer than train.tokens_per_epoch "
        f"{wanted:,}: on short text validation is looked at more often",
        flush=True,
    )
    return PASSES * there


def blocks_in_epoch(wanted: int, blocks: Blocks) -> int:
    """As `tokens_in_epoch`, in blocks."""
    return -(-tokens_in_epoch(wanted, len(blocks) * blocks.seq_len) // blocks.seq_len)


def stream_indices(n: int, start: int, count: int, seed: int) -> Tensor:
    """Positions start..start+count of an endless stream: permutation after permutation of range(n).

    Any part of the stream can be had without what comes before it, so a resumed run sees the same batches.

    Args:
        n: items in one pass.
        start: first position.
        count: how many positions.
        seed: of the permutations; each pass derives its own.
    """
    parts = []
    while count > 0:
        number, offset = divmod(start, n)
        generator = torch.Generator().manual_seed(derived_seed(seed, number))
        part = torch.randperm(n, generator=generator)[offset : offset + count]
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


class TrainingBatches:
    """One epoch of (x, y) batches (B, T) from the endless shuffled stream; `set_epoch` chooses which, from 0.

    Args:
        blocks: what to draw from.
        batch_size: blocks per batch.
        blocks_per_epoch: blocks per epoch, rounded up to whole batches.
        seed: of the shuffling.
        total_blocks: where the stream ends, in the middle of an epoch or batch if need be; default never.
    """

    def __init__(
        self, blocks: Blocks, batch_size: int, blocks_per_epoch: int, seed: int, total_blocks: int | None = None
    ) -> None:
        self.blocks, self.batch_size, self.seed, self.total_blocks = blocks, batch_size, seed, total_blocks
        self.blocks_per_epoch = batch_size * -(-blocks_per_epoch // batch_size)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def blocks_in(self, epoch: int) -> int:
        """Blocks in the epoch of this number."""
        if self.total_blocks is None:
            return self.blocks_per_epoch
        return max(0, min(self.blocks_per_epoch, self.total_blocks - epoch * self.blocks_per_epoch))

    @property
    def count(self) -> int:
        """Blocks in the current epoch."""
        return self.blocks_in(self.epoch)

    def steps_by_epoch(self, epochs: int) -> list[int]:
        """Batches in each of the first epochs."""
        return [-(-self.blocks_in(epoch) // self.batch_size) for epoch in range(epochs)]

    def seen(self, epochs: int) -> list[int]:
        """Tokens seen by the end of each of the first epochs."""
        blocks = [self.blocks_per_epoch * n for n in range(1, epochs + 1)]
        return [self.blocks.seq_len * min(n, self.total_blocks or n) for n in blocks]

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.count:
            return
        start = self.epoch * self.blocks_per_epoch
        indices = stream_indices(len(self.blocks), start, self.count, self.seed)
        for batch in indices.split(self.batch_size):
            rows = self.blocks.rows(batch)  # (B, T + 1)
            yield rows[:, :-1], rows[:, 1:]


class EvaluationBatches:
    """All blocks once, as (x, y) batches of at most `batch_size` blocks; the first `start` blocks are left out.

    They come in the order of the text, or shuffled, if a seed is given.
    """

    def __init__(self, blocks: Blocks, batch_size: int, start: int = 0, shuffle_seed: int | None = None) -> None:
        self.blocks, self.batch_size, self.start = blocks, batch_size, start
        n = len(blocks)
        self.order = torch.arange(n) if shuffle_seed is None else stream_indices(n, 0, n, shuffle_seed)

    def __len__(self) -> int:
        return -(-(len(self.blocks) - self.start) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.start == len(self.blocks):
            return
        for batch in self.order[self.start :].split(self.batch_size):
            rows = self.blocks.rows(batch)  # (B, T + 1)
            yield rows[:, :-1], rows[:, 1:]


def split_batches(
    folder: str, split: str, batch_size: int, part: tuple[float, float] = (0.0, 1.0)
) -> EvaluationBatches:
    """One pass over a split of the text, or over a part of it, in order; see PackedBlocks."""
    return EvaluationBatches(PackedBlocks(folder, split, part), batch_size)
