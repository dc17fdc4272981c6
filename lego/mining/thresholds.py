"""Which tokens leave early: confidence and its threshold (ashem section 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from lego.model.transformer import BaseTransformer

Batches = Iterable[tuple[Tensor, Tensor]]
TORCH_QUANTILE_LIMIT = 2**24  # elements beyond which torch.quantile refuses


def compute_confidence(model: BaseTransformer, hidden_state: Tensor) -> Tensor:
    """Largest softmax probability (...,) at the exit layer for exit states (..., D)."""
    return model.compute_confidence(hidden_state)


def quantile_threshold(confidences: Tensor, ratio: float) -> float:
    """Confidence below which a share `ratio` of the tokens lies, linearly interpolated between ranks.

    Args:
        confidences: any shape, flattened.
        ratio: share of hard tokens, in [0, 1].

    Raises:
        ValueError: there is no confidence, or the ratio lies outside.
    """
    values = confidences.flatten().float()
    if not len(values) or not 0 <= ratio <= 1:
        raise ValueError(f"need confidences and a ratio in [0, 1], got {len(values)} and {ratio}")
    if len(values) <= TORCH_QUANTILE_LIMIT:
        return torch.quantile(values, ratio).item()
    rank = ratio * (len(values) - 1)  # float64: beyond the limit a float32 does not tell neighbouring ranks apart
    low = math.floor(rank)
    high = min(low + 1, len(values) - 1)
    ordered = torch.from_numpy(np.partition(values.numpy(force=True), (low, high)))
    return torch.lerp(ordered[low], ordered[high], rank - low).item()


@torch.no_grad()
def collect_confidences(
    model: BaseTransformer,
    batches: Batches,
    device: str | torch.device,
    on_states: Callable[[Tensor, Tensor], None] = lambda states, confidence: None,
) -> Tensor:
    """Confidences (n,) of every token of the batches, on the CPU, in order.

    Args:
        model: read at its exit layer.
        batches: (x, y) of token ids (B, T).
        device: where the model runs.
        on_states: called with each batch's exit states (B * T, D) and confidences (B * T,).
    """
    model.to(device).eval()
    parts = []
    for x, _ in batches:
        states = model.forward_to_hidden(x.to(device))  # (B, T, D)
        parts.append(model.compute_confidence(states).flatten().cpu())
        on_states(states.flatten(0, 1), parts[-1])
    return torch.cat(parts)


def compute_confidence_threshold(
    model: BaseTransformer, val_batches: Batches, target_ratio: float, device: str | torch.device
) -> float:
    """Threshold below which a share `target_ratio` of the batches' tokens lies.

    Args:
        model: read at its exit layer.
        val_batches: (x, y) of token ids (B, T); calibration text in the pipeline.
        target_ratio: share of hard tokens, in [0, 1].
        device: where the model runs.
    """
    return quantile_threshold(collect_confidences(model, val_batches, device), target_ratio)
