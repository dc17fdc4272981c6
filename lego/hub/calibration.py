"""Which threshold sends a share of a text's tokens deep: what `LegoForCausalLM.calibrate` is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

ALWAYS_DEEP = 2.0  # above every score


def each_batch(batches: Tensor | Mapping[str, Any] | Iterable[Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Token ids (B, T) and attention mask (B, T) or None of each batch.

    Args:
        batches: ids (B, T) or (T,), a mapping with input_ids, or several of either, or tuples that begin with ids.
    """
    if isinstance(batches, Tensor | Mapping):
        batches = [batches]
    for batch in batches:
        mask = None
        if isinstance(batch, Mapping):
            batch, mask = batch["input_ids"], batch.get("attention_mask")
        elif isinstance(batch, tuple | list) and len(batch) and isinstance(batch[0], Tensor):
            batch = batch[0]
        if _ragged(batch):
            yield from each_batch([torch.as_tensor(row) for row in batch if len(row)])
        else:
            yield _table(batch), None if mask is None else _table(mask)


def _ragged(rows: Any) -> bool:
    """Whether they are sequences of unequal length, as a tokenizer gives them without padding."""
    return isinstance(rows, list | tuple) and len({len(row) for row in rows if hasattr(row, "__len__")}) > 1


def _table(rows: Any) -> Tensor:
    return torch.atleast_2d(torch.as_tensor(rows))


def threshold_at(scores: list[Tensor], deep_share: float) -> float:
    """The score below which a share of all scores lies, interpolated between ranks; none and all are none and all.

    Args:
        scores: (n,) each, in float32.
        deep_share: in [0, 1].

    Raises:
        ValueError: there is no score, or a share outside its range.
    """
    ordered = torch.cat([*scores, torch.empty(0)]).sort().values
    if not len(ordered):
        raise ValueError("calibration needs at least one token; give token ids of some text")
    if not 0 <= deep_share <= 1:
        raise ValueError(f"deep_share must be in [0, 1], got {deep_share}")
    if deep_share in (0, 1):
        return ALWAYS_DEEP if deep_share else 0.0
    rank = deep_share * (len(ordered) - 1)
    low, high = math.floor(rank), math.ceil(rank)
    return torch.lerp(ordered[low].double(), ordered[high].double(), rank - low).item()
