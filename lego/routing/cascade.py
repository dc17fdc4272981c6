"""Routed depth where there are more than two blocks: a token leaves at the first exit that is sure enough of it.

Shapes: B sequences, Q new tokens of each, n of them whose answers are wanted, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lego.model.exit_criteria import Criterion, max_prob, needs_logits
from lego.model.gate import Gate
from lego.model.transformer import BaseTransformer
from lego.routing.decoder import RoutedDecoder
from lego.routing.results import Routed, Shallow


class CascadeDecoder:
    """Reads tokens, routes each at every exit that it comes to, and remembers keys and values of every layer.

    Args:
        model: with two blocks or more, in `sequence` context, on its device.
        thresholds: of each exit but the last: a token leaves there if its score is at least this. None: none leaves.
        batch_size: sequences (B).
        criteria: of each of these exits, read from its state and its answer; default max_prob.
        gates: of each exit but the first; it mixes its own answer with that of the exit below. Default none.

    Raises:
        ValueError: another context, or as many thresholds, criteria or gates as there are not exits.
    """

    def __init__(
        self,
        model: BaseTransformer,
        thresholds: Sequence[float] | None,
        batch_size: int = 1,
        criteria: Sequence[Criterion] | None = None,
        gates: Sequence[Gate | None] | None = None,
    ) -> None:
        if not model.blocks or model.block2_context != "sequence":
            raise ValueError("a cascade has at least two blocks, in context sequence")
        self.model, self.decoder, count = model, RoutedDecoder(model, None, batch_size), len(model.blocks)
        self.thresholds = None if thresholds is None else list(thresholds)
        self.criteria, self.gates = list(criteria or [max_prob] * count), list(gates or [None] * count)
        for what, found in (("thresholds", self.thresholds), ("criteria", self.criteria), ("gates", self.gates)):
            if found is not None and len(found) != count:
                raise ValueError(f"{what} must be {count}, one for each exit but one, got {len(found)}")
        if wrong := [one for one in self.thresholds or () if not one >= 0]:
            raise ValueError(f"thresholds must be at least 0.0, got {wrong[0]}")
        self.gates = [gate if gate is None else gate.to(model.embedding.weight.device) for gate in self.gates]

    @property
    def lengths(self) -> Tensor:
        """Tokens that each sequence has so far (B,)."""
        return self.decoder.lengths

    def shallow(self, ids: Tensor, mask: Tensor | None = None) -> Shallow:
        """Runs block 1 over the next tokens; see `read`."""
        return self.decoder.shallow(ids, mask)

    def read(self, ids: Tensor, mask: Tensor | None = None, last_only: bool = False) -> Routed:
        """Reads the next tokens of each sequence; arguments as for `RoutedDecoder.read`."""
        shallow = self.shallow(ids, mask)
        return self._answered(shallow, shallow.last if last_only else shallow.mask, self.thresholds)

    def full_logits(self, shallow: Shallow) -> Tensor:
        """What all new tokens are answered with at full depth (n, V)."""
        return self._answered(shallow, shallow.mask, None).logits

    @torch.no_grad()
    def _answered(self, shallow: Shallow, wanted: Tensor, thresholds: list[float] | None) -> Routed:
        """Answers of the tokens wanted (B, Q), each from the exit where it leaves."""
        chosen = wanted[shallow.mask]  # of all new tokens
        h, below = shallow.states[chosen], [shallow.begin[chosen]]
        here = torch.arange(len(h), device=h.device)  # which of the wanted ones have come this far
        logits = h.new_empty(len(h), self.model.sizes["vocab_size"])
        exits, first = torch.ones_like(here), h.new_zeros(len(h))
        answers = self.model.logits_at(h, self.model.exit_layer) if self._all_need(0, thresholds) else None
        for place, block in enumerate(self.model.blocks):
            if thresholds is not None:
                score = self.criteria[place](h, h.new_empty(len(h), 0) if answers is None else answers)
                first, on = first if place else score, score < thresholds[place]
                left, known = ~on, None if answers is None else answers[~on]
                logits[here[left]] = self.model.logits_at(h[left], self.model.exits[place]) if known is None else known
                here, below, answers = here[on], [x[on] for x in below], None if answers is None else answers[on]
                chosen[chosen.clone()] = on
            if not len(here):
                break
            exits[here] += 1
            below = self.decoder.through(block, shallow, chosen, below)
            h, gate = below[-1], self.gates[place]
            if gate is not None and answers is not None:
                answers = gate.mixed(answers, self.model.logits_at(h, block.last)).to(h.dtype)
            elif block is self.model.blocks[-1] or self._all_need(place + 1, thresholds):
                answers = self.model.logits_at(h, block.last)
            else:
                answers = None
        if len(here) and answers is not None:
            logits[here] = answers
        return Routed(logits, first, exits, wanted)

    def _all_need(self, place: int, thresholds: list[float] | None) -> bool:
        """Whether every token that comes to an exit needs its logits: for its score, or for the next one's answer."""
        scored = thresholds is not None and needs_logits(self.criteria[place])
        return scored or self.gates[place] is not None

    def forget(self, lengths: Tensor) -> None:
        """As `RoutedDecoder.forget`."""
        self.decoder.forget(lengths)
