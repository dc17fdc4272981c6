"""The visited states of a run: detached, with per-sample energies and lengths (specification, 3.6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SantanaLog:
    """States s_0 .. s_T of a batch in the order in which they were visited; s_0 counts.

    A row that stopped is copied on; `lengths` says how many of its states are its own.
    """

    def __init__(self) -> None:
        self._states: list[Tensor] = []
        self._energies: list[Tensor] = []
        self._lengths: Tensor | None = None
        self.meta: list[dict[str, Any] | None] = []

    def add(
        self,
        state: Tensor,
        energy: Tensor | None = None,
        meta: dict[str, Any] | None = None,
        active: Tensor | None = None,
    ) -> None:
        """Takes in a copy of a state (B, d).

        Args:
            state: detached here.
            energy: squared L2 length of the step to it (B,); None for s_0.
            meta: anything to remember with it.
            active: rows (B,) that took this step; None = all.

        Raises:
            ValueError: an energy that is not per sample.
        """
        if energy is not None and energy.shape != state.shape[:1]:
            raise ValueError(f"energy must be per sample, {tuple(state.shape[:1])}, got {tuple(energy.shape)}")
        taken = torch.ones(len(state), dtype=torch.long, device=state.device) if active is None else active.long()
        self._lengths = taken if self._lengths is None else self._lengths + taken
        self._states.append(state.detach().clone())
        if energy is not None:
            self._energies.append(energy.detach().clone())
        self.meta.append(meta)

    @property
    def lengths(self) -> Tensor:
        """Own states of each row (B,), s_0 counted."""
        if self._lengths is None:
            raise ValueError("the log is empty")
        return self._lengths

    @property
    def steps(self) -> Tensor:
        """Updates of each row (B,)."""
        return self.lengths - 1

    @property
    def initial(self) -> Tensor:
        return self._states[0]

    @property
    def final(self) -> Tensor:
        return self._states[-1]

    def to_tensor(self) -> Tensor:
        """States (T + 1, B, d)."""
        return torch.stack(self._states)

    def energies(self) -> Tensor:
        """Energies (T, B) of the updates; 0 where a row had stopped."""
        return torch.stack(self._energies) if self._energies else self.initial.new_zeros(0, len(self.initial))

    def rows(self, order: Tensor) -> SantanaLog:
        """The same log with its rows in another order."""
        other = SantanaLog()
        other._states = [state[order] for state in self._states]
        other._energies = [energy[order] for energy in self._energies]
        other._lengths, other.meta = self.lengths[order], list(self.meta)
        return other

    @classmethod
    def joined(cls, logs: list[SantanaLog]) -> SantanaLog:
        """One log of the rows of several; shorter ones are copied on, their lengths stay."""
        longest, other = max(len(log) for log in logs), cls()

        def padded(log: SantanaLog, place: int) -> Tensor:
            return log._states[min(place, len(log) - 1)]

        other._states = [torch.cat([padded(log, place) for log in logs]) for place in range(longest)]
        for place in range(longest - 1):
            parts = [
                log._energies[place] if place < len(log) - 1 else log.initial.new_zeros(len(log.initial))
                for log in logs
            ]
            other._energies.append(torch.cat(parts))
        other._lengths, other.meta = torch.cat([log.lengths for log in logs]), [None] * longest
        return other

    def clear(self) -> None:
        """Forgets everything, lengths included."""
        self._states, self._energies, self._lengths, self.meta = [], [], None, []

    def __len__(self) -> int:
        return len(self._states)
