"""Epochs until validation perplexity stops falling, and the state from which a killed run continues."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lego.base.artifacts import write_tensors
from lego.base.digests import of_tensors
from lego.training.steps import NonFiniteLossError

TUPLES = ("betas", "ns_coefficients")  # of an optimizer's groups, which JSON makes lists of


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


class TrainingState:
    """All that the next epoch depends on, in one file that is replaced after each epoch, atomically.

    Args:
        file: where it lies; a safetensors file with the rest as JSON in its header.
        model, optimizer, scheduler: what is saved and restored, in place.
    """

    def __init__(self, file: Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        self.file, self.model, self.optimizer, self.scheduler = file, model, optimizer, scheduler
        self.continued = False

    def save(self, best: dict[str, Tensor], history: History) -> None:
        """Replaces the file by the present state."""
        optimizer = self.optimizer.state_dict()
        moments = {
            f"{index}.{key}": value for index, state in optimizer["state"].items() for key, value in state.items()
        }
        tensors = {
            **{f"model/{name}": tensor.detach().clone() for name, tensor in self.model.state_dict().items()},
            **{f"best/{name}": tensor for name, tensor in best.items()},
            **{f"optimizer/{name}": tensor for name, tensor in moments.items()},
            "rng": torch.get_rng_state(),
        }
        rest = {
            "history": asdict(history),
            "groups": optimizer["param_groups"],
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rest)
        write_tensors(self.file, tensors, {"state": text, "sha256": of_tensors(tensors, text)})

    def load(self, best: dict[str, Tensor]) -> History | None:
        """Restores what was saved, `best` included; None if there is nothing whole to continue from."""
        if not self.file.exists():
            return None
        if (saved := self._read()) is None:
            print(f"{self.file}: is damaged, so training starts afresh", flush=True)
            return None
        tensors, rest = saved
        groups = [group | {key: tuple(group[key]) for key in TUPLES if key in group} for group in rest["groups"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                index, key = name.removeprefix("optimizer/").split(".", 1)
                state.setdefault(int(index), {})[key] = tensor
        self.model.load_state_dict({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
        for name, tensor in best.items():
            tensor.copy_(tensors[f"best/{name}"])
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.scheduler:
            self.scheduler.load_state_dict(rest["scheduler"])
        torch.set_rng_state(tensors["rng"])
        self.continued = True
        return History(**rest["history"])

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What the file holds; None if it is not as it was written."""
        try:
            with safe_open(self.file, "pt") as file:
                said = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            if said["sha256"] == of_tensors(tensors, said["state"]):
                return tensors, json.loads(said["state"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OverflowError):
            pass
        return None


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
    state: TrainingState | None = None,
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
        state: saved after each epoch; if it holds something, training continues from there.

    Raises:
        NonFiniteLossError: naming epoch, step and learning rate; the model then holds its last good state.
    """
    best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    history = state.load(best) if state else None
    if history is not None:
        if verbose:
            print(f"continues after epoch {len(history.evaluations)}/{max_epochs}", flush=True)
    else:
        history = History()
        if keep_start:
            history.best = evaluate()
            if verbose:
                print(f"start: val ppl {history.best['ppl']:.3f}", flush=True)
    try:
        while len(history.evaluations) < max_epochs and not history.stopped_early:
            epoch = len(history.evaluations) + 1
            loss, stats = _one_epoch(epoch, batches, train_once, evaluate, history)
            history.train_losses.append(loss)
            history.evaluations.append(stats)
            if stats["ppl"] < history.best["ppl"] - min_delta:
                history.best, history.best_epoch = stats, epoch
                for name, tensor in model.state_dict().items():
                    best[name].copy_(tensor)
                on_best(epoch)
            history.stopped_early = epoch - history.best_epoch >= patience
            if state:
                state.save(best, history)
            if verbose:
                print(_epoch_line(epoch, max_epochs, history), flush=True)
    finally:
        model.load_state_dict(best)
    return history


def _one_epoch(
    epoch: int,
    batches: Iterable[Any],
    train_once: Callable[[], float],
    evaluate: Callable[[], dict[str, float]],
    history: History,
) -> tuple[float, dict[str, float]]:
    try:
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch - 1)
        loss, stats = train_once(), evaluate()
        if not math.isfinite(stats["ppl"]):
            raise NonFiniteLossError(f"validation perplexity is {stats['ppl']}")
    except NonFiniteLossError as error:
        reached = f"the best epoch before it was {history.best_epoch}" if history.best_epoch else "none was better"
        raise NonFiniteLossError(f"epoch {epoch}: {error}; {reached}; lower the learning rate") from None
    return loss, stats


def epoch_rows(result: dict[str, Any], seen: list[int], macs: float, macs_before: float = 0) -> list[dict[str, float]]:
    """The curve of a run as rows for a CSV: epoch, tokens seen, macs spent, train_loss, val_ppl, val_acc.

    Args:
        result: what `train_with_early_stopping` returns.
        seen: tokens seen by the end of each epoch.
        macs: multiply-accumulates that they cost in all.
        macs_before: what had been spent before.
    """
    columns = zip(result["train_losses"], result["val_losses"], result["val_accs"], strict=True)
    return [
        {
            "epoch": n,
            "tokens": seen[n - 1],
            "macs": round(macs_before + macs * seen[n - 1] / seen[-1]),
            "train_loss": loss,
            "val_ppl": ppl,
            "val_acc": acc,
        }
        for n, (loss, ppl, acc) in enumerate(columns, 1)
    ]
