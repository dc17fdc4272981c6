"""One training loop for every phase and baseline: where loss is computed, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lego.model.transformer import BaseTransformer, read_result
from lego.training.epochs import TrainingState, fit
from lego.training.steps import StepOptions, build_optimizer, run_epoch

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StageConfig:
    """Next-token loss at each of the layers first..last, each with weight loss_weight (ashem section 2)."""

    layers: tuple[int, int]
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        first, last = self.layers
        if not 1 <= first <= last:
            raise ValueError(f"StageConfig.layers must be (first, last) with 1 <= first <= last, got {self.layers}")


@dataclass(frozen=True)
class TrainingConfig:
    """Where loss is computed and where inference stops; routing_threshold 0.0 = routing off, full depth."""

    stages: list[StageConfig]
    routing_threshold: float = 0.0
    exit_layer: int = 1

    def __post_init__(self) -> None:
        if not self.routing_threshold >= 0:  # NaN fails every comparison
            raise ValueError(f"routing_threshold must be at least 0.0, got {self.routing_threshold}")

    def layer_weights(self) -> dict[int, float]:
        """Loss weight of each layer that has one; weights of stages that share a layer add up."""
        weights: dict[int, float] = {}
        for stage in self.stages:
            for layer in range(stage.layers[0], stage.layers[1] + 1):
                weights[layer] = weights.get(layer, 0.0) + stage.loss_weight
        return {layer: weight for layer, weight in sorted(weights.items()) if weight}


def create_standard_config(num_layers: int) -> TrainingConfig:
    """Loss at the last layer only."""
    return TrainingConfig(stages=[StageConfig(layers=(num_layers, num_layers))])


def create_deep_supervision_config(num_layers: int) -> TrainingConfig:
    """Loss at every layer with equal weights 1/N (Lee et al. 2015)."""
    return TrainingConfig(stages=[StageConfig((layer, layer), 1 / num_layers) for layer in range(1, num_layers + 1)])


class Trainer:
    """Losses, steps and evaluation of one training configuration (ashem section 2).

    Args:
        config: where loss is computed and where inference stops; its threshold and exit layer win over the model's.
        vocab_size: entries of the vocabulary (V).
        device: where batches and models go.
        options: how a step is taken.
    """

    def __init__(
        self,
        config: TrainingConfig,
        vocab_size: int,
        device: str | torch.device = "cpu",
        *,
        options: StepOptions = StepOptions(),
    ) -> None:
        self.config, self.vocab_size, self.device, self.options = config, vocab_size, device, options

    def create_optimizer(
        self, model: nn.Module, base_lr: float, *, weight_decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.999)
    ) -> AdamW:
        """AdamW over what requires a gradient, without decay on norms and embeddings; moves the model to the device."""
        return build_optimizer(model.to(self.device), base_lr, weight_decay, betas)

    def compute_loss(self, model: BaseTransformer, x: Tensor, y: Tensor) -> Tensor:
        """Weighted sum over the configured layers of the mean cross-entropy in nats, of x and y (B, T).

        Raises:
            ValueError: a configured layer lies beyond the model's depth.
        """
        weights = self.config.layer_weights()
        deepest = max(weights, default=0)
        if not 1 <= deepest <= model.num_layers:
            raise ValueError(f"StageConfig names layer {deepest}, but the model has layers 1..{model.num_layers}")
        loss = torch.zeros((), device=x.device)
        for layer, h in model.outputs(x, weights):
            loss = loss + weights[layer] * model.loss_at(h, layer, y)
        return loss

    def train_epoch(self, model: BaseTransformer, batches: Batches, optimizer: Optimizer) -> float:
        """Trains on every (x, y) once; returns the mean loss in nats per token."""
        model.to(self.device).train()

        def loss_of(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
            x, y = (part.to(self.device) for part in batch)
            return self.compute_loss(model, x, y), y.numel()

        return run_epoch(batches, loss_of, optimizer, self.device, self.options)

    @torch.no_grad()
    def evaluate(self, model: BaseTransformer, batches: Batches) -> dict[str, float]:
        """Accuracy, perplexity, shallow_ratio and compute_cost of the (routed) model on all batches."""
        model.to(self.device).eval()
        threshold, k = self.config.routing_threshold, self.config.exit_layer
        nll, right, shallow, tokens = 0.0, 0, 0, 0
        for x, y in batches:
            x, y = x.to(self.device), y.to(self.device)
            read = k if threshold else model.num_layers
            h, deepen = model.exit_at(x, read)
            losses, correct, confidence = model.read_at(h, read, y)
            if threshold:
                hard = confidence.view_as(y) < threshold  # (B, T)
                deep = model.read_at(deepen(hard), model.num_layers, y[hard])
                losses[hard.flatten()], correct[hard.flatten()] = deep[:2]
                shallow += int((~hard).sum())
            nll += losses.cpu().double().sum().item()  # not every device has float64
            right += int(correct.sum())
            tokens += y.numel()
        return read_result(nll, right, shallow, tokens, k, model.num_layers)

    def train_with_early_stopping(
        self,
        model: BaseTransformer,
        train_batches: Batches,
        val_batches: Batches,
        optimizer: Optimizer,
        max_epochs: int,
        patience: int,
        min_delta: float = 0.0,
        verbose: bool = True,
        *,
        on_best: Callable[[int], None] = lambda epoch: None,
        state: TrainingState | None = None,
    ) -> dict[str, Any]:
        """Trains until validation perplexity stops falling and restores the best model.

        Args:
            model: what is trained.
            train_batches, val_batches: re-iterables of (x, y) (B, T); `set_epoch`, if there, is called with 0, 1, ...
            optimizer: over the parameters to update.
            max_epochs, patience, min_delta, verbose, on_best, state: see `lego.training.epochs.fit`.

        Returns:
            train_losses, val_losses (perplexities), val_accs, best_epoch (from 1), total_epochs, stopped_early.
        """

        return fit(
            model,
            train_batches,
            lambda: self.train_epoch(model, train_batches, optimizer),
            lambda: self.evaluate(model, val_batches),
            max_epochs=max_epochs,
            patience=patience,
            min_delta=min_delta,
            verbose=verbose,
            on_best=on_best,
            state=state,
        ).as_result()
