"""Training a model on all tokens for a budget of multiply-accumulates instead of a number of epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lego.base.sections import TrainParams
from lego.model.transformer import BaseTransformer
from lego.tokens.batches import EvaluationBatches, TrainingBatches
from lego.training.epochs import History, TrainingState, fit
from lego.training.setup import build_training
from lego.training.steps import optimizer_steps
from lego.training.trainer import Trainer, TrainingConfig


@dataclass(frozen=True)
class Budget:
    """Multiply-accumulates to spend.

    Args:
        macs: how many.
        before: what the given block 1 had cost; None = the model begins at random. 0 if it was trained elsewhere.
    """

    macs: float
    before: float | None = None

    def spent(self, macs: float, lr: float) -> dict[str, float | None]:
        """Keys of a model's metrics file: its rate, what its training cost, and how far that lies from the budget."""
        return {
            "lr": lr,
            "train_macs": (self.before or 0.0) + macs,
            "added_macs": None if self.before is None else macs,
            "budget_macs": self.macs,
            "distance_from_budget": macs / self.macs - 1,
        }


def train_blocks(
    model: BaseTransformer,
    config: TrainingConfig,
    batches: TrainingBatches,
    lr: float,
    train: TrainParams,
    validation: EvaluationBatches,
    device: torch.device,
    state_file: Path,
    *,
    keep_start: bool,
    evaluate: Callable[[], dict[str, float]] | None = None,
    on_best: Callable[[int], None] = lambda epoch: None,
) -> tuple[History, bool]:
    """Trains on all blocks that `batches` has in total, with one schedule, and keeps the best state on validation text.

    Args:
        model: what is trained.
        config: where loss is computed.
        batches: with total_blocks, which the budget pays for.
        lr: peak learning rate.
        train: section `train` of the parameters.
        validation: what the best state is chosen on.
        device: where the model runs.
        state_file: where a killed run continues from.
        keep_start: whether the model may also stay as it was.
        evaluate: -> `ppl` and `acc` on validation text, by which the best state is chosen; default: its last layer's.
        on_best: called with the epoch number (from 1) after each improvement.

    Returns:
        What the run saw, and whether it continued a killed one.
    """
    assert batches.total_blocks
    epochs = -(-batches.total_blocks // batches.blocks_per_epoch)
    steps = optimizer_steps(batches.steps_by_epoch(epochs), train.grad_accumulation)
    optimizer, options = build_training(model.to(device), lr, steps, train)
    trainer = Trainer(config, model.sizes["vocab_size"], device, options=options)
    state = TrainingState(state_file, model, optimizer, options.scheduler)
    history = fit(
        model,
        batches,
        lambda: trainer.train_epoch(model, batches, optimizer),
        evaluate or (lambda: trainer.evaluate(model, validation)),
        max_epochs=epochs,
        patience=epochs + 1,  # the whole budget is spent
        keep_start=keep_start,
        on_best=on_best,
        state=state,
    )
    return history, state.continued
