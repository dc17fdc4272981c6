"""Routed depth with a cache: decision, gathering and layers are those of training, token by token or many at once.

Shapes: B sequences, Q new tokens of each (a prompt, or one), n of them real, D width, V vocabulary. A sequence's
tokens take the slots 0, 1, 2, ... of its cache whatever padding they came with, so a slot is a position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lego.layers import Rows
from lego.losses import max_probability
from lego.transformer import BaseTransformer

Criterion = Callable[[Tensor, Tensor], Tensor]


def max_prob(exit_states: Tensor, logits: Tensor) -> Tensor:
    """The default criterion: the largest softmax probability (n,) at the exit."""
    return max_probability(logits)


@dataclass
class Shallow:
    """What block 1 made of new tokens: exit states (n, D), where they stand, and which of the (B, Q) are real."""

    states: Tensor
    sequence: Tensor  # (n,)
    position: Tensor  # (n,)
    mask: Tensor  # (B, Q)
    positions: Tensor  # (B, Q)


@dataclass(frozen=True)
class Routed:
    """Results of the real tokens in order: logits (n, V), score (n,) and whether each went deep (n,); mask (B, Q)."""

    logits: Tensor
    score: Tensor
    deep: Tensor
    mask: Tensor

    def last(self) -> tuple[Tensor, Tensor]:
        """Logits (B, V) and depth (B,) of each sequence's last real token; zeros where it had none."""
        counts = self.mask.sum(dim=1)
        ends = counts.cumsum(0) - 1
        logits, deep = self.logits[ends.clamp(min=0)], self.deep[ends.clamp(min=0)]
        return torch.where(counts[:, None] > 0, logits, 0.0), deep & (counts > 0)


class RoutedDecoder:
    """Reads tokens, routes each by a criterion, and remembers keys and values of every layer.

    An exited token's keys and values in block 2 are projections of its exit state in `sequence` context, and none in
    `token` context; in `full` context they come from block 2's own states, so block 2 is run for every token and an
    exit saves nothing but its head.

    Args:
        model: a model with two blocks, on its device.
        threshold: a token leaves at the exit if its score is at least this: 0.0 is block 1 alone, above the largest
            score always deep; None switches routing off, and the exit head is not evaluated.
        batch_size: sequences (B).
        criterion: (exit states (n, D), exit logits (n, V)) -> score (n,).

    Raises:
        ValueError: the threshold is negative or not a number.
    """

    def __init__(
        self, model: BaseTransformer, threshold: float | None, batch_size: int = 1, criterion: Criterion = max_prob
    ) -> None:
        if threshold is not None and not threshold >= 0:
            raise ValueError(f"threshold must be None or at least 0.0, got {threshold}")
        self.model, self.threshold, self.criterion = model.eval(), threshold, criterion
        weight = model.embedding.weight
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        shape = (batch_size, model.sizes["num_kv_heads"], 0, model.sizes["dim"] // model.sizes["num_heads"])
        self.keys = [weight.new_zeros(shape) for _ in range(model.num_layers)]
        self.values = [weight.new_zeros(shape) for _ in range(model.num_layers)]

    @torch.no_grad()
    def read(self, ids: Tensor, mask: Tensor | None = None) -> Routed:
        """Reads the next tokens of each sequence.

        Args:
            ids: (B, Q).
            mask: true for real tokens (B, Q); padding may stand anywhere, and a sequence may have none. Default all.

        Raises:
            ValueError: ids are not (B, Q) for the decoder's B.
        """
        shallow = self.shallow(ids, mask)
        h, k = shallow.states, self.model.exit_layer
        if self.threshold is None:
            deep = torch.ones(len(h), dtype=torch.bool, device=h.device)
            score = torch.zeros(len(h), device=h.device)
            return Routed(self.deep_logits(shallow, deep), score, deep, shallow.mask)
        logits = self.model.logits_at(h, k)
        score = self.criterion(h, logits)
        deep = score < self.threshold
        logits[deep] = self.deep_logits(shallow, deep).to(logits.dtype)
        return Routed(logits, score, deep, shallow.mask)

    @torch.no_grad()
    def shallow(self, ids: Tensor, mask: Tensor | None = None) -> Shallow:
        """Runs block 1 over the next tokens; see `read`."""
        if ids.dim() != 2 or len(ids) != len(self.lengths):
            raise ValueError(f"ids must be ({len(self.lengths)}, Q), got {tuple(ids.shape)}")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        positions = (self.lengths[:, None] + mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, Q)
        sequence, position = mask.nonzero()[:, 0], positions[mask]  # (n,), (n,)
        shallow = Shallow(self.model.embedding(ids[mask]), sequence, position, mask, positions)
        self.lengths = self.lengths + mask.sum(dim=1)
        self._make_room(int(self.lengths.max()))
        rows = self._rows(shallow, mask)
        for number in range(1, self.model.exit_layer + 1):
            shallow.states = self._layer(number, shallow.states, shallow, rows)
        return shallow

    @torch.no_grad()
    def deep_logits(self, shallow: Shallow, deep: Tensor) -> Tensor:
        """Full-depth logits (n_deep, V) of the tokens marked in deep (n,); the others' cache entries are filled."""
        model, h = self.model, shallow.states
        numbers = range(model.exit_layer + 1, model.num_layers + 1)
        if model.block2_context == "token":
            x = model.run_layers(h[deep].unsqueeze(1), numbers.start, model.num_layers).squeeze(1)  # (n_deep, D)
        elif model.block2_context == "sequence":
            chosen = shallow.mask.clone()
            chosen[shallow.mask] = deep
            x, rows = h[deep], self._rows(shallow, chosen) if deep.any() else None
            for number in numbers:
                self._remember(number, h, shallow)
                if rows is not None:
                    x = model.layer(number).over(x, rows, *self._cached(number))
        else:
            rows = self._rows(shallow, shallow.mask)
            for number in numbers:
                h = self._layer(number, h, shallow, rows)
            x = h[deep]
        return model.logits_at(x, model.num_layers)

    def forget(self, lengths: Tensor) -> None:
        """Takes back what was read beyond the first `lengths` (B,) tokens; their slots are written anew."""
        self.lengths = torch.minimum(self.lengths, lengths.to(self.lengths.device))

    def _layer(self, number: int, h: Tensor, shallow: Shallow, rows: Rows) -> Tensor:
        self._remember(number, h, shallow)
        return self.model.layer(number).over(h, rows, *self._cached(number))

    def _cached(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, S, d) of a layer, S the longest sequence so far."""
        slots = int(self.lengths.max())
        return self.keys[number - 1][:, :, :slots], self.values[number - 1][:, :, :slots]

    def _remember(self, number: int, h: Tensor, shallow: Shallow) -> None:
        layer = self.model.layer(number)
        k, v = layer.self_attn.keys_values_at(layer.input_layernorm(h), shallow.position)  # (n, G, d)
        self.keys[number - 1][shallow.sequence, :, shallow.position] = k
        self.values[number - 1][shallow.sequence, :, shallow.position] = v

    def _rows(self, shallow: Shallow, mask: Tensor) -> Rows:
        rows = Rows.of(mask)
        return Rows(shallow.positions.gather(1, rows.positions), rows.taken)

    def _make_room(self, slots: int) -> None:
        """Doubles the cache where it is too short, so that decoding copies it a logarithmic number of times."""
        have = self.keys[0].shape[2]
        if slots <= have:
            return
        more = max(slots, 2 * have) - have
        self.keys, self.values = (
            [torch.cat([t, t.new_zeros(*t.shape[:2], more, t.shape[3])], dim=2) for t in cache]
            for cache in (self.keys, self.values)
        )
