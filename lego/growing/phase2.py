"""Training block 2 on stored exit states until routed validation perplexity stops falling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lego.base.ashem_sections import AshemParams
from lego.base.sections import TrainParams
from lego.growing.hard_batches import HardBlockBatches, HardTokenBatches
from lego.growing.upper_layers import train_gathered, train_upper_layers
from lego.mining.hidden_states import HiddenStateStore
from lego.model.cost import Ledger
from lego.model.growth import grow_model
from lego.model.stack import CONTEXT_AT_INFERENCE
from lego.model.transformer import BaseTransformer, DeepSupervisionTransformer
from lego.routing.measure import evaluate
from lego.tokens.batches import EvaluationBatches, tokens_in_epoch
from lego.training.epochs import History, TrainingState, fit
from lego.training.setup import build_training
from lego.training.steps import optimizer_steps

Batches = HardTokenBatches | HardBlockBatches


def hard_batches(store: HiddenStateStore, phase2_context: str, train: TrainParams, seq_len: int, seed: int) -> Batches:
    """Endless batches of the store's hard tokens, in their blocks or alone, as `ashem.phase2_context` says."""
    kind = HardBlockBatches if phase2_context == "sequence" else HardTokenBatches
    per_epoch = tokens_in_epoch(train.tokens_per_epoch, store.hard_tokens)
    return kind(store, train.batch_size * seq_len, per_epoch, seed)


def grown(ashem: AshemParams, block1: BaseTransformer, threshold: float, seed: int) -> DeepSupervisionTransformer:
    """Block 1 with untrained layers on top, as the section `ashem` says; each call gives the same weights.

    Raises:
        ParamsError: see `AshemParams.branch_of`, `rank_of` and `require_block2`.
    """
    ashem.require_block2(block1.num_layers)
    torch.manual_seed(seed)
    return grow_model(
        block1,
        block1.num_layers + ashem.new_layers,
        init=ashem.init_new_layers,
        routing_threshold=threshold,
        block2_context=CONTEXT_AT_INFERENCE[ashem.phase2_context],
        head=ashem.head,
        branch_layer=ashem.branch_of(block1.num_layers),
        branch_rank=ashem.rank_of(block1.sizes["dim"]),
    )


def steps_for(budget: float, batches: Batches, ledger: Ledger, head_trains: bool) -> int:
    """How many batches a budget of MACs pays for; they differ in size, so their number is corrected by their cost."""

    def cost(steps: int) -> int:
        batches.total_steps = steps
        epochs = -(-steps // batches.steps)
        hard, streamed = batches.seen(epochs)[-1], batches.streamed(epochs)
        batches.total_steps = None
        return ledger.train_block2(hard, head_trains, streamed)

    steps = batches.steps
    for _ in range(3):
        steps = max(0, round(steps * budget / cost(steps))) if steps else 0
    return steps


def train_block2(
    model: DeepSupervisionTransformer,
    batches: Batches,
    lr: float,
    epochs: int,
    patience: int,
    train: TrainParams,
    validation: EvaluationBatches,
    device: torch.device,
    state_file: Path,
    on_best: Callable[[int], None] = lambda epoch: None,
    judge: Callable[[], dict[str, float]] | None = None,
) -> tuple[History, bool]:
    """Trains the grown model's last block, and keeps its best state on validation text.

    Args:
        model: grown; its threshold routes validation text.
        batches: of hard tokens.
        lr: peak learning rate.
        epochs, patience: at most so many, and so many without a better perplexity.
        train: section `train` of the parameters.
        validation: what the best state is chosen on.
        device: where the model runs.
        state_file: where a killed run continues from.
        on_best: called with the epoch number (from 1) after each improvement.
        judge: its numbers on validation text, if not those of a model of two blocks.

    Returns:
        What the run saw, and whether it continued a killed one.
    """
    steps = optimizer_steps(batches.steps_by_epoch(epochs), train.grad_accumulation)
    optimizer, options = build_training(model.to(device), lr, steps, train)
    vocab_size, k = model.sizes["vocab_size"], model.exit_layer

    def train_once() -> float:
        if isinstance(batches, HardBlockBatches):
            return train_gathered(model, batches, optimizer, device, options=options)
        return train_upper_layers(model, batches, optimizer, vocab_size, device, k, options=options)

    state = TrainingState(state_file, model, optimizer, options.scheduler)
    history = fit(
        model,
        batches,
        train_once,
        judge or (lambda: evaluate(model, validation, model.routing_threshold, device)),
        max_epochs=epochs,
        patience=patience,
        keep_start=True,
        on_best=on_best,
        state=state,
    )
    return history, state.continued
