"""What a routed decoder hands on: tokens as block 1 left them, and tokens as they were answered.

Shapes: B sequences, Q new tokens of each (a prompt, or one), n of them real, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Shallow:
    """What block 1 made of new tokens: exit states (n, D), where they stand, and which of the (B, Q) are real.

    `trunk` are the states (n, D) that block 2 begins at, where it begins below the exit.
    """

    states: Tensor
    sequence: Tensor  # (n,)
    position: Tensor  # (n,)
    mask: Tensor  # (B, Q)
    positions: Tensor  # (B, Q)
    together: bool  # no padding, and all sequences equally long
    trunk: Tensor | None = None

    @property
    def begin(self) -> Tensor:
        """The states (n, D) that block 2 begins at."""
        return self.states if self.trunk is None else self.trunk

    @property
    def last(self) -> Tensor:
        """Each sequence's last real token (B, Q)."""
        return self.mask & (self.mask.flip(1).cumsum(1).flip(1) == 1)

    def within(self, lengths: Tensor) -> Shallow:
        """Its tokens at positions below their sequence's length (B,)."""
        kept = self.position < lengths[self.sequence]
        if kept.all():
            return self
        mask = self.mask.clone()
        mask[self.mask] = kept
        rest = (self.states[kept], self.sequence[kept], self.position[kept])
        trunk = None if self.trunk is None else self.trunk[kept]
        return Shallow(*rest, mask, self.positions, together=False, trunk=trunk)

    @classmethod
    def joined(cls, parts: list[Shallow]) -> Shallow:
        """Tokens read one after the other, as if they had been read at once."""
        if len(parts) == 1:
            return parts[0]
        mask = torch.cat([part.mask for part in parts], dim=1)
        positions = torch.cat([part.positions for part in parts], dim=1)
        trunks = [part.trunk for part in parts if part.trunk is not None]
        if all(part.together for part in parts):  # order is (B, Q)
            shapes = [part.mask.shape for part in parts]

            def side_by_side(found: list[Tensor]) -> Tensor:
                return torch.cat([h.unflatten(0, of) for h, of in zip(found, shapes, strict=True)], dim=1).flatten(0, 1)

            states, trunk = side_by_side([part.states for part in parts]), side_by_side(trunks) if trunks else None
            sequence = torch.arange(len(mask), device=mask.device).repeat_interleave(mask.shape[1])
            return cls(states, sequence, positions.flatten(), mask, positions, together=True, trunk=trunk)
        order = torch.cat([part.sequence for part in parts]).argsort(stable=True)
        return cls(
            torch.cat([part.states for part in parts])[order],
            torch.cat([part.sequence for part in parts])[order],
            torch.cat([part.position for part in parts])[order],
            mask,
            positions,
            together=False,
            trunk=torch.cat(trunks)[order] if trunks else None,
        )


@dataclass(frozen=True)
class Routed:
    """Results of the real tokens in order: logits (n, V), score at the first exit (n,) and exit of each (n,), from 1.

    `mask` says which they are (B, Q).
    """

    logits: Tensor
    score: Tensor
    exits: Tensor
    mask: Tensor

    @property
    def deep(self) -> Tensor:
        """Whether each went beyond the first exit (n,)."""
        return self.exits > 1

    def last(self) -> tuple[Tensor, Tensor]:
        """Logits (B, V) and exit (B,) of each sequence's last real token; zeros where it had none."""
        counts = self.mask.sum(dim=1)
        if not len(self.logits):
            return self.logits.new_zeros(len(counts), self.logits.shape[1]), torch.zeros_like(counts)
        ends = counts.cumsum(0) - 1
        logits, exits = self.logits[ends.clamp(min=0)], self.exits[ends.clamp(min=0)]
        return torch.where(counts[:, None] > 0, logits, 0.0), exits * (counts > 0)
