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
    model: BaseTransformer,
    batches: Batches,
    device: str | torch.device,
    layer: int | None = None,
    keys_values: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per batch: ids (B, T), targets (B, T), exit states (B, T, D) and confidences (B, T), on the CPU.

    Args:
        model: read at its exit layer.
        batches: (x, y) of token ids (B, T).
        device: where the model runs.
        layer: whose outputs come in the place of exit states, if block 2 is to begin below the exit.
        keys_values: with them, as one vector a token, comes all else that block 2 reads; see `Reached.packed`.
    """
    model.to(device).eval()
    at = model.exit_layer if layer is None else layer
    for x, y in batches:
        states = model.run_layers(model.embedding(x.to(device)), 1, at)
        if keys_values:
            reached = model.reach(states, begin=at)
            exits, states = reached.states[-1], reached.packed()
        else:
            exits = model.run_layers(states, at + 1, model.exit_layer)
        yield x, y, states.cpu(), model.compute_confidence(exits).cpu()


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
