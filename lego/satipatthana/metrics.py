"""Numbers of scores: how well they tell outside from inside and wrong from right, and what abstaining costs (10).

Scores are high where a row is trusted. Every function gives nan, not one half, where a class is empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

BINS = 15  # of equal mass, in calibration errors
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
OPERATING = 0.95  # share of the inside that FPR95 keeps


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """Chance that a row of the inside (n,) scores above one of the outside (m,), ties counted half."""
    if not len(inside) or not len(outside):
        return math.nan
    return float(roc_auc_score(_truth(inside, outside), np.concatenate([inside, outside])))


def aupr(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float]:
    """Average precision with the inside as the positive class, and with the outside."""
    if not len(inside) or not len(outside):
        return math.nan, math.nan
    truth, scores = _truth(inside, outside), np.concatenate([inside, outside])
    return float(average_precision_score(truth, scores)), float(average_precision_score(1 - truth, -scores))


def _truth(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])


def fpr95(inside: np.ndarray, outside: np.ndarray) -> float:
    """Share of the outside (m,) that scores at least the 5 % quantile of the inside (n,)."""
    if not len(inside) or not len(outside):
        return math.nan
    return float((outside >= np.quantile(inside, 1 - OPERATING)).mean())


def strangers(inside: np.ndarray, outside: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How well a score tells rows of each kind from outside (m,) from those of the inside (n,)."""
    facts: dict[str, float] = {}
    for kind, scores in outside.items():
        inward, outward = aupr(inside, scores)
        facts |= {f"auroc_{kind}": auroc(inside, scores), f"fpr95_{kind}": fpr95(inside, scores)}
        facts |= {f"aupr_{kind}": inward, f"aupr_out_{kind}": outward}
    return facts


def risk_coverage(confidence: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Errors among the k most trusted rows, by k = 1 .. n; ties keep their order."""
    order = np.argsort(-confidence, kind="stable")
    return np.cumsum(np.asarray(wrong, dtype=np.float64)[order])


def aurc(confidence: np.ndarray, wrong: np.ndarray) -> float:
    """Mean over k of errors among the top k, divided by k (Geifman & El-Yaniv 2017)."""
    errors = risk_coverage(confidence, wrong)
    return float((errors / np.arange(1, len(errors) + 1)).mean()) if len(errors) else math.nan


def eaurc(confidence: np.ndarray, wrong: np.ndarray) -> float:
    """AURC less that of the best order: r + (1 - r) ln(1 - r), r the error rate (Geifman et al. 2019)."""
    if not len(wrong):
        return math.nan
    rate = float(np.mean(wrong))
    return aurc(confidence, wrong) - (rate + (1 - rate) * math.log1p(-rate) if rate < 1 else 1.0)


def augrc(confidence: np.ndarray, wrong: np.ndarray) -> float:
    """Mean over k of errors among the top k, divided by n (Traub et al. 2024)."""
    errors = risk_coverage(confidence, wrong)
    return float((errors / len(errors)).mean()) if len(errors) else math.nan


def risk_at(confidence: np.ndarray, wrong: np.ndarray, coverage: float) -> float:
    """Error rate among the most trusted share of rows."""
    errors = risk_coverage(confidence, wrong)
    k = max(1, round(coverage * len(errors)))
    return float(errors[k - 1] / k) if len(errors) else math.nan


def risks(confidence: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Error rate at each coverage of COVERAGES, as `risk_at_90`."""
    return {f"risk_at_{round(100 * share)}": risk_at(confidence, wrong, share) for share in COVERAGES}


def ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error over bins of equal mass."""
    if not len(confidence):
        return math.nan
    order = np.argsort(confidence, kind="stable")
    parts = zip(
        np.array_split(confidence[order], BINS), np.array_split(np.asarray(right, float)[order], BINS), strict=True
    )
    return float(sum(abs(c.mean() - r.mean()) * len(c) for c, r in parts if len(c)) / len(confidence))


def brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of probabilities (n, C) from the labels (n,)."""
    if not len(labels):
        return math.nan
    return float(np.square(probabilities - np.eye(probabilities.shape[1])[labels]).sum(axis=1).mean())


def nll(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood in nats of labels (n,) under probabilities (n, C)."""
    if not len(labels):
        return math.nan
    chosen = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(chosen, np.finfo(np.float64).tiny)).mean())


def correct_above_wrong(confidence: np.ndarray, right: np.ndarray) -> float:
    """AUROC of right rows against wrong ones."""
    right = np.asarray(right, dtype=bool)
    return auroc(confidence[right], confidence[~right])
