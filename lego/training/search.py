"""The same small search of the learning rate for every model: the best of a few rates on validation text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lego.model.transformer import BaseTransformer
from lego.training.epochs import History
from lego.training.steps import NonFiniteLossError


@dataclass(frozen=True)
class Trial:
    """One training run of a search: its peak learning rate, the model at its best, what the run saw."""

    lr: float
    model: BaseTransformer
    history: History

    @property
    def ppl(self) -> float:
        """On validation text."""
        return self.history.best["ppl"]


@dataclass(frozen=True)
class Search:
    """The best trial, and the validation perplexity of every rate that was tried; infinite where training diverged."""

    best: Trial
    tried: dict[float, float]

    @property
    def facts(self) -> dict[str, Any]:
        """For a metrics file: the rate, how many were tried, and whether it is the smallest or largest of several."""
        at_edge = len(self.tried) > 1 and self.best.lr in (min(self.tried), max(self.tried))
        return {"lr": self.best.lr, "lr_tried": len(self.tried), "lr_at_edge": at_edge}


def search_rates(base: float, factors: Sequence[float], train: Callable[[float], Trial]) -> Search:
    """Trains once per rate base * factor and prints the validation perplexity of each.

    Args:
        base: peak learning rate that the factors multiply.
        factors: what is tried.
        train: trains a new model at a rate.

    Raises:
        NonFiniteLossError: no rate gave a finite loss.
    """
    best: Trial | None = None
    tried: dict[float, float] = {}
    failure: NonFiniteLossError | None = None
    for factor in factors:
        lr = base * factor
        try:
            trial = train(lr)
        except NonFiniteLossError as error:
            failure, tried[lr] = error, math.inf
            print(f"learning rate {lr:g}: {error}", flush=True)
            continue
        tried[lr] = trial.ppl
        best = trial if best is None or trial.ppl < best.ppl else best
    if best is None:
        assert failure is not None
        raise failure
    if len(tried) > 1:
        shown = ", ".join(f"{lr:g}: {ppl:.3f}" for lr, ppl in sorted(tried.items()))
        edge = ", the end of what was tried" if best.lr in (min(tried), max(tried)) else ""
        print(f"validation perplexity by learning rate: {shown}; taken: {best.lr:g}{edge}", flush=True)
    return Search(best, tried)
