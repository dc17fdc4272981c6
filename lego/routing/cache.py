"""Keys and values that a routed decoder remembers, one slot a token and layer.

Shapes: L layers, B sequences, Q new tokens of each, G key and value heads of d numbers, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lego.model.layers import Rotary, rotated
from lego.routing.results import Shallow


class KeyValueCache:
    """Of every layer (L, 2, B, G, S, d), keys first; it grows as it is written to.

    Args:
        like: a weight, whose type and device it has.
        layers: L.
        batch_size: B.
        heads: G and d.
    """

    def __init__(self, like: Tensor, layers: int, batch_size: int, heads: tuple[int, int]) -> None:
        self.tensor = like.new_zeros(layers, 2, batch_size, heads[0], 0, heads[1])
        self.slots = 0  # of the longest sequence

    def __len__(self) -> int:
        return len(self.tensor)

    def read(self, place: int, of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (b, G, S, d) of a layer for the sequences `of` (b,), S the longest so far."""
        k, v = self.tensor[place, :, :, :, : self.slots]
        return (k, v) if of is None else (k[of], v[of])

    def write(self, places: slice, k: Tensor, v: Tensor, shallow: Shallow, rotary: Rotary) -> None:
        """Rotates keys (n, L, G, d) of layers, and puts them and the values into the slots of their tokens."""
        if not shallow.together:
            cos, sin = (part[:, None, None] for part in rotary)  # (n, 1, 1, d/2)
            new = torch.stack([rotated(k, (cos, sin)), v], dim=2)  # (n, L, 2, G, d)
            self.tensor[places].permute(2, 4, 0, 1, 3, 5)[shallow.sequence, shallow.position] = new
            return
        B, Q = shallow.positions.shape
        place = self.tensor[places, :, :, :, self.slots - Q : self.slots]  # (L, 2, B, G, Q, d)
        k, v = (part.unflatten(0, (B, Q)).permute(2, 0, 3, 1, 4) for part in (k, v))  # (L, B, G, Q, d)
        place[:, 1] = v
        cos, sin = (part.view(B, 1, Q, -1) for part in rotary)
        (first, second), (first_place, second_place) = k.chunk(2, dim=-1), place[:, 0].chunk(2, dim=-1)
        torch.mul(first, cos, out=first_place).addcmul_(second, sin, value=-1)  # `rotated`, without a copy in between
        torch.mul(second, cos, out=second_place).addcmul_(first, sin)

    def make_room(self, slots: int, filled: bool) -> None:
        """Doubles where it is too short, so that decoding copies it a logarithmic number of times.

        Args:
            slots: wanted.
            filled: every slot is written before it is read; else what masks hide must be finite.
        """
        self.slots, have = slots, self.tensor.shape[4]
        if slots <= have:
            return
        shape = (*self.tensor.shape[:4], max(slots, 2 * have), self.tensor.shape[5])
        if not have and filled:
            self.tensor = self.tensor.new_empty(shape)
            return
        old, self.tensor = self.tensor, self.tensor.new_zeros(shape)
        self.tensor[:, :, :, :, :have] = old
