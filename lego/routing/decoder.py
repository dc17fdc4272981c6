"""Routed depth with a cache: decision, gathering and layers are those of training, token by token or many at once.

Shapes: B sequences, Q new tokens of each (a prompt, or one), n of them real, D width, V vocabulary. A sequence's
tokens take the slots 0, 1, 2, ... of its cache whatever padding they came with, so a slot is a position.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.nn import functional as F

from lego.model.blocks import Block, source_of
from lego.model.exit_criteria import Criterion, max_prob, needs_logits
from lego.model.gate import Gate
from lego.model.layers import Rotary, Rows
from lego.model.transformer import BaseTransformer
from lego.routing.cache import KeyValueCache
from lego.routing.results import Routed, Shallow

FEW = 3  # copying the cache of a third of the sequences takes less time than attending to all
ALWAYS_DEEP = 2.0
"""A threshold above every score in [0, 1]."""


class RoutedDecoder:
    """Reads tokens, routes each by a criterion, and remembers keys and values of every layer.

    An exited token's keys and values in block 2 are projections of its exit state in `sequence` context, made when a
    later token first goes deep, and none in `token` context; in `full` context they come from block 2's own states, so
    block 2 is run for every token and an exit saves nothing but its head.

    Args:
        model: a model with two blocks, on its device; of more, `CascadeDecoder` reads every exit.
        threshold: a token leaves at the exit if its score is at least this: 0.0 is block 1 alone, above the largest
            score always deep; None switches routing off, and the exit head is evaluated for a gate alone.
        batch_size: sequences (B).
        criterion: see `lego.model.exit_criteria`.
        gate: mixes both exits in the answer of a token that goes deep; it then needs the exit's head too.

    Raises:
        ValueError: the threshold is negative or not a number.
    """

    def __init__(
        self,
        model: BaseTransformer,
        threshold: float | None,
        batch_size: int = 1,
        criterion: Criterion = max_prob,
        gate: Gate | None = None,
    ) -> None:
        if threshold is not None and not threshold >= 0:
            raise ValueError(f"threshold must be None or at least 0.0, got {threshold}")
        self.model, self.threshold, self.criterion = model.eval(), threshold, criterion
        self.gate = None if gate is None else gate.to(model.embedding.weight.device)
        weight = model.embedding.weight
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        self.length: int | None = 0  # of all sequences, while they are equally long
        self.waiting: list[list[Shallow]] = [[] for _ in model.blocks]  # tokens whose keys and values a block lacks
        self.heads = (model.sizes["num_kv_heads"], model.sizes["dim"] // model.sizes["num_heads"])
        own = [] if model.block2_context == "token" else model.own_layers
        numbers = [*range(1, model.exit_layer + 1), *own]  # of layers with keys and values
        self.place = {number: place for place, number in enumerate(numbers)}
        self.cache = KeyValueCache(weight, len(numbers), batch_size, self.heads)
        self.projections: dict[Block, Tensor] = {}  # of exit states, to a block's keys and values

    @torch.no_grad()
    def read(self, ids: Tensor, mask: Tensor | None = None, last_only: bool = False) -> Routed:
        """Reads the next tokens of each sequence.

        Args:
            ids: (B, Q).
            mask: true for real tokens (B, Q); padding may stand anywhere, and a sequence may have none. Default all.
            last_only: results are wanted of each sequence's last token alone: nothing attends to what block 2 makes of
                the others (but in `full` context), so they are neither scored nor computed there.

        Raises:
            ValueError: ids are not (B, Q) for the decoder's B.
        """
        shallow = self.shallow(ids, mask)
        model, k, h, wanted = self.model, self.model.exit_layer, shallow.states, shallow.mask
        if last_only and ids.shape[1] > 1:
            wanted = shallow.last
            h = h[wanted[shallow.mask]]
        if self.threshold is None:
            score, deep = torch.zeros(len(h), device=h.device), torch.ones(len(h), dtype=torch.bool, device=h.device)
            states = self.deep_states(shallow, wanted[shallow.mask])
            return Routed(self.deep_logits(h, states), score, 1 + deep.long(), wanted)
        if needs_logits(self.criterion):
            logits, score = model.scored_logits_at(h, k, self.criterion)
        else:
            logits, score = None, self.criterion(h, h.new_empty(len(h), 0))
        deep = score < self.threshold
        chosen = wanted[shallow.mask]  # (n,)
        chosen[chosen.clone()] = deep
        states = self.deep_states(shallow, chosen)
        if logits is None and self.gate is not None:  # every token needs the exit's head then
            logits = model.logits_at(h, k)
        if logits is None:
            logits = self._logits_of_both(h, deep, states)
        elif len(states):
            logits[deep] = self.deep_logits(h[deep], states, logits[deep]).to(logits.dtype)
        return Routed(logits, score, 1 + deep.long(), wanted)

    def full_logits(self, shallow: Shallow) -> Tensor:
        """What all new tokens are answered with at full depth (n, V)."""
        every = torch.ones(len(shallow.states), dtype=torch.bool, device=shallow.states.device)
        return self.deep_logits(shallow.states, self.deep_states(shallow, every))

    def deep_logits(self, h: Tensor, states: Tensor, shallow: Tensor | None = None) -> Tensor:
        """What tokens that went deep are answered with (n, V): logits, or a mixture's log-probabilities.

        Args:
            h: their exit states (n, D).
            states: those of the last layer (n, D).
            shallow: the exit's logits (n, V), where they are there already.
        """
        logits = self.model.logits_at(states, self.model.num_layers)
        if self.gate is None:
            return logits
        return self.gate.mixed(self.model.logits_at(h, self.model.exit_layer) if shallow is None else shallow, logits)

    def _logits_of_both(self, h: Tensor, deep: Tensor, states: Tensor) -> Tensor:
        """Logits (n, V), one head a token: of exit states h (n, D), or of deep states (n_deep, D) where deep (n,)."""
        model = self.model
        if model.deep_head is None:
            normed = model.layer(model.exit_layer).exit_norm(h)
            normed[deep] = model.layer(model.num_layers).exit_norm(states)
            return model.output_head(normed)
        logits = h.new_empty(len(h), model.sizes["vocab_size"])
        logits[~deep] = model.logits_at(h[~deep], model.exit_layer)
        logits[deep] = model.logits_at(states, model.num_layers)
        return logits

    @torch.no_grad()
    def shallow(self, ids: Tensor, mask: Tensor | None = None) -> Shallow:
        """Runs block 1 over the next tokens; see `read`."""
        if ids.dim() != 2 or len(ids) != len(self.lengths):
            raise ValueError(f"ids must be ({len(self.lengths)}, Q), got {tuple(ids.shape)}")
        (B, Q), device = ids.shape, ids.device
        mask = None if mask is None or bool(mask.all()) else mask.bool()
        together = mask is None and self.length is not None
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        positions = (self.lengths[:, None] + mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, Q)
        sequence = torch.arange(B, device=device)[:, None].expand(B, Q)[mask]  # (n,)
        states = self.model.embedding(ids[mask])  # (n, D)
        shallow = Shallow(states, sequence, positions[mask], mask, positions, together)
        self.lengths = self.lengths + mask.sum(dim=1)
        self.length = self.length + Q if together and self.length is not None else None
        self.cache.make_room(int(self.lengths.max()) if self.length is None else self.length, filled=together)
        rotary = self._rotary(shallow)
        rows, own, _ = self._rows_of(shallow)
        for number in range(1, self.model.exit_layer + 1):
            if self.model.branches and number == self.model.branch_layer + 1:
                shallow.trunk = shallow.states
            self._remember(number, shallow.states, shallow, rotary)
            shallow.states = self.model.layer(number).over(shallow.states, rows, *self._cached(number), own)
        for waiting, block in zip(self.waiting, self.model.blocks, strict=True):
            if self.model.block2_context == "sequence" and block.own:
                waiting.append(shallow)
        return shallow

    @torch.no_grad()
    def deep_states(self, shallow: Shallow, deep: Tensor) -> Tensor:
        """Full-depth states (n_deep, D) of the tokens marked in deep (n,), all of whose sequences remember the rest."""
        model, h = self.model, shallow.states
        numbers = range(model.exit_layer + 1, model.num_layers + 1)
        if model.block2_context == "full":
            rotary, (rows, own, _) = self._rotary(shallow), self._rows_of(shallow)
            for number in numbers:
                self._remember(number, h, shallow, rotary)
                h = model.layer(number).over(h, rows, *self._cached(number), own)
            return h[deep]
        if not deep.any():
            return h[deep]
        if model.block2_context == "token":
            return model.run_layers(h[deep].unsqueeze(1), numbers.start, model.num_layers).squeeze(1)  # (n_deep, D)
        states = [shallow.begin[deep]]
        for block in model.blocks:
            states = self.through(block, shallow, deep, states)
        return states[-1]

    def through(self, block: Block, shallow: Shallow, chosen: Tensor, below: list[Tensor]) -> list[Tensor]:
        """Runs a block, in `sequence` context, for the tokens marked in chosen (n,).

        Args:
            block: of the model.
            shallow: all new tokens.
            chosen: which of them go through it.
            below: what this returned of the block below, (n_chosen, D) each; of block 2 the state that it begins at.

        Returns:
            The states above its last layers, so many as the next block needs: the last one, and those it repeats from.
        """
        rows, own, of = self._rows_of(shallow, chosen)
        place = self.model.blocks.index(block)
        if self.waiting[place]:
            waiting, self.waiting[place] = Shallow.joined(self.waiting[place]), []
            self._remember_exits(block, waiting)
        after = self.model.blocks[place + 1 : place + 2]
        states = deque([below[-1 - block.repeats] if place else below[0]], 1 + sum(one.repeats for one in after))
        for number in range(block.first, block.last + 1):
            kept = self._cached(number, of)
            states.append(self.model.layer(number).over(states[-1], rows, *kept, own))
        return list(states)

    def forget(self, lengths: Tensor) -> None:
        """Takes back what was read beyond the first `lengths` (B,) tokens; their slots are written anew."""
        self.lengths = torch.minimum(self.lengths, lengths.to(self.lengths.device))
        for place, waiting in enumerate(self.waiting):
            self.waiting[place] = [rest for part in waiting if len((rest := part.within(self.lengths)).states)]
        same = bool((self.lengths == self.lengths[0]).all())
        self.length = int(self.lengths[0]) if same else None
        self.cache.slots = int(self.lengths.max())

    def _cached(self, number: int, of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (b, G, S, d) that a layer reads, for the sequences `of` (b,), S the longest so far."""
        return self.cache.read(self.place[source_of(number, self.model.blocks)], of)

    def _remember(self, number: int, h: Tensor, shallow: Shallow, rotary: Rotary) -> None:
        """Writes a layer's keys and values of states h (n, D) into the slots of their tokens."""
        layer, (G, d) = self.model.layer(number), self.heads
        x = layer.input_layernorm(h)
        k, v = (project(x).view(-1, 1, G, d) for project in (layer.self_attn.k_proj, layer.self_attn.v_proj))
        place = self.place[number]
        self.cache.write(slice(place, place + 1), k, v, shallow, rotary)

    def _remember_exits(self, block: Block, shallow: Shallow) -> None:
        """Writes a block's keys and values of exit states, all layers' at once from one normalised state."""
        model, start = self.model, self.place[block.own.start]
        layers = [model.layer(number) for number in block.own]
        if block not in self.projections:
            parts = [
                torch.cat([layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]) * layer.input_layernorm.weight
                for layer in layers
            ]
            self.projections[block] = torch.cat(parts)  # (L * 2 * G * d, D)
        normed = F.rms_norm(shallow.states, (shallow.states.shape[-1],), eps=model.sizes["norm_eps"])
        both = F.linear(normed, self.projections[block]).view(-1, len(layers), 2, *self.heads)  # (n, L, 2, G, d)
        places = slice(start, start + len(layers))
        self.cache.write(places, both[:, :, 0], both[:, :, 1], shallow, self._rotary(shallow))

    def _rotary(self, shallow: Shallow) -> Rotary:
        """Of all its tokens (n, d/2)."""
        return self.model.layer(1).self_attn.rotary(shallow.position)

    def _rows_of(self, shallow: Shallow, chosen: Tensor | None = None) -> tuple[Rows, Rotary, Tensor | None]:
        """Where the tokens marked in chosen (n,) stand, by default all: rows of the sequences that have any of them.

        Returns:
            The rows (b, q), their rotary factors (b, 1, q, d/2), and the sequences (b,) if they are few.
        """
        mask, positions, of = shallow.mask, shallow.positions, None
        if chosen is None or bool(chosen.all()):
            rows = Rows(positions, mask, packed=True, newest=True) if shallow.together else None
        else:
            mask = mask.clone()
            mask[shallow.mask] = chosen
            used = mask.any(dim=1)
            few = FEW * int(used.sum()) <= len(used)
            if few:
                of = used.nonzero()[:, 0]  # (b,)
                mask, positions = mask[of], positions[of]
            alone = shallow.together and mask.shape[1] == 1
            rows = Rows(positions, mask, packed=few, newest=True) if alone else None
        if rows is None:
            rows = Rows.of(mask)
            rows = Rows(positions.gather(1, rows.positions), rows.taken)
        return rows, self.model.layer(1).self_attn.rotary(rows.positions.unsqueeze(1)), of
