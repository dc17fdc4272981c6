"""Next-token losses straight from exit states: logits exist for a few rows at a time, never for a whole batch.

Shapes: n tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Score = Callable[[Tensor, Tensor], Tensor]

LOGITS_IN_CACHE = 2**19  # elements that a CPU's cache keeps while they are passed over: 2 MiB of float32
LOGITS_AT_A_TIME = 2**26  # elements that there are at most: 256 MiB of float32


def _rows_of_a_product(weight: Tensor) -> int:
    """Rows of logits that one product makes.

    It reads the whole head, V D numbers, and what follows passes a few times over V logits of each row: from about D
    rows on the passes cost more than the reading. If more rows fit the cache, so many are taken.
    """
    most, together = max(1, LOGITS_AT_A_TIME // len(weight)), _rows_of_a_pass(weight)
    return most if weight.device.type != "cpu" else min(most, together * -(-weight.shape[1] // together))


def _rows_of_a_pass(weight: Tensor) -> int:
    """Rows of logits that are passed over together: as many as stay in the cache."""
    return max(1, (LOGITS_IN_CACHE if weight.device.type == "cpu" else LOGITS_AT_A_TIME) // len(weight))


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is formed in the forward pass, chunk by chunk, while the chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        needs_h, needs_weight = ctx.needs_input_grad[:2]
        dh = torch.empty_like(h) if needs_h else None
        dw = torch.zeros_like(weight) if needs_weight else None
        total = torch.zeros((), device=h.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        with torch.autocast(kind, enabled=False):
            w = weight.to(dtype)
            rows = _rows_of_a_product(weight)
            for start in range(0, len(y), rows):
                chunk, target = h[start : start + rows].to(dtype), y[start : start + rows, None]  # (r, D), (r, 1)
                gradient = chunk @ w.t()  # (r, V), logits at first
                total += _losses_to_gradients(gradient, target, len(y) if needs_h or needs_weight else None, weight)
                if dh is not None:
                    dh[start : start + rows] = gradient @ w
                if dw is not None and dw.dtype == dtype:
                    torch.addmm(dw, gradient.t(), chunk, out=dw)
                elif dw is not None:
                    dw += gradient.t() @ chunk
        ctx.save_for_backward(dh, dw)
        return total / len(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dh, dw = ctx.saved_tensors
        return None if dh is None else dh * scale, None if dw is None else dw * scale, None


def _losses_to_gradients(logits: Tensor, targets: Tensor, count: int | None, weight: Tensor) -> Tensor:
    """Sum of the cross-entropies in nats of logits (r, V), which become gradients of the mean they are part of.

    Args:
        logits: overwritten.
        targets: (r, 1).
        count: tokens of the mean; None if no gradient is needed.
        weight: of the output head (V, D).
    """
    total = torch.zeros((), device=logits.device, dtype=torch.promote_types(logits.dtype, torch.float32))
    rows = _rows_of_a_pass(weight)
    for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
        work = part if part.dtype is torch.float64 else part.float()
        work -= work.amax(dim=1, keepdim=True)
        right = work.gather(1, target)  # (r, 1)
        norm = work.exp_().sum(dim=1, keepdim=True)  # (r, 1)
        total += (norm.log() - right).sum()
        if count is None:
            continue
        work.div_(norm * count)  # softmax / n: the gradient but for the target's -1 / n
        work.scatter_add_(1, target, torch.full_like(right, -1 / count))
        if work is not part:
            part.copy_(work)
    return total


def linear_cross_entropy(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the logits h @ weight.T, equal to `F.cross_entropy` up to rounding.

    Its memory is that of the gradients of h and weight, whatever V is, as in Wijmans et al. 2024 (arXiv 2411.09009).
    Under autocast the products run in its type and the softmax in float32.

    Args:
        h: normed states (n, D).
        weight: of the output head (V, D).
        y: targets (n,).
    """
    return _LinearCrossEntropy.apply(h, weight, y)


def max_probability(logits: Tensor) -> Tensor:
    """Largest softmax probability (...,) of logits (..., V), in float32."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


@torch.no_grad()
def exit_confidence(h: Tensor, weight: Tensor) -> Tensor:
    """Largest softmax probability (n,) of the logits h @ weight.T.

    Args:
        h: normed states (n, D).
        weight: of the output head (V, D).
    """
    return torch.cat([max_probability(logits) for logits in _logits(h, weight)])


@torch.no_grad()
def exit_logits(h: Tensor, weight: Tensor, score: Score, states: Tensor) -> tuple[Tensor, Tensor]:
    """Logits h @ weight.T (n, V) by one product, and the score (n,) of each, taken a few rows at a time.

    Args:
        h: normed states (n, D).
        weight: of the output head (V, D).
        score: function of states (r, D) and logits (r, V).
        states: what the score is given (n, D).
    """
    logits = h @ weight.t()
    rows = _rows_of_a_pass(weight)
    parts = [score(*chunk) for chunk in zip(states.split(rows), logits.split(rows), strict=True)]
    return logits, torch.cat(parts)


@torch.no_grad()
def read_exit(
    h: Tensor, weight: Tensor, y: Tensor, scores: Iterable[Score] = (), states: Tensor | None = None
) -> tuple[Tensor, ...]:
    """What an exit says of each token: loss in nats (n,), whether its best guess is right (n,), confidence (n,).

    Args:
        h: normed states (n, D).
        weight: of the output head (V, D).
        y: targets (n,).
        scores: functions of states (r, D) and logits (r, V), whose results (n,) follow the three.
        states: what the scores are given (n, D); default h.
    """
    pieces = _in_step(_logits(h, weight), h if states is None else states, y)
    parts = [_read(logits, state, target, tuple(scores)) for logits, state, target in pieces]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@torch.no_grad()
def read_mixture(
    shallow: tuple[Tensor, Tensor],
    deep: tuple[Tensor, Tensor],
    mixed: Score,
    y: Tensor,
    scores: Iterable[Score] = (),
    states: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """What `read_exit` says of the first exit, and then of the mixture of both.

    That is its loss in nats (n,), whether its best guess is right (n,), and what it expects to spare the first exit,
    the Kullback-Leibler divergence KL(mixture || first exit) in nats (n,).

    Args:
        shallow, deep: of each exit, normed states (n, D) and the weight of its head (V, D).
        mixed: logits (r, V) of both -> log-probabilities (r, V).
        y: targets (n,).
        scores, states: as for `read_exit`, of the first exit.
    """
    parts = []
    pieces = _in_step(_logits(*shallow), shallow[0] if states is None else states, y)
    for (logits, state, target), other in zip(pieces, _logits(*deep), strict=True):
        log_p = mixed(logits, other)  # (r, V)
        nll, best = -log_p.gather(1, target[:, None]).squeeze(1), log_p.argmax(dim=1)
        spared = (log_p.exp() * (log_p - logits.float().log_softmax(dim=1))).sum(dim=1)
        parts.append((*_read(logits, state, target, tuple(scores)), nll, best == target, spared))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@torch.no_grad()
def read_exits(
    exits: Sequence[tuple[Tensor, Tensor]], gates: Sequence[Any], y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `read_exit` says of each exit (M, n): loss in nats, right or not, confidence.

    Args:
        exits: of each, normed states (n, D) and the weight of its head (V, D).
        gates: of each but the first, what mixes the answer below with its logits (see lego.model.gate), or None.
        y: targets (n,).
    """
    parts, done = [], 0
    for logits in zip(*(_logits(*one) for one in exits), strict=True):
        answers, target = [logits[0]], y[done : (done := done + len(logits[0]))]
        for gate, deeper in zip(gates, logits[1:], strict=True):
            answers.append(deeper if gate is None else gate.mixed(answers[-1], deeper))
        parts.append([torch.stack(column) for column in zip(*(_read(a, a, target, ()) for a in answers), strict=True)])
    nll, right, confidence = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return nll, right, confidence


def _read(logits: Tensor, states: Tensor, targets: Tensor, scores: tuple[Score, ...]) -> tuple[Tensor, ...]:
    """What logits (r, V) say of targets (r,): loss, right or not, confidence, and scores."""
    logits = logits.float()
    best, guess = logits.max(dim=1)  # (r,)
    norm = logits.logsumexp(dim=1)  # (r,)
    right = logits.gather(1, targets[:, None]).squeeze(1)  # (r,)
    return norm - right, guess == targets, (best - norm).exp(), *(score(states, logits) for score in scores)


def _logits(h: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Logits (r, V) of normed states (n, D), a few rows at a time that were made by larger products."""
    rows = min(_rows_of_a_pass(weight), _rows_of_a_product(weight))
    for chunk in h.split(_rows_of_a_product(weight)):
        yield from (chunk @ weight.t()).split(rows)


def _in_step(pieces: Iterable[Tensor], states: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pieces of logits (r, V) in order, with the states (r, D) and targets (r,) of their rows."""
    done = 0
    for piece in pieces:
        rows = slice(done, done + len(piece))
        yield piece, states[rows], y[rows]
        done = rows.stop
