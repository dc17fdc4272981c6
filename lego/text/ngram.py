"""Reference language models: unigram, and an n-gram interpolated by Kneser-Ney (Chen & Goodman 1999, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def unigram_nll(train: np.ndarray, test: np.ndarray, vocab_size: int) -> float:
    """Mean negative log-likelihood in nats of test ids (m,) under add-one unigram counts of train ids (n,)."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts[test] / counts.sum()).mean())


@dataclass
class _Level:
    """The distinct n-grams of one order, as sorted keys `row of the first n - 1 ids * V + last id`."""

    keys: np.ndarray
    counts: np.ndarray  # occurrences at the highest order, distinct left neighbours below
    discount: float
    context_total: np.ndarray  # summed counts by row of the context
    context_kinds: np.ndarray  # distinct continuations by row of the context


class KneserNey:
    """Interpolated Kneser-Ney n-gram model over token ids.

    The highest order counts occurrences, lower orders count distinct left neighbours; each order gives away one
    absolute discount n1 / (n1 + 2 n2), and the lowest interpolates with the uniform distribution.

    Args:
        train: token ids (n,).
        vocab_size: number of possible ids (V).
        order: longest n-gram, 5 = four ids of history.
    """

    def __init__(self, train: np.ndarray, vocab_size: int, order: int = 5) -> None:
        self.vocab_size = vocab_size
        self.levels: list[_Level] = []
        train = train.astype(np.int64)
        contexts = np.zeros(len(train) + 1, dtype=np.int64)  # row of the n - 1 ids from each start; the empty one is 0
        keys, _, rows = self._distinct(contexts, train)
        for n in range(1, order + 1):
            if n == order:
                counts = np.bincount(rows, minlength=len(keys))
            else:
                longer = self._distinct(rows, train[n:])
                counts = np.bincount(rows[longer[1] + 1], minlength=len(keys))
            self.levels.append(self._level(keys, counts))
            if n < order:
                keys, _, rows = longer

    def _distinct(self, contexts: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sorted keys of the distinct n-grams, where each first occurs, and the row of the n-gram at each start."""
        return np.unique(contexts[: len(last)] * self.vocab_size + last, return_index=True, return_inverse=True)

    def _level(self, keys: np.ndarray, counts: np.ndarray) -> _Level:
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        context = keys // self.vocab_size
        return _Level(
            keys=keys,
            counts=counts,
            discount=once / (once + 2 * twice) if once else 0.0,
            context_total=np.bincount(context, weights=counts),
            context_kinds=np.bincount(context, weights=counts > 0),
        )

    def probabilities(self, ids: np.ndarray) -> np.ndarray:
        """Probability (m,) of each id given up to order - 1 ids before it."""
        ids = ids.astype(np.int64)
        probability = np.full(len(ids), 1.0 / self.vocab_size)
        context = np.zeros(len(ids) + 1, dtype=np.int64)
        for n, level in enumerate(self.levels, 1):
            below = probability[n - 1 :]  # the first n - 1 ids have too short a history and keep the order below
            context = context[: len(below)]
            wanted = context * self.vocab_size + ids[n - 1 :]
            found = np.minimum(np.searchsorted(level.keys, wanted), len(level.keys) - 1)
            gram = np.where((context >= 0) & (level.keys[found] == wanted), found, -1)
            known = (context >= 0) & (context < len(level.context_total))
            total = np.where(known, level.context_total[np.where(known, context, 0)], 0)
            kinds = np.where(known, level.context_kinds[np.where(known, context, 0)], 0)
            count = np.where(gram >= 0, level.counts[gram], 0)
            seen = total > 0
            safe = np.where(seen, total, 1)
            kept = np.maximum(count - level.discount, 0) / safe
            given_away = np.where(seen, level.discount * kinds / safe, 1.0)
            probability[n - 1 :] = kept * seen + given_away * below
            context = gram
        return probability

    def nll(self, ids: np.ndarray) -> float:
        """Mean negative log-likelihood in nats of ids (m,)."""
        return float(-np.log(self.probabilities(ids)).mean())


def references(
    train: np.ndarray, held_out: dict[str, np.ndarray], vocab_size: int, tokens_per_byte: dict[str, float]
) -> dict[str, float]:
    """Perplexity and bits per byte of a unigram and an interpolated 5-gram fitted on train (n,), by held-out split.

    Args:
        train: token ids (n,).
        held_out: token ids (m,) by split.
        vocab_size: number of possible ids.
        tokens_per_byte: of each held-out split.
    """
    fivegram, metrics = KneserNey(train, vocab_size, order=5), {}
    for split, ids in held_out.items():
        for name, nll in (("unigram", unigram_nll(train, ids, vocab_size)), ("fivegram", fivegram.nll(ids))):
            metrics[f"{split}_{name}_ppl"] = math.exp(nll)
            metrics[f"{split}_{name}_bits_per_byte"] = nll * tokens_per_byte[split] / math.log(2)
    return metrics
