"""Accuracy and perplexity of a routed model on text, read through its decoder."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lego.model.exit_criteria import Criterion, max_prob
from lego.model.transformer import BaseTransformer, read_result
from lego.routing.decoder import RoutedDecoder


@torch.no_grad()
def evaluate(
    model: BaseTransformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    threshold: float | None,
    device: str | torch.device,
    criterion: Criterion = max_prob,
) -> dict[str, float]:
    """Accuracy, perplexity, shallow_ratio and compute_cost of the routed model, with no logits of a whole batch.

    Args:
        model: with two blocks.
        batches: (x, y) of token ids (B, T).
        threshold, criterion: see RoutedDecoder.
        device: where the model runs.

    Raises:
        ValueError: there are no batches.
    """
    model.to(device)
    k, nll, right, easy, tokens = model.exit_layer, 0.0, 0, 0, 0
    for x, y in batches:
        y = y.to(device).flatten()  # (n,)
        decoder = RoutedDecoder(model, threshold, len(x))
        shallow = decoder.shallow(x.to(device))
        deep = torch.ones_like(y, dtype=torch.bool)
        losses, correct = torch.zeros(len(y), device=device), torch.zeros_like(deep)
        if threshold is not None:
            losses, correct, _, score = model.read_at(shallow.states, k, y, [criterion])
            deep = score < threshold
        if deep.any():
            losses[deep], correct[deep] = model.read_at(decoder.deep_states(shallow, deep), model.num_layers, y[deep])[
                :2
            ]
        nll += losses.cpu().double().sum().item()  # not every device has float64
        right += int(correct.sum())
        easy += int((~deep).sum())
        tokens += len(y)
    return read_result(nll, right, easy, tokens, k, model.num_layers)
