"""Chosen tokens of whole sequences on their way through the blocks above the first exit.

Shapes: B sequences, T tokens, n of them chosen, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lego.model.blocks import Block, repeated_by, source_of
from lego.model.layers import Rows, TransformerLayer
from lego.model.reached import Reached


class Climb:
    """Takes tokens through one block after another; those that leave on the way change nothing for the others.

    Args:
        layer: the model's layer of a number.
        blocks: of the model, in `sequence` context.
        reached: what `block` reads: states that it begins at and exit states (B, T, D), keys and values of the layers
            that it repeats.
        mask: the chosen tokens (B, T).
        block: where they begin; default block 2.
    """

    def __init__(
        self,
        layer: Callable[[int], TransformerLayer],
        blocks: Sequence[Block],
        reached: Reached,
        mask: Tensor,
        block: Block | None = None,
    ) -> None:
        self.layer, self.blocks, self.exits = layer, blocks, reached.states[-1]
        block = block or blocks[0]
        self.pairs = dict(zip(repeated_by(block, blocks), reached.keys_values, strict=False))
        later = blocks[blocks.index(block) + 1 :]
        self.needed = {source for one in later for source in repeated_by(one, blocks)}
        self.every = layer(1).self_attn.rotary(torch.arange(mask.shape[1], device=mask.device))  # (T, d/2)
        self.states = deque([reached.states[0][mask]])  # (n, D) each: above the last layers, which a block may repeat
        self.begun = False
        self._stand(mask)

    def _stand(self, mask: Tensor) -> None:
        self.mask, self.rows = mask, Rows.of(mask)
        self.own = self.layer(1).self_attn.rotary(self.rows.positions.unsqueeze(1))  # (B, 1, Q, d/2)

    def through(self, block: Block, last: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Number and output (n, D) of each of a block's layers, up to `last`."""
        x = self.states[-1 - block.repeats] if self.begun else self.states[0]
        place = self.blocks.index(block) + 1
        kept = 1 + (self.blocks[place].repeats if place < len(self.blocks) else 0)
        self.states, self.begun = deque([x], maxlen=kept), True
        for number in range(block.first, min(block.last, last or block.last) + 1):
            if len(x):
                x = self.layer(number).over(x, self.rows, *self.keys_values(number), self.own)
            self.states.append(x)
            yield number, x

    def keys_values(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, T, d) of all tokens that a layer reads; kept where a later block reads them too."""
        source = source_of(number, self.blocks)
        if source in self.pairs:
            return self.pairs[source]
        pair = self.layer(source).keys_values(self.exits, self.every)
        if source in self.needed:
            self.pairs[source] = pair
        return pair

    def narrow(self, goes_on: Tensor) -> None:
        """Lets those tokens leave that are not marked in goes_on (n,)."""
        mask = self.mask.clone()
        mask[self.mask] = goes_on
        self.states = deque((h[goes_on] for h in self.states), maxlen=self.states.maxlen)
        self._stand(mask)

    def reached(self, block: Block) -> Reached:
        """What the next block reads of those who are here; the states of all others that it begins at are zero."""
        x = self.states[-1 - block.repeats]
        start = x.new_zeros(*self.mask.shape, x.shape[-1])  # (B, T, D)
        start[self.mask] = x
        return Reached([start, self.exits], [self.keys_values(number) for number in block.repeating])


def last_of(layers: Iterator[tuple[int, Tensor]], start: Tensor) -> Tensor:
    """The last of the outputs (n, D), of which no other is kept; `start` where there is none."""
    x = start
    for _, x in layers:  # noqa: B007
        pass
    return x
