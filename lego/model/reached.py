"""What block 2 reads of all tokens where it begins below the exit, and the same as one vector a token, for the store.

Shapes: B sequences, T tokens, D width, G key and value heads of d numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Reached(NamedTuple):
    """What block 2 reads in `sequence` context.

    `states` are outputs (B, T, D) of the layer that block 2 begins at and of the exit, and where they were asked for of
    those between; `keys_values` are of the layers after the first (B, G, T, d).
    """

    states: list[Tensor]
    keys_values: list[tuple[Tensor, Tensor]]

    def packed(self) -> Tensor:
        """First state, exit state, and keys and values of each layer of a token, side by side (B, T, W)."""
        pairs = [part.transpose(1, 2).flatten(2) for pair in self.keys_values for part in pair]  # (B, T, G d)
        return torch.cat([self.states[0], self.states[-1], *pairs], dim=2)

    @classmethod
    def unpacked(cls, packed: Tensor, sizes: dict[str, Any]) -> Reached:
        """What was `packed` (B, T, W), by a model of these sizes."""
        dim, heads = sizes["dim"], sizes["num_kv_heads"]
        start, exits, rest = packed.split([dim, dim, packed.shape[-1] - 2 * dim], dim=2)
        parts = rest.split(heads * (dim // sizes["num_heads"]), dim=2)
        ready = [part.unflatten(2, (heads, -1)).transpose(1, 2).contiguous() for part in parts]  # (B, G, T, d)
        return cls([start, exits], list(zip(ready[::2], ready[1::2], strict=True)))
