"""The blocks above the first exit: which layers each has, and whose keys and values these layers read.

Layers are numbered from 1. A block begins with layers that repeat the last ones of the block below, on their keys and
values; its new layers above read keys and values that they project from the states of the first exit, which every token
has (docs/ashem.md). So a token's result depends on block 1's states and on its own path alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Block(NamedTuple):
    """Layers `first` to `last`, its exit, of which the first `repeats` repeat the last ones of the block below."""

    first: int
    last: int
    repeats: int

    @property
    def layers(self) -> int:
        """How many it has."""
        return self.last - self.first + 1

    @property
    def repeating(self) -> range:
        """Its layers that repeat others."""
        return range(self.first, self.first + self.repeats)

    @property
    def own(self) -> range:
        """Its layers with keys and values of their own."""
        return range(self.first + self.repeats, self.last + 1)


def blocks_above(exit_layer: int, num_layers: int, repeats: int, later: Sequence[Sequence[int]]) -> tuple[Block, ...]:
    """Block 2 and all later ones; none where nothing lies above the exit.

    Args:
        exit_layer: last layer of block 1.
        num_layers: of all blocks.
        repeats: of block 2's layers.
        later: of each later block the number of its layers, and how many of these repeat others.

    Raises:
        ValueError: a block has no layer, or repeats more than it or the block below has.
    """
    second = num_layers - sum(layers for layers, _ in later)
    if later and second <= exit_layer:
        raise ValueError(f"later_blocks leave block 2 no layer of {num_layers}, got {[list(one) for one in later]}")
    blocks = [Block(exit_layer + 1, second, repeats)] if second > exit_layer else []
    for number, (layers, repeated) in enumerate(later, 3):
        below = blocks[-1]
        most = min(layers, below.layers)
        if layers < 1 or not 0 <= repeated <= most:
            raise ValueError(
                f"later_blocks: block {number} needs at least one layer, and can repeat 0 to {max(0, most)} of those "
                f"of the block below, got {[layers, repeated]}"
            )
        blocks.append(Block(below.last + 1, below.last + layers, repeated))
    return tuple(blocks)


def source_of(number: int, blocks: Sequence[Block]) -> int:
    """The layer whose keys and values a layer reads: itself, or the one that it repeats in the end."""
    for block in reversed(blocks):
        if number in block.repeating:
            number -= block.repeats  # the last layers of the block below end where this one begins
    return number


def repeated_by(block: Block, blocks: Sequence[Block]) -> Iterator[int]:
    """The layers whose keys and values a block's repeating layers read, in order."""
    return (source_of(number, blocks) for number in block.repeating)
