"""Fitting the gate on what both exits said of text (specs: ashem section 9)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from torch import Tensor

from lego.evaluation.routed import perplexity, token_table
from lego.model.gate import FEATURES, Gate, gate_features
from lego.model.transformer import BaseTransformer

GATE_FEATURES = "gate_features"
"""Name under which a token table holds what the gate is told, if it was asked for with `feature_score`."""


def feature_score(exit_states: Tensor, logits: Tensor) -> Tensor:
    """What the gate is told of each token (n, FEATURES), in the form of an exit criterion."""
    return gate_features(logits)


def gate_for(
    model: BaseTransformer, batches: Iterable[tuple[Tensor, Tensor]], device: str | torch.device
) -> tuple[Gate, dict[str, float]]:
    """The gate of a model with two exits, fitted on a text, and perplexities there of each exit and of the mixture.

    Args:
        model: with two blocks.
        batches: (x, y) of token ids (B, T), of text that neither block was trained on.
        device: where the model runs.
    """
    table = token_table(model, batches, device, {GATE_FEATURES: feature_score})
    features, shallow, deep = table.scores[GATE_FEATURES], table.nll_shallow, table.nll_deep
    gate = fit_gate(features, shallow, deep)
    odds = features.astype(np.float64) @ gate.weight.double().numpy() + gate.bias.item()
    mixed = -np.logaddexp(log_expit(odds) - shallow, log_expit(-odds) - deep)
    perplexities = {f"{name}_ppl": perplexity(nll) for name, nll in (("shallow", shallow), ("deep", deep))}
    return gate, perplexities | {"mixed_ppl": perplexity(mixed), "share_of_block1": float(expit(odds).mean())}


def fit_gate(features: np.ndarray, nll_shallow: np.ndarray, nll_deep: np.ndarray, l2: float = 1e-4) -> Gate:
    """The gate whose mixtures have the smallest mean loss.

    Args:
        features: (n, FEATURES) of `gate_features`.
        nll_shallow, nll_deep: losses (n,) of both exits, in nats.
        l2: weight penalty, on features of unit variance.

    Raises:
        ValueError: there is no token.
    """
    if not len(features):
        raise ValueError("no token to fit the gate on")
    mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    std[std < 1e-9] = 1.0  # of text on which a feature never changes
    x = np.concatenate([(features - mean) / std, np.ones((len(features), 1))], axis=1)  # (n, FEATURES + 1)
    shallow, deep = -nll_shallow.astype(np.float64), -nll_deep.astype(np.float64)  # log-probabilities

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        odds = x @ weights
        first = log_expit(odds) + shallow
        mixed = np.logaddexp(first, log_expit(-odds) + deep)  # (n,)
        slope = expit(odds) - np.exp(first - mixed)  # block 1's share less its share once the answer is known
        penalty = l2 * weights[:-1]
        return float(-mixed.mean() + 0.5 * penalty @ weights[:-1]), x.T @ slope / len(x) + np.append(penalty, 0.0)

    found = minimize(loss, np.zeros(FEATURES + 1), jac=True, method="L-BFGS-B").x
    weights = found[:-1] / std
    gate = Gate()
    gate.weight.copy_(torch.from_numpy(weights))
    gate.bias.fill_(found[-1] - weights @ mean)
    return gate
