"""How an optimizer step is taken: precision, accumulation, clipping, schedule, and refusing what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lego.base.progress import track


@dataclass(frozen=True)
class StepOptions:
    """How an optimizer step is taken; the defaults change nothing about plain `loss.backward(); optimizer.step()`.

    Args:
        grad_clip: largest global gradient norm; 0 = no clipping.
        accumulation: batches per optimizer step.
        precision: `fp32` or `bf16` (autocast of the forward pass).
        scheduler: stepped once per optimizer step.
    """

    grad_clip: float = 0.0
    accumulation: int = 1
    precision: str = "fp32"
    scheduler: LRScheduler | None = None


class NonFiniteLossError(FloatingPointError):
    """A loss or gradient became infinite or not a number; the message names step and learning rate."""


def build_optimizer(
    model: nn.Module,
    base_lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    without: Iterable[Tensor] = (),
) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) over what requires a gradient, but for the weights in `without`.

    Norms and embeddings do not decay.
    """
    spared = {id(p) for m in model.modules() if isinstance(m, nn.RMSNorm | nn.Embedding) for p in m.parameters()}
    left_out = {id(p) for p in without}
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in left_out]
    groups = [
        {"params": [p for p in trainable if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in spared], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=base_lr, betas=betas, fused=True)


def build_scheduler(
    optimizer: Optimizer, kind: str, warmup_steps: int, total_steps: int, min_ratio: float, decay_share: float = 0.2
) -> LambdaLR:
    """Linear warm-up, then one of three shapes.

    Args:
        optimizer: whose learning rates are peaks.
        kind: `constant`; `cosine` down to min_ratio at total_steps (Loshchilov & Hutter 2017); or `wsd`, constant and
            then straight down to min_ratio (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395).
        warmup_steps: of the linear warm-up.
        total_steps: where the learning rate has fallen to min_ratio of its peak.
        min_ratio: as a share of the peak.
        decay_share: wsd: share of total_steps in which it falls.
    """
    falling = max(1.0, min(decay_share * total_steps, total_steps - warmup_steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if kind == "constant":
            return 1.0
        if kind == "wsd":
            return max(min_ratio, 1 - (1 - min_ratio) * max(0.0, 1 - (total_steps - step) / falling))
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def optimizer_steps(batches_by_epoch: list[int], accumulation: int) -> int:
    """Steps of a run with so many batches in each epoch; an epoch ends with a step of its own."""
    return sum(-(-count // accumulation) for count in batches_by_epoch)


def run_epoch(
    batches: Iterable[Any],
    loss_of: Callable[[Any], tuple[Tensor, int]],
    optimizer: Optimizer,
    device: str | torch.device,
    options: StepOptions = StepOptions(),
) -> float:
    """Trains on every batch once.

    Args:
        batches: what loss_of understands.
        loss_of: batch -> (mean loss over its tokens, number of tokens).
        optimizer: over the parameters to update.
        device: where the loss is computed; chooses the autocast.
        options: see StepOptions.

    Returns:
        Mean loss per token in nats.

    Raises:
        ValueError: there is no batch.
        NonFiniteLossError: the loss or the gradient of a step is not finite; the step is not taken.
    """
    total, tokens, steps, pending, pending_tokens = 0.0, 0, 0, 0, 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)

    def require_finite(what: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            optimizer.zero_grad(set_to_none=True)
            lr = optimizer.param_groups[0]["lr"]
            raise NonFiniteLossError(f"{what} is {value.item()} at step {steps + 1} of the epoch, learning rate {lr:g}")

    def step() -> None:
        if options.accumulation > 1:  # gradients of sums so far: a mean over the tokens of all batches in the step
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(pending_tokens)
        require_finite("gradient norm", nn.utils.clip_grad_norm_(parameters, options.grad_clip or math.inf))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if options.scheduler is not None:
            options.scheduler.step()

    known = len(batches) if isinstance(batches, Sized) else None
    for batch in track(batches, known, "training", "batch"):
        with _autocast(device, options.precision):
            loss, n = loss_of(batch)
        require_finite("loss", loss)
        (loss if options.accumulation == 1 else loss * n).backward()
        total += loss.item() * n
        tokens, pending, pending_tokens = tokens + n, pending + 1, pending_tokens + n
        if pending == options.accumulation:
            step()
            steps, pending, pending_tokens = steps + 1, 0, 0
    if not tokens:
        raise ValueError("no batches: give a re-iterable such as a list or DataLoader; a generator lasts for one pass")
    if pending:
        step()
    return total / tokens


def _autocast(device: str | torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
