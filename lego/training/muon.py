"""Muon for the matrices of hidden layers with AdamW for all else, as one optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Muon, Optimizer

from lego.model.stack import LayerStack
from lego.training.steps import build_optimizer


class Optimizers(Optimizer):
    """Several optimizers over different parameters that are stepped, scheduled, saved and restored as one.

    Args:
        parts: their parameter groups and states become this one's, in order.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self._share()

    def _share(self) -> None:
        """Lets the parts work on this one's groups, whose rates a schedule changes, and on its state."""
        done = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups, part.state = self.param_groups[done : done + count], self.state
            done += count

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once it is made: which part should train them?

        Raises:
            ValueError: see above.
        """
        if hasattr(self, "parts"):
            raise ValueError("give all parameters when the optimizer is made, or add them to one of its parts")
        super().add_param_group(param_group)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each.

        Raises:
            ValueError: a closure is given.
        """
        if closure is not None:
            raise ValueError("closures are not supported: compute loss and gradients before the step")
        for part in self.parts:
            part.step()


def build_muon(
    model: nn.Module, lr: float, adamw_lr: float, weight_decay: float, betas: tuple[float, float]
) -> Optimizer:
    """Muon (Jordan et al. 2024) where it is meant for, and AdamW over embeddings, output heads and norms.

    An update's root mean square matches AdamW's (Liu et al. 2025, arXiv 2502.16982), so their rates are of one kind.

    Args:
        model: what requires a gradient is trained.
        lr: peak learning rate of the hidden matrices.
        adamw_lr: that of the rest.
        weight_decay: of both; norms and embeddings have none.
        betas: of AdamW.
    """
    hidden = [weight for weight in hidden_matrices(model) if weight.requires_grad]
    parts: list[Optimizer] = []
    if hidden:
        parts.append(Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    if sum(weight.requires_grad for weight in model.parameters()) > len(hidden):
        parts.append(build_optimizer(model, adamw_lr, weight_decay, betas, without=hidden))
    return Optimizers(parts)


def hidden_matrices(model: nn.Module) -> list[torch.Tensor]:
    """Weights (out, in) of the linear maps between hidden states: all but embeddings and output heads."""
    heads = {id(head.weight) for stack in model.modules() if isinstance(stack, LayerStack) for head in stack.heads}
    linear = (module for module in model.modules() if isinstance(module, nn.Linear))
    return [module.weight for module in linear if id(module.weight) not in heads]
