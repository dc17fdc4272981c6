"""Small models and texts that many tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
os.environ["TOKENIZERS_PARALLELISM"] = "true"
torch.set_num_threads(1)

VOCAB = 97


def random_batches(count: int, batch: int = 4, length: int = 12, vocab: int = VOCAB, seed: int = 0) -> list:
    """(x, y) batches of a noisy cyclic language: y = x + 1 most of the time, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        start = torch.randint(0, vocab, (batch, 1), generator=generator)
        rows = (start + torch.arange(length + 1)) % vocab  # (B, T + 1)
        noise = torch.randint(0, vocab, rows.shape, generator=generator)
        rows = torch.where(torch.rand(rows.shape, generator=generator) < 0.3, noise, rows)
        batches.append((rows[:, :-1], rows[:, 1:]))
    return batches


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return random_batches(6)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """A known seed before each test, and torch's switches as they were after it: stages set them for their process."""
    torch.manual_seed(0)
    yield
    torch.set_deterministic_debug_mode("default")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


def logits_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
