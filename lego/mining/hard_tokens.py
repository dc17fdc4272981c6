"""The tokens that block 1 finds hard: those whose confidence lies below the threshold.

All of this is per token, never per sequence: almost every sequence holds a hard token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lego.mining.thresholds import Batches
from lego.model.transformer import BaseTransformer


@torch.no_grad()
def exit_states(
    model: BaseTransformer, batches: Batches, device: str | torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per batch: ids (B, T), targets (B, T), exit states (B, T, D) and confidences (B, T), on the CPU."""
    model.to(device).eval()
    for x, y in batches:
        h = model.forward_to_hidden(x.to(device))
        yield x, y, h.cpu(), model.compute_confidence(h).cpu()


def collect_hard_examples(
    model: BaseTransformer, val_batches: Batches, threshold: float, device: str | torch.device
) -> dict[str, Tensor]:
    """Hard tokens of all batches, flattened over sequences.

    Args:
        model: read at its exit layer.
        val_batches: (x, y) of token ids (B, T). The name is historic: mine on train text.
        threshold: a token is hard if its confidence is strictly below.
        device: where the model runs.

    Returns:
        inputs (n,), hidden_states (n, D), targets (n,), confidences (n,), on the CPU.

    Raises:
        ValueError: no token is hard.
    """
    parts = []
    for x, y, h, confidence in exit_states(model, val_batches, device):
        hard = confidence < threshold  # (B, T)
        parts.append((x[hard], h[hard], y[hard], confidence[hard]))
    if not sum(len(part[0]) for part in parts):
        raise ValueError(f"no hard token: no confidence lies below the threshold {threshold:g}; raise it")
    inputs, hidden, targets, confidences = (torch.cat(column) for column in zip(*parts, strict=True))
    return {"inputs": inputs, "hidden_states": hidden, "targets": targets, "confidences": confidences}
