"""How much routing may cost in loss, with a guarantee that needs no assumption on the model: Learn-then-Test.

Sources: Angelopoulos et al. 2021 (arXiv 2110.01052), as CALM uses it for early exits, Schuster et al. 2022.
A unit is what the guarantee is about, a block or a document: its loss is the mean increase over the full model in nats.
Units must be drawn independently of each other, as later ones are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from lego.tokens.blocks import PackedBlocks

MIN_UNITS = 500


@dataclass(frozen=True)
class Certificate:
    """Result of `certify`.

    Args:
        chosen: column of the candidate, or None if none can be certified.
        epsilon, delta: the promise: risk at most epsilon with probability at least 1 - delta.
        units: on which it rests.
        smallest_epsilon: the smallest promise that any candidate that routes at all could get on these units.
        best_epsilon: the smallest that any result on so many units could get: no unit lost anything.
    """

    chosen: int | None
    epsilon: float
    delta: float
    units: int
    smallest_epsilon: float
    best_epsilon: float


def unit_losses(nll_routed: np.ndarray, nll_full: np.ndarray, units: np.ndarray, clip: float) -> np.ndarray:
    """Per-unit increase of the mean loss over the full model, clipped to [0, clip] nats (number of units,).

    Args:
        nll_routed, nll_full: losses (n,) of each token.
        units: number of each token's unit (n,), from 0 without holes; tokens with -1 belong to none.
        clip: Learn-then-Test needs a bounded loss.
    """
    inside = units >= 0
    increase = np.bincount(units[inside], weights=(nll_routed - nll_full)[inside])
    return (increase / np.bincount(units[inside])).clip(0.0, clip)


def document_units(ids: np.ndarray, end: int) -> np.ndarray:
    """Number of each token's document (n,); -1 before the first end-of-text, where a document may have begun earlier.

    Args:
        ids: token ids (n,) in the order of the text.
        end: id of the end-of-text token, the last of its document.
    """
    ended = np.cumsum(ids == end)
    return np.concatenate([[0], ended[:-1]]) - 1


def units_of(blocks: PackedBlocks, unit: str, end: int) -> np.ndarray:
    """Number of each token's unit of risk (n,).

    Args:
        blocks: of the text.
        unit: `block` or `document`.
        end: see `document_units`.
    """
    return np.arange(blocks.tokens) // blocks.seq_len if unit == "block" else document_units(blocks.targets(), end)


def p_value(mean: float, n: int, epsilon: float) -> float:
    """Hoeffding-Bentkus p-value of "the risk exceeds epsilon" for n losses in [0, 1] with this mean.

    Source: Bates et al. 2021 (arXiv 2101.02703), as used by Learn-then-Test.
    """
    if not mean < epsilon < 1:
        return 0.0 if mean < epsilon else 1.0  # a loss in [0, 1] never exceeds 1
    divergence = (1 - mean) * math.log((1 - mean) / (1 - epsilon))
    if mean > 0:
        divergence += mean * math.log(mean / epsilon)
    bentkus = math.e * binom.cdf(math.ceil(n * mean), n, epsilon)
    return min(1.0, math.exp(-n * divergence), float(bentkus))


def smallest_epsilon(mean: float, n: int, delta: float) -> float:
    """The smallest risk in [0, 1] that n losses with this mean rule out at level delta, by bisection."""
    low, high = mean, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(mean, n, middle) <= delta else (middle, high)
    return high


def certify(losses: np.ndarray, epsilon: float, delta: float, clip: float) -> Certificate:
    """The last candidate whose risk is at most epsilon with probability 1 - delta, by fixed-sequence testing.

    Candidates are tested in order, each at level delta, until one fails: so the order must not come from these losses.

    Args:
        losses: (units, candidates) in [0, clip], the candidate that routes least first.
        epsilon: promised bound of the risk, in nats.
        delta: probability with which the promise may fail.
        clip: upper end of the losses.

    Raises:
        ValueError: fewer than MIN_UNITS units.
    """
    n = len(losses)
    if n < MIN_UNITS:
        raise ValueError(f"needs at least {MIN_UNITS} units, got {n}")
    means = losses.mean(axis=0) / clip
    chosen = None
    for candidate, mean in enumerate(means):
        if p_value(float(mean), n, epsilon / clip) > delta:
            break
        chosen = candidate
    return Certificate(
        chosen=chosen,
        epsilon=epsilon,
        delta=delta,
        units=n,
        smallest_epsilon=clip * smallest_epsilon(float(means[0]), n, delta),
        best_epsilon=clip * smallest_epsilon(0.0, n, delta),
    )
