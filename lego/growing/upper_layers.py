"""Phase 2 of ASHEM (Adaptive Supervision via Hard Example Mining): the layers above the exit, and they alone.

One pass of training over hard tokens, lone or in their blocks, and the perplexity of lone ones. All start from stored
exit states, so block 1 is never called.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lego.model.reached import Reached
from lego.model.transformer import BaseTransformer
from lego.training.steps import StepOptions, run_epoch


@dataclass
class ASHEMConfig:
    """The method's own numbers, with the original's defaults; phase2_layers is the TOTAL depth (ashem section 2)."""

    phase1_layers: int = 2
    phase1_lr: float = 1e-3
    phase1_patience: int = 1
    hard_example_ratio: float = 0.5
    phase2_layers: int = 4
    phase2_lr: float = 1e-4
    phase2_patience: int = 3


class HardExampleLoader:
    """Shuffled, re-iterable batches ((B, 1, D), (B,)) of hard tokens in memory; each pass has its own order."""

    def __init__(self, hidden_states: Tensor, targets: Tensor, batch_size: int) -> None:
        self.hidden_states, self.targets, self.batch_size = hidden_states, targets, batch_size

    def __len__(self) -> int:
        return -(-len(self.targets) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.randperm(len(self.targets)).split(self.batch_size):
            yield self.hidden_states[batch].unsqueeze(1), self.targets[batch]  # (B, 1, D), (B,)


def create_hard_example_loader(hard_examples: dict[str, Tensor], batch_size: int) -> HardExampleLoader:
    """Batches of what collect_hard_examples returned.

    Args:
        hard_examples: with hidden_states (n, D) and targets (n,).
        batch_size: tokens per batch; the last one may be smaller.
    """
    return HardExampleLoader(hard_examples["hidden_states"], hard_examples["targets"], batch_size)


def _require_fit(model: BaseTransformer, vocab_size: int, num_lower_layers: int) -> None:
    if not 1 <= num_lower_layers < model.num_layers:
        raise ValueError(f"num_lower_layers must be in 1..{model.num_layers - 1}, got {num_lower_layers}")
    if vocab_size != model.sizes["vocab_size"]:
        raise ValueError(f"vocab_size must be the model's {model.sizes['vocab_size']}, got {vocab_size}")


def train_upper_layers(
    model: BaseTransformer,
    hard_batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    vocab_size: int,
    device: str | torch.device,
    num_lower_layers: int = 2,
    *,
    options: StepOptions = StepOptions(),
) -> float:
    """Trains block 2 on every hard token once, straight from exit states; the lower layers are never called.

    Args:
        model: the grown model; only parameters of the optimizer are updated.
        hard_batches: (exit states (B, 1, D), targets (B,)).
        optimizer: over the parameters to update.
        vocab_size: entries of the vocabulary (V).
        device: where the model runs.
        num_lower_layers: depth of block 1.
        options: how a step is taken.

    Returns:
        Mean loss in nats per hard token.

    Raises:
        ValueError: vocab_size or num_lower_layers does not fit the model.
    """
    _require_fit(model, vocab_size, num_lower_layers)
    model.to(device).train()

    def loss_of(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        h, y = (part.to(device) for part in batch)
        h = model.run_layers(h, num_lower_layers + 1, model.num_layers)  # (B, 1, D)
        return model.loss_at(h, model.num_layers, y), y.numel()

    return run_epoch(hard_batches, loss_of, optimizer, device, options)


def train_gathered(
    model: BaseTransformer,
    block_batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    optimizer: Optimizer,
    device: str | torch.device,
    *,
    options: StepOptions = StepOptions(),
) -> float:
    """Trains the last block on the hard tokens of whole blocks, in `sequence` context; lower ones are never called.

    Args:
        model: the grown model; only parameters of the optimizer are updated.
        block_batches: outputs (B, T, D) of the layer that block 2 begins at, or all that the last block reads
            (B, T, W) as `Reached.packed`, which is needed of any other; hard mask (B, T), targets (B, T).
        optimizer: over the parameters to update.
        device: where the model runs.
        options: how a step is taken.

    Returns:
        Mean loss in nats per hard token.
    """
    model.to(device).train()

    def loss_of(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, int]:
        h, hard, y = (part.to(device) for part in batch)
        D = model.sizes["dim"]
        reached = Reached.unpacked(h, model.sizes) if h.shape[-1] > D else None
        deep = model.deepen(h, hard, model.branch_layer) if reached is None else model.deepened(reached, hard)
        return model.loss_at(deep, model.num_layers, y[hard]), len(deep)

    return run_epoch(block_batches, loss_of, optimizer, device, options)


@torch.no_grad()
def evaluate_on_hard_examples(
    model: BaseTransformer,
    hard_examples: dict[str, Tensor],
    vocab_size: int,
    device: str | torch.device,
    batch_size: int = 64,
    num_lower_layers: int = 2,
) -> float:
    """Perplexity of the full depth on hard tokens, each seen alone.

    Args:
        model: the grown model.
        hard_examples: with hidden_states (n, D) and targets (n,).
        vocab_size, device, num_lower_layers: as in train_upper_layers.
        batch_size: tokens per forward pass.

    Raises:
        ValueError: vocab_size or num_lower_layers does not fit the model.
    """
    _require_fit(model, vocab_size, num_lower_layers)
    model.to(device).eval()
    nll = 0.0
    states, targets = hard_examples["hidden_states"], hard_examples["targets"]
    for h, y in zip(states.split(batch_size), targets.split(batch_size), strict=True):
        h = model.run_layers(h.unsqueeze(1).to(device), num_lower_layers + 1, model.num_layers)  # (b, 1, D)
        nll += model.read_at(h, model.num_layers, y.to(device))[0].cpu().double().sum().item()
    return math.exp(min(nll / len(targets), 700.0))
