"""Small models and texts that many tests share."""

from __future__ import annotations

import argparse
import inspect
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
SOURCE = inspect.getsource(argparse)  # real text


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: workers take whole files (`--dist loadfile`), and one would wait for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_dvc.py")


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


def train_llama(folder: Path) -> None:
    """A Llama that has learned something of SOURCE: trained, and saved with its tokenizer, by transformers alone."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lego.tokenizer import TextEncoder, fit_bpe

    TextEncoder.fitted(fit_bpe([SOURCE], 300, 10**6)).save(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=304,  # more rows than the tokenizer has ids, as checkpoints often have
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(SOURCE)["input_ids"])
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    model = LlamaForCausalLM(config)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for step in range(60):
        batch = ids[torch.arange(8 * step, 8 * step + 8) % len(ids)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.5
    model.save_pretrained(folder)
