"""When to abstain: calibration of what the system says, and a threshold of trust chosen on validation data (4, 9.6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression
from torch import Tensor
from torch.nn import functional

TEMPERATURES = (0.5, 20.0)  # where every validation row is right, the best one would be 0
EVERYTHING, NOTHING = 0.0, 2.0  # thresholds of a trust in (0, 1)
ROUNDING = 1e-9  # of a share of rows, which should be whole


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimizes the loss of labels (n,) under logits (n, C) / temperature (Guo et al. 2017)."""
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return float(functional.cross_entropy(logits / math.exp(log_temperature), labels))

    low, high = (math.log(one) for one in TEMPERATURES)
    return math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x)


@dataclass(frozen=True)
class TrustMap:
    """A monotone map from trust to the share of right answers, piecewise linear between points."""

    x: list[float]
    y: list[float]

    def __call__(self, trust: np.ndarray) -> np.ndarray:
        return np.interp(trust, self.x, self.y)


def fit_trust(trust: np.ndarray, right: np.ndarray, kind: str) -> TrustMap:
    """Trust (n,) to how often it is right (n,), on validation data.

    Args:
        trust: scores in (0, 1).
        right: whether each answer was.
        kind: `none`; `temperature`, a scale and a shift of the log odds; `isotonic`.
    """
    if kind == "none":
        return TrustMap([0.0, 1.0], [0.0, 1.0])
    if kind == "isotonic":
        fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(trust, right)
        return TrustMap(fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist())
    odds = torch.logit(torch.from_numpy(trust).clamp(1e-6, 1 - 1e-6))
    target = torch.from_numpy(np.asarray(right, dtype=np.float64))
    scale, shift = (
        torch.zeros((), dtype=torch.double, requires_grad=True),
        torch.zeros((), dtype=torch.double, requires_grad=True),
    )
    optimizer = torch.optim.LBFGS(
        [scale, shift], max_iter=100
    )  # two numbers on all rows at once: no epochs, no batches

    def step() -> Tensor:
        optimizer.zero_grad()
        mapped = odds * scale.exp() + shift
        penalty = 1e-3 * (scale.square() + shift.square())  # where every answer is right, both would run away
        loss = functional.binary_cross_entropy_with_logits(mapped, target) + penalty
        loss.backward()
        return loss

    optimizer.step(step)
    slope, offset = math.exp(scale.item()), shift.item()
    grid = np.linspace(1e-6, 1 - 1e-6, 201)
    mapped = 1 / (1 + np.exp(-(np.log(grid / (1 - grid)) * slope + offset)))
    return TrustMap(grid.tolist(), mapped.tolist())


def threshold(trust: np.ndarray, right: np.ndarray, rule: str, wanted: float) -> float:
    """The trust below which the system abstains, from validation data.

    Args:
        trust: scores (n,).
        right: whether each answer was.
        rule: `coverage`, so that a share `wanted` is answered; `risk`, so that the share of errors among what is
            answered is at most `wanted`, with one error more than was seen; `conformal`, so that at most a share
            1 - wanted of new rows like these is turned away, whatever their number (split conformal, Vovk et al. 2005).
        wanted: in (0, 1).

    Returns:
        a threshold; 0 accepts everything, above 1 nothing.
    """
    n, ordered = len(trust), np.sort(trust)
    if not n:
        raise ValueError("a threshold needs validation rows")
    if rule == "coverage":
        return float(ordered[min(n - 1, math.floor((1 - wanted) * n + ROUNDING))])
    if rule == "conformal":  # a new row lies below the k-th smallest of n with chance k / (n + 1)
        k = math.floor((n + 1) * (1 - wanted) + ROUNDING)
        return float(ordered[k - 1]) if k else EVERYTHING
    order = np.argsort(-trust, kind="stable")
    errors = np.cumsum(~np.asarray(right, dtype=bool)[order])
    last = np.append(np.diff(trust[order]) != 0, True)  # of rows with equal trust, which are accepted together
    good = np.flatnonzero(last & ((errors + 1) / (np.arange(n) + 2) <= wanted))
    return float(trust[order[good[-1]]]) if len(good) else NOTHING
