"""The tokens that every exit so far finds hard: those whose confidence lies below its threshold.

All of this is per token, never per sequence: almost every sequence holds a hard token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lego.mining.thresholds import Batches
from lego.model.blocks import Block
from lego.model.climb import Climb, last_of
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


@torch.no_grad()
def climbing_states(
    model: BaseTransformer,
    thresholds: Sequence[float],
    batches: Batches,
    device: str | torch.device,
    repeats: int,
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[int]]]:
    """`exit_states` for a block above the last one: what it reads, and confidences (B, T) at the last exit.

    What it begins at is zero, and the confidence 1, of tokens that an earlier exit found easy. With each batch come the
    numbers of its tokens that went through each block above the first.

    Args:
        model: with two blocks at least, in `sequence` context.
        thresholds: of every exit but the last; a token leaves there if its confidence is not below.
        batches: (x, y) of token ids (B, T).
        device: where the model runs.
        repeats: of the block's layers that repeat the last ones of the block below.
    """
    model.to(device).eval()
    block = Block(model.num_layers + 1, model.num_layers + repeats, repeats)
    for x, y in batches:
        climb, confidence, entered = climbed(model, thresholds, x.to(device), (*model.blocks, block))
        found = torch.ones_like(climb.mask, dtype=confidence.dtype)
        found[climb.mask] = confidence
        yield (x, y, climb.reached(block).packed().cpu(), found.cpu()), entered


@torch.no_grad()
def climbed(
    model: BaseTransformer, thresholds: Sequence[float], x: Tensor, blocks: Sequence[Block]
) -> tuple[Climb, Tensor, list[int]]:
    """The tokens of ids (B, T) that every exit but the last finds hard, at that one, and confidences (n,) there.

    Also how many went through each block above the first.
    """
    reached = model.reach(model.trunk(x))
    confidence = model.compute_confidence(reached.states[-1])  # (B, T)
    climb, entered = Climb(model.layer, blocks, reached, confidence < thresholds[0]), list[int]()
    for block, threshold in zip(model.blocks, [*thresholds[1:], None], strict=True):
        h = last_of(climb.through(block), climb.states[0])
        entered.append(len(h))
        confidence = model.compute_confidence(h, block.last)  # (n,)
        if threshold is not None:
            climb.narrow(confidence < threshold)
    return climb, confidence, entered


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
