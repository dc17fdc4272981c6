"""Text from a routed model: each token at its own depth, or exactly as the full model would write it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lego.model.exit_criteria import Criterion, max_prob
from lego.model.gate import Gate
from lego.model.transformer import BaseTransformer
from lego.routing.cascade import CascadeDecoder
from lego.routing.decoder import RoutedDecoder
from lego.routing.results import Shallow


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0.0 is greedy.
        top_k: only the k most probable tokens; 0 = all.
        top_p: only the most probable tokens that together have at least this probability.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"need temperature >= 0, top_k >= 0 and top_p in (0, 1], got {self}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution (..., V) that is sampled from; greedy is all on the best token."""
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # no overflow however cold
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        p = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = p.sort(descending=True, dim=-1)
            before = ordered.cumsum(-1) - ordered  # the probability of all that is more probable
            p = p.masked_fill(torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, before >= self.top_p), 0.0)
            p = p / p.sum(-1, keepdim=True)
        return p


@dataclass(frozen=True)
class Token:
    """One new token of one sequence: its number in the batch, its id, and the exit whose answer it is, from 1."""

    sequence: int
    id: int
    exit: int

    @property
    def deep(self) -> bool:
        """Whether more than block 1 had a part in it."""
        return self.exit > 1


def decoder_of(
    model: BaseTransformer,
    threshold: float | Sequence[float] | None,
    batch_size: int,
    criterion: Criterion,
    gate: Gate | Sequence[Gate | None] | None,
) -> RoutedDecoder | CascadeDecoder:
    """The decoder of a model with two blocks, or of one with more."""
    if len(model.blocks) > 1:
        count = len(model.blocks)
        thresholds = threshold if threshold is None or isinstance(threshold, Sequence) else [threshold] * count
        gates = gate if gate is None or isinstance(gate, Sequence) else [gate] * count
        return CascadeDecoder(model, thresholds, batch_size, [criterion] * count, gates)
    if isinstance(threshold, Sequence) or isinstance(gate, Sequence):
        raise ValueError("give one threshold and one gate for a model of two blocks")
    return RoutedDecoder(model, threshold, batch_size, criterion, gate)


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(p, 1, generator=generator).squeeze(-1)


def _checked(prompts: Sequence[Sequence[int]], sizes: dict[str, Any]) -> None:
    vocab_size, context = sizes["vocab_size"], sizes["context"]
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; give at least one token, such as the end-of-text token")
        if not all(0 <= token < vocab_size for token in prompt):
            raise ValueError(f"prompt {number} holds a token outside the vocabulary of {vocab_size}")
        if context is not None and len(prompt) > context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, the model was trained on {context}; shorten it"
            )


@torch.no_grad()
def generate(
    model: BaseTransformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    threshold: float | Sequence[float] | None,
    *,
    criterion: Criterion = max_prob,
    gate: Gate | Sequence[Gate | None] | None = None,
    sampling: Sampling = Sampling(),
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[Token]:
    """New tokens as they come, each from the depth at which the token before it left.

    Args:
        model: on its device.
        prompts: token ids of each sequence, of any lengths.
        max_new_tokens: at most this many for each.
        threshold, criterion, gate: see RoutedDecoder; of more than two blocks, thresholds and gates of each exit, see
            CascadeDecoder, or one threshold for all.
        sampling: how a token is chosen.
        stop: a sequence ends after one of these ids.
        generator: of the sampling.

    Raises:
        ValueError: a prompt that is empty or longer than the trained context, or a token outside the vocabulary.
    """
    _checked(prompts, model.sizes)
    device = model.embedding.weight.device
    longest = max(map(len, prompts), default=0)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for number, prompt in enumerate(prompts):
        ids[number, : len(prompt)] = torch.tensor(prompt)
        mask[number, : len(prompt)] = True
    decoder = decoder_of(model, threshold, len(prompts), criterion, gate)
    alive = mask.any(dim=1)  # (B,)
    for _ in range(max_new_tokens):
        if not alive.any():
            return
        logits, exits = decoder.read(ids, mask, last_only=True).last()
        chosen = _draw(sampling.probabilities(logits), generator)  # (B,)
        for number in alive.nonzero().flatten().tolist():
            yield Token(number, int(chosen[number]), int(exits[number]))
        ended = torch.tensor([int(token) in stop for token in chosen], device=device)
        alive = alive & ~ended
        ids, mask = chosen.unsqueeze(1), alive.unsqueeze(1)


@torch.no_grad()
def generate_lossless(
    model: BaseTransformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    drafts: int = 4,
    gate: Gate | Sequence[Gate | None] | None = None,
    sampling: Sampling = Sampling(),
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[Token]:
    """New tokens exactly as the full model would write them: block 1 drafts, the others verify several at once.

    Greedy output is the full model's; sampled output has its distribution (speculative sampling, Leviathan et al.
    2023). What block 1 computed for its drafts serves the full model: only block 2 and the heads are run to verify.

    Args:
        model: on its device.
        prompt: token ids.
        max_new_tokens: at most this many.
        drafts: tokens drafted before each verification.
        gate: of the full model's answers, which are mixtures of all exits then; of more than two blocks several.
        sampling, stop, generator: as in `generate`.

    Yields:
        Tokens; `exit` is 1 for a draft that was accepted, the last where the full model chose.

    Raises:
        ValueError: as `generate`, or no draft.
    """
    _checked([prompt], model.sizes)
    if drafts < 1:
        raise ValueError(f"drafts must be at least 1, got {drafts}")
    device = model.embedding.weight.device
    decoder = decoder_of(model, None, 1, max_prob, gate)
    if len(prompt) > 1:
        decoder.read(torch.tensor([list(prompt[:-1])], device=device), last_only=True)
    last, left = int(prompt[-1]), max_new_tokens
    while left > 0:
        start = decoder.lengths.clone()
        drafted, read, q = _draft(decoder, last, min(drafts, left), sampling, generator)
        verified = decoder.full_logits(read)  # (drafts, V)
        p = sampling.probabilities(verified)  # (drafts, V)
        accepted, chosen = _verify(p, q, drafted, generator)
        new = [Token(0, token, 1) for token in drafted[:accepted]]
        if chosen is not None:
            new.append(Token(0, chosen, len(model.exits)))
        for token in new:
            yield token
            left -= 1
            if token.id in stop:
                return
        last = new[-1].id
        decoder.forget(start + len(new))  # all that was read up to the token before `last`


def _draft(
    decoder: RoutedDecoder | CascadeDecoder,
    last: int,
    count: int,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> tuple[list[int], Shallow, Tensor]:
    """Ids that block 1 writes after `last`, what it made of the tokens read, and its distributions (count, V)."""
    model, parts, drafted, q = decoder.model, [], [], []
    for _ in range(count):
        parts.append(decoder.shallow(torch.tensor([[last]], device=decoder.lengths.device)))
        q.append(sampling.probabilities(model.logits_at(parts[-1].states, model.exit_layer)))  # (1, V)
        last = int(_draw(q[-1], generator))
        drafted.append(last)
    return drafted, Shallow.joined(parts), torch.cat(q)


def _verify(p: Tensor, q: Tensor, drafted: list[int], generator: torch.Generator | None) -> tuple[int, int | None]:
    """How many drafts stand, and the token that replaces the first that does not."""
    for number, token in enumerate(drafted):
        chance = torch.rand((), generator=generator, device=p.device)
        if chance * q[number, token] >= p[number, token]:
            rest = (p[number] - q[number]).clamp(min=0)
            rest = rest if rest.sum() > 0 else p[number]  # the two differ by rounding alone
            return number, int(_draw(rest / rest.sum(), generator))
    return len(drafted), None
