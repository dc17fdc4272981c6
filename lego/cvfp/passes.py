"""Contexts of a text under fixed weights: one token after another, or many segments at once until they agree."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lego.base.progress import track
from lego.cvfp.model import NewLLMResidual


class NonFiniteContextError(FloatingPointError):
    """A context became infinite or not a number; the message names the first token it happened at (B27)."""


@dataclass(frozen=True)
class Telling:
    """How much a pass says of itself (specification, section 7).

    Args:
        every: tokens between two lines of a sequential pass; 0 = none.
        warn_above: tokens from which a pass announces itself.
    """

    every: int = 0
    warn_above: int = 0

    def begins(self, what: str, total: int) -> None:
        """A line before work on many tokens at once, if lines are wanted."""
        if self.every:
            print(f"{what} begins: {total:,} tokens", flush=True)

    def tokens(self, total: int, what: str) -> Iterator[int]:
        """0 .. total - 1, with a line each `every` tokens: count, share, tokens a second, seconds left."""
        if self.warn_above and total > self.warn_above:
            print(f"{what}: {total:,} tokens one after another, more than {self.warn_above:,}", flush=True)
        start = time.monotonic()
        for index in range(total):
            yield index
            done = index + 1
            if self.every and (done % self.every == 0 or done == total):
                rate = done / max(time.monotonic() - start, sys.float_info.epsilon)
                print(
                    f"{what}: {done:,}/{total:,} tokens ({100 * done / total:.0f} %), {rate:.0f} tokens/s, "
                    f"{(total - done) / rate:.0f} s left",
                    flush=True,
                )


QUIET = Telling()


def require_finite(contexts: Tensor, what: str, first: int = 0) -> None:
    """Checks contexts (n, d) of the tokens from `first` on.

    Raises:
        NonFiniteContextError: one is not finite.
    """
    bad = ~torch.isfinite(contexts).all(dim=-1)
    if bad.any():
        index = first + int(bad.nonzero()[0])
        raise NonFiniteContextError(
            f"{what}: the context of token {index} is not finite; set model.layernorm_mix above 0, or lower the rate"
        )


@torch.no_grad()
def sequential_pass(
    model: NewLLMResidual, embeddings: Tensor, start: Tensor | None = None, telling: Telling = QUIET, what: str = "pass"
) -> Tensor:
    """Contexts (N, d) after each token, every one from the one before.

    Args:
        model: its weights stay as they are.
        embeddings: of the tokens (N, e), as `model.embed` makes them.
        start: context (d,) before the first token; None = 0.
        telling: what is printed on the way.
        what: name of the pass in those lines.

    Raises:
        NonFiniteContextError: a context is not finite.
    """
    n, d = len(embeddings), model.context_dim
    contexts = embeddings.new_empty(n, d)
    context = embeddings.new_zeros(1, d) if start is None else start.reshape(1, d).clone()
    step = model.frozen_step()
    for index in telling.tokens(n, what):
        context = step(context, embeddings[index : index + 1])
        contexts[index] = context[0]
    require_finite(contexts, what)
    return contexts


def shifted(previous: Tensor, start: Tensor, part: slice | None = None) -> Tensor:
    """Contexts before each token of a part i .. j - 1 (j - i, d): `start` (d,), then those after the token before.

    Args:
        previous: contexts after each token (N, d).
        start: before the first.
        part: None = all.
    """
    begin, end = (0, len(previous)) if part is None else (part.start, part.stop)
    first = previous[begin - 1 : begin] if begin else start.reshape(1, -1)
    return torch.cat([first, previous[begin : end - 1]])


def chunks(total: int, size: int) -> list[slice]:
    """0 .. total - 1 in parts of at most `size`."""
    return [slice(begin, min(begin + size, total)) for begin in range(0, total, size)]


@torch.no_grad()
def parallel_pass(model: NewLLMResidual, embeddings: Tensor, previous: Tensor, start: Tensor, chunk: int) -> Tensor:
    """Contexts (N, d) of all tokens at once from those of the pass before: one Jacobi step of the recurrence.

    Args:
        model: its weights stay as they are.
        embeddings: (N, e).
        previous: contexts after each token (N, d) of the pass before.
        start: context (d,) before the first token.
        chunk: tokens computed at a time, which bounds the memory.
    """
    contexts = torch.empty_like(previous)
    for part in chunks(len(previous), chunk):
        contexts[part] = model.next_context(context=shifted(previous, start, part), token=embeddings[part])
    return contexts


@dataclass(frozen=True)
class Settled:
    """Contexts (N, d) that a solver found, how often it swept, and how far the last sweep still moved a start."""

    contexts: Tensor
    sweeps: int
    residual: float


@torch.no_grad()
def settle(
    model: NewLLMResidual,
    embeddings: Tensor,
    segments: int,
    tolerance: float,
    max_sweeps: int | None = None,
    what: str = "contexts",
) -> Settled:
    """Contexts from start 0, with segments of the text run side by side until each starts where the last one ends.

    Sweep k is exact in the first k segments (multiple shooting without a coarse solver); a network that forgets its
    start needs two or three. Where the second leaves all other starts moving, the network does not forget: the third is
    then a pass token by token, which costs less than as many sweeps as there are segments.

    Args:
        model: its weights stay as they are.
        embeddings: (N, e).
        segments: computed side by side.
        tolerance: largest change of a start, in any dimension, that counts as settled.
        max_sweeps: ends sooner, with starts that still move; None = settled.
        what: name of the text in errors.

    Raises:
        NonFiniteContextError: a context is not finite.
    """
    n, d = len(embeddings), model.context_dim
    segments = max(1, min(segments, n))
    length = -(-n // segments)
    segments = -(-n // length)
    padded = torch.cat([embeddings, embeddings.new_zeros(segments * length - n, embeddings.shape[1])])
    steps = padded.view(segments, length, -1).transpose(0, 1).contiguous()  # (T, S, e)
    starts = embeddings.new_zeros(segments, d)
    contexts = embeddings.new_empty(length, segments, d)
    moving = torch.arange(segments)  # whose start changed since they were run
    sweeps, residual, step, forgets = 0, 0.0, model.frozen_step(), True
    while len(moving) and sweeps < (max_sweeps or segments) and forgets:
        context = starts[moving]
        for index in track(range(length), length, f"contexts, sweep {sweeps + 1}", "step"):
            context = step(context, steps[index, moving])
            contexts[index, moving] = context
        sweeps += 1
        found = torch.cat([starts[:1], contexts[-1, :-1]])
        change = (found - starts).abs().amax(dim=1)  # (S,) from what each segment was last run with
        residual = float(change.max())
        moving = (change > tolerance).nonzero()[:, 0]
        starts[moving] = found[moving]
        forgets = max_sweeps is not None or sweeps != 2 or len(moving) < segments - sweeps
    if not forgets and len(moving):
        _one_by_one(step, steps, contexts, int(moving[0]), starts[moving[:1]])
        sweeps, residual = sweeps + 1, 0.0
    contexts = contexts.transpose(0, 1).reshape(segments * length, d)[:n]
    require_finite(contexts, what)
    return Settled(contexts, sweeps, residual)


def _one_by_one(
    step: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, contexts: Tensor, first: int, context: Tensor
) -> None:
    """Fills contexts (T, S, d) of embeddings (T, S, e) from segment `first` on, which begins from a context (1, d)."""
    length, segments = tokens.shape[:2]
    for place in track(range(first * length, segments * length), (segments - first) * length, "contexts", "token"):
        segment, index = divmod(place, length)
        context = step(context, tokens[index, segment : segment + 1])
        contexts[index, segment] = context[0]
