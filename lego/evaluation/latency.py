"""Wall-clock time of routed depth beside the full model, as ratios of interleaved pairs (ashem section 6)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lego.model.exit_criteria import Criterion, max_prob
from lego.model.gate import Gate
from lego.model.transformer import BaseTransformer
from lego.routing.decoder import RoutedDecoder

BATCHES = (1, 8, 32)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio_of_pairs(
    routed: Callable[[], object], full: Callable[[], object], repeats: int
) -> tuple[float, float, float]:
    """Median, smallest and largest of routed / full over interleaved pairs, after two of each to warm up."""
    for run in (routed, full, routed, full):
        run()
    ratios = sorted(seconds(routed) / seconds(full) for _ in range(repeats))
    return statistics.median(ratios), ratios[0], ratios[-1]


def latency_ratios(
    model: BaseTransformer,
    ids: Tensor,
    threshold: float,
    repeats: int,
    criterion: Criterion = max_prob,
    gate: Gate | None = None,
) -> dict[str, float]:
    """Median of routed / full for reading whole sequences, by batch size; both are the routed decoder.

    Args:
        model: with two blocks, on its device.
        ids: sequences to read (n, T), taken again where a batch needs more.
        threshold, criterion, gate: see RoutedDecoder; the full model answers without a gate.
        repeats: timed pairs.
    """
    ratios = {}
    for size in BATCHES:
        batch = ids[torch.arange(size) % len(ids)].to(model.embedding.weight.device)

        def read(at: float | None, batch: Tensor = batch) -> None:
            RoutedDecoder(model, at, len(batch), criterion, None if at is None else gate).read(batch)

        median, *_ = ratio_of_pairs(partial(read, threshold), partial(read, None), repeats)
        ratios[f"latency_ratio_batch_{size}"] = median
    return ratios
