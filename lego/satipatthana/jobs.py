"""What an answer is in each job: its loss, when it is right, and its numbers (specification, 7 and 10).

classification: one of some classes, right if it is the true one. regression: a number in deviations of the train
answers, right within `reject.tolerance` of the true one. anomaly: no decoder, 1 - trust is the answer; a row is rightly
accepted if it is normal.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lego.base.harness import StageError
from lego.satipatthana import metrics
from lego.satipatthana.sections import PARAMS, SatipatthanaParams
from lego.satipatthana.settings import Job

FLAGGED = 0.01  # share of normal and strange rows together that is flagged at most
FIRST = 100  # flags that are looked at


def loss(job: Job, output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C), or squared error of values (B, 1), against answers y (B,)."""
    if job == "regression":
        return functional.mse_loss(output[:, 0], y)
    return functional.cross_entropy(output, y)


def right(job: Job, output: Tensor, y: Tensor, tolerance: float) -> Tensor:
    """Whether answers (B, C) are right (B,); see the head of this file."""
    if job == "regression":
        return (output[:, 0] - y).abs() <= tolerance
    return output.argmax(dim=1) == y if job == "classification" else y == 0


def probabilities(logits: Tensor, temperature: float = 1.0) -> np.ndarray:
    """Class probabilities (n, C)."""
    return torch.softmax(logits.double() / temperature, dim=1).numpy()


def believed(trust: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """What a score (n,) says of which answers are right (n,), and what is risked by abstaining where it is low."""
    return {
        "auroc_correct": metrics.correct_above_wrong(trust, right),
        "aurc": metrics.aurc(trust, ~right),
        "eaurc": metrics.eaurc(trust, ~right),
        "augrc": metrics.augrc(trust, ~right),
        **metrics.risks(trust, ~right),
    }


def answered(
    job: Job, output: Tensor, trust: np.ndarray, y: Tensor, tolerance: float, temperature: float
) -> dict[str, float]:
    """How good answers (n, C) to y (n,) are, and what their trust (n,) says of it; nothing in the job anomaly."""
    if job == "anomaly":
        return {}
    good = right(job, output, y, tolerance).numpy()
    facts = believed(trust, good) | {"trust_ece": metrics.ece(trust, good)}
    if job == "regression":
        error = (output[:, 0] - y).double()
        spread = (y.double() - y.double().mean()).square().mean()
        return facts | {
            "within_tolerance": float(good.mean()),
            "rmse": float(error.square().mean().sqrt()),
            "mae": float(error.abs().mean()),
            "r2": float(1 - error.square().mean() / spread),
        }
    p, raw, labels = probabilities(output, temperature), probabilities(output), y.numpy()
    return facts | {
        "accuracy": float(good.mean()),
        "nll": metrics.nll(p, labels),
        "ece": metrics.ece(p.max(axis=1), good),
        "brier": metrics.brier(p, labels),
        "ece_before_temperature": metrics.ece(raw.max(axis=1), good),
        "nll_before_temperature": metrics.nll(raw, labels),
        "brier_before_temperature": metrics.brier(raw, labels),
        "auroc_correct_msp": metrics.correct_above_wrong(p.max(axis=1), good),
        "aurc_msp": metrics.aurc(p.max(axis=1), ~good),
    }


def flagged(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """Screening by low trust: of normal rows (n,) and anomalies (m,), what is found among the rows that are flagged.

    Returns:
        AUROC and average precision of anomalies; `recall_at_1`, the share of them among the least trusted hundredth of
        all rows; `precision_at_100`, the share of anomalies among the hundred least trusted rows, or among all if there
        are fewer.
    """
    trust, odd = np.concatenate([inside, outside]), np.concatenate([np.zeros(len(inside)), np.ones(len(outside))])
    first = odd[np.argsort(trust, kind="stable")]
    few = max(1, round(FLAGGED * len(trust)))
    return {
        "auroc_anomaly": metrics.auroc(inside, outside),
        "auprc_anomaly": metrics.aupr(inside, outside)[1],
        "recall_at_1": float(first[:few].sum() / max(1, len(outside))),
        "precision_at_100": float(first[:FIRST].mean()),
    }


def classification_only(params: SatipatthanaParams, what: str) -> None:
    """Raises:
    StageError: the task is of another job.
    """
    if params.task.job != "classification":
        raise StageError(
            f"{PARAMS}: task.job is {params.task.job}, and {what} is of classification alone; ask for numbers with "
            "dvc repro stages/satipatthana/dvc.yaml:evaluate"
        )
