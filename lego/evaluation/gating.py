"""Fitting the gate on what both exits said of text (specs: ashem section 9)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit
from torch import Tensor

from lego.evaluation.routed import perplexity, token_table
from lego.model.gate import SURE, Gate
from lego.model.transformer import BaseTransformer


def gate_for(
    model: BaseTransformer, batches: Iterable[tuple[Tensor, Tensor]], device: str | torch.device
) -> tuple[Gate, dict[str, float]]:
    """The gate of a model with two exits, fitted on a text, and perplexities there of each exit and of the mixture.

    Args:
        model: with two blocks.
        batches: (x, y) of token ids (B, T), of text that neither block was trained on.
        device: where the model runs.
    """
    table = token_table(model, batches, device)
    confidence, shallow, deep = table.confidence, table.nll_shallow, table.nll_deep
    gate = fit_gate(confidence, shallow, deep)
    odds = gate(torch.from_numpy(confidence)).double().numpy()
    mixed = -np.logaddexp(log_expit(odds) - shallow, log_expit(-odds) - deep)
    perplexities = {f"{name}_ppl": perplexity(nll) for name, nll in (("shallow", shallow), ("deep", deep))}
    return gate, perplexities | {"mixed_ppl": perplexity(mixed), "share_of_block1": float(expit(odds).mean())}


def fit_gate(confidence: np.ndarray, nll_shallow: np.ndarray, nll_deep: np.ndarray, l2: float = 1e-4) -> Gate:
    """The gate whose mixtures have the smallest mean loss.

    Args:
        confidence: largest probability (n,) of block 1.
        nll_shallow, nll_deep: losses (n,) of both exits, in nats.
        l2: penalty of its weight, on log-odds of unit variance.

    Raises:
        ValueError: there is no token.
    """
    if not len(confidence):
        raise ValueError("no token to fit the gate on")
    x = logit(confidence.astype(np.float64).clip(SURE, 1 - SURE))  # (n,)
    mean, std = float(x.mean()), float(x.std())
    std = std if std > 1e-9 else 1.0  # of text on which it never changes
    x = (x - mean) / std
    shallow, deep = -nll_shallow.astype(np.float64), -nll_deep.astype(np.float64)  # log-probabilities

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        odds = weights[0] * x + weights[1]
        first = log_expit(odds) + shallow
        mixed = np.logaddexp(first, log_expit(-odds) + deep)  # (n,)
        slope = expit(odds) - np.exp(first - mixed)  # block 1's share less its share once the answer is known
        gradient = np.array([x @ slope / len(x) + l2 * weights[0], slope.mean()])
        return float(-mixed.mean() + 0.5 * l2 * weights[0] ** 2), gradient

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B").x
    gate = Gate()
    gate.weight.fill_(found[0] / std)
    gate.bias.fill_(found[1] - found[0] / std * mean)
    return gate
