"""Intervals, verdicts and calibration: what turns numbers of several seeds into a statement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval; the ends are NaN where one value says nothing of its spread."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        if math.isnan(self.low):
            return format(self.mean, spec)
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of independent values with Student's t-interval.

    Args:
        values: one a seed.
        level: of confidence.

    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) == 1:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + level) / 2, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return Interval(mean, mean - half, mean + half)


def bootstrap_ppl_difference(
    nll: np.ndarray, other: np.ndarray, tokens: np.ndarray, draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Perplexity less another model's on the same documents, with the percentile interval over resampled documents.

    Documents are drawn with replacement, the same ones for both models and all seeds (paired bootstrap: Efron &
    Tibshirani 1993); so the interval speaks of further documents like these, with the seeds as they are.

    Args:
        nll, other: summed losses in nats by seed and document (S, N).
        tokens: of each document, the same for all seeds (N,) or of each (S, N).
        draws, seed: how many resamples, and of which random numbers.
        level: of confidence.

    Raises:
        ValueError: shapes that do not fit.
    """
    nll, other, tokens = np.atleast_2d(nll), np.atleast_2d(other), np.atleast_2d(tokens)
    if nll.shape != other.shape or tokens.shape[1] != nll.shape[1] or len(tokens) not in (1, len(nll)):
        raise ValueError(f"losses of {nll.shape} and {other.shape} and tokens of {tokens.shape} do not fit each other")

    def difference(weights: np.ndarray) -> np.ndarray:
        total = weights @ tokens.T  # (R, S), or (R, 1)
        return (np.exp(weights @ nll.T / total) - np.exp(weights @ other.T / total)).mean(axis=1)  # (R,)

    n = nll.shape[1]
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)  # (R, N)
    mean = float(difference(np.ones((1, n)))[0])
    if n == 1:
        return Interval(mean, math.nan, math.nan)
    low, high = np.quantile(difference(weights), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def bootstrap_coverage(tokens: np.ndarray, simulations: int = 400, draws: int = 400, seed: int = 0) -> float:
    """How often a percentile bootstrap of 95 % over documents of these lengths holds a true mean difference of 0.

    In each simulation every document has a mean difference of its own, normal with equal spread.

    Args:
        tokens: length of each document (N,).
        simulations, draws: texts that are made up, and bootstrap draws of each.
        seed: of both.
    """
    generator, n = np.random.default_rng(seed), len(tokens)
    means = generator.standard_normal((n, simulations))
    weights = generator.multinomial(n, np.full(n, 1 / n), size=draws)  # (R, N)
    found = weights @ (tokens[:, None] * means) / (weights @ tokens)[:, None]  # (R, simulations)
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    return float(((low <= 0) & (high >= 0)).mean())


def verdict(*differences: Interval) -> str:
    """`better`, `worse` or `not distinguishable` of a difference in a quantity that should be low.

    Args:
        *differences: intervals of the same difference, over seeds and over documents; all must exclude 0.
    """
    if all(one.high < 0 for one in differences):
        return "better"
    return "worse" if all(one.low > 0 for one in differences) else "not distinguishable"


def calibration_error(probability: np.ndarray, happened: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over equally wide bins (Guo et al. 2017, arXiv 1706.04599).

    Args:
        probability: what was predicted (n,), in [0, 1].
        happened: whether it came true (n,).
        bins: how many.
    """
    place = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    gap = np.bincount(place, probability - happened, minlength=bins)
    return float(np.abs(gap).sum() / count.sum())


def fit_temperature(probability: np.ndarray, happened: np.ndarray) -> float:
    """The temperature T for which sigmoid(log-odds / T) has the lowest log-loss (Guo et al. 2017, two classes).

    Args:
        probability: what was predicted (n,).
        happened: whether it came true (n,).
    """
    odds, sign = log_odds(probability), np.where(happened, 1.0, -1.0)

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, -sign * odds / math.exp(log_temperature)).mean())

    return math.exp(optimize.minimize_scalar(loss, bounds=(-5, 5), method="bounded").x)


def with_temperature(probability: np.ndarray, temperature: float) -> np.ndarray:
    """Predicted probabilities (n,) with their log-odds divided by a temperature."""
    return 1 / (1 + np.exp(-log_odds(probability) / temperature))


def log_odds(probability: np.ndarray) -> np.ndarray:
    """Log-odds (n,) of probabilities, kept finite."""
    clipped = np.clip(probability.astype(float), 1e-7, 1 - 1e-7)
    return np.log(clipped / (1 - clipped))
