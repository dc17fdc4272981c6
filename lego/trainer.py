"""One training loop for every phase and baseline: where loss is computed, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lego.steps import NonFiniteLossError, StepOptions, build_optimizer, run_epoch
from lego.transformer import BaseTransformer, compute_cost

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


@dataclass
class History:
    """What a run of `fit` saw, epoch by epoch."""

    train_losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best: dict[str, float] = field(default_factory=lambda: {"ppl": math.inf})
    stopped_early: bool = False

    def as_result(self) -> dict[str, Any]:
        """The return value of `train_with_early_stopping`; val_losses holds perplexities, the historic key."""
        return {
            "train_losses": self.train_losses,
            "val_losses": [e["ppl"] for e in self.evaluations],
            "val_accs": [e["acc"] for e in self.evaluations],
            "best_epoch": self.best_epoch,
            "total_epochs": len(self.evaluations),
            "stopped_early": self.stopped_early,
        }


def _epoch_line(epoch: int, max_epochs: int, history: History) -> str:
    stats = history.evaluations[-1]
    shallow = stats.get("shallow_ratio")
    return (
        f"epoch {epoch}/{max_epochs}: train loss {history.train_losses[-1]:.4f} nats, "
        f"val ppl {stats['ppl']:.3f}, val acc {100 * stats['acc']:.2f} %"
        + (f", shallow {100 * shallow:.1f} %" if shallow else "")
        + (" (best)" if history.best_epoch == epoch else "")
    )


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    train_once: Callable[[], float],
    evaluate: Callable[[], dict[str, float]],
    *,
    max_epochs: int,
    patience: int,
    min_delta: float = 0.0,
    verbose: bool = True,
    keep_start: bool = False,
    on_best: Callable[[int], None] = lambda epoch: None,
) -> History:
    """Epochs until validation perplexity stops falling; the model ends as it was at its best.

    Args:
        model: what is trained; its best state is restored, also when a loss is not finite.
        batches: what train_once reads; its `set_epoch`, if there, is called with 0, 1, ... before each epoch.
        train_once: -> mean training loss of an epoch in nats per token.
        evaluate: -> at least `ppl` and `acc` on validation text.
        max_epochs: at most this many epochs.
        patience: stop after this many epochs without a better perplexity.
        min_delta: how much lower a perplexity must be to be better.
        verbose: one line per epoch on stdout.
        keep_start: evaluate the model before the first epoch too, and return it (best_epoch 0) if no epoch is better.
        on_best: called with the epoch number (from 1) after each improvement.

    Raises:
        NonFiniteLossError: naming epoch, step and learning rate; the model then holds its last good state.
    """
    history = History()
    if keep_start:
        history.best = evaluate()
        if verbose:
            print(f"start: val ppl {history.best['ppl']:.3f}", flush=True)
    best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        for epoch in range(1, max_epochs + 1):
            try:
                if hasattr(batches, "set_epoch"):
                    batches.set_epoch(epoch - 1)
                history.train_losses.append(train_once())
                stats = evaluate()
                if not math.isfinite(stats["ppl"]):
                    raise NonFiniteLossError(f"validation perplexity is {stats['ppl']}")
            except NonFiniteLossError as error:
                reached = (
                    f"the best epoch before it was {history.best_epoch}" if history.best_epoch else "none was better"
                )
                raise NonFiniteLossError(f"epoch {epoch}: {error}; {reached}; lower the learning rate") from None
            history.evaluations.append(stats)
            if stats["ppl"] < history.best["ppl"] - min_delta:
                history.best, history.best_epoch = stats, epoch
                for name, tensor in model.state_dict().items():
                    best[name].copy_(tensor)
                on_best(epoch)
            if verbose:
                print(_epoch_line(epoch, max_epochs, history), flush=True)
            if epoch - history.best_epoch >= patience:
                history.stopped_early = True
                break
    finally:
        model.load_state_dict(best)
    return history


def epoch_rows(result: dict[str, Any], tokens_per_epoch: int, total_tokens: int) -> list[dict[str, float]]:
    """The curve of a run as rows for a CSV: epoch, tokens seen, train_loss, val_ppl, val_acc.

    Args:
        result: what `train_with_early_stopping` returns.
        tokens_per_epoch: tokens in a full epoch; the last one may be cut.
        total_tokens: tokens seen in all.
    """
    columns = zip(result["train_losses"], result["val_losses"], result["val_accs"], strict=True)
    return [
        {
            "epoch": n,
            "tokens": min(n * tokens_per_epoch, total_tokens),
            "train_loss": loss,
            "val_ppl": ppl,
            "val_acc": acc,
        }
        for n, (loss, ppl, acc) in enumerate(columns, 1)
    ]


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
        h, done, loss = model.embedding(x), 0, torch.zeros((), device=x.device)
        for layer, weight in weights.items():
            h, done = model.run_layers(h, done + 1, layer), layer
            loss = loss + weight * model.loss_at(h, layer, y)
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
            h = model.states_at(x, read)
            losses, correct, confidence = model.read_at(h, read, y)
            if threshold:
                hard = confidence.view_as(y) < threshold  # (B, T)
                deep = model.read_at(model.deepen(h, hard, k), model.num_layers, y[hard])
                losses[hard.flatten()], correct[hard.flatten()] = deep[:2]
                shallow += int((~hard).sum())
            nll += losses.cpu().double().sum().item()  # not every device has float64
            right += int(correct.sum())
            tokens += y.numel()
        if not tokens:
            raise ValueError("no batches to evaluate: give a re-iterable that yields at least one (x, y)")
        ratio = shallow / tokens
        return {
            "acc": right / tokens,
            "ppl": math.exp(min(nll / tokens, 700.0)),  # e^709 is the largest float
            "shallow_ratio": ratio,
            "compute_cost": compute_cost(ratio, k, model.num_layers),
        }

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
    ) -> dict[str, Any]:
        """Trains until validation perplexity stops falling and restores the best model.

        Args:
            model: what is trained.
            train_batches, val_batches: re-iterables of (x, y) (B, T); `set_epoch`, if there, is called with 0, 1, ...
            optimizer: over the parameters to update.
            max_epochs, patience, min_delta, verbose, on_best: see `fit`.

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
        ).as_result()
