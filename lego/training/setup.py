"""The section `train` of params.yaml made into what a stage trains with: optimizer, schedule, options, compilation."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from lego.base.sections import TrainParams
from lego.model.layers import TransformerLayer
from lego.training.muon import build_muon
from lego.training.steps import StepOptions, build_optimizer, build_scheduler


def build_training(model: nn.Module, lr: float, total_steps: int, train: TrainParams) -> tuple[Optimizer, StepOptions]:
    """Optimizer and step options of a pipeline stage, as the `train` section of params.yaml says.

    Args:
        model: on its device; what requires a gradient is trained.
        lr: peak learning rate.
        total_steps: optimizer steps at which a schedule that falls has fallen.
        train: the section.
    """
    betas = (train.beta1, train.beta2)
    if train.optimizer == "muon":
        optimizer = build_muon(model, lr, train.adamw_lr_ratio * lr, train.weight_decay, betas)
    else:
        optimizer = build_optimizer(model, lr, train.weight_decay, betas)
    shape = (train.warmup_steps, total_steps, train.min_lr_ratio, train.decay_share)
    scheduler = build_scheduler(optimizer, train.schedule, *shape)
    if train.compile:
        compile_layers(model)
    return optimizer, StepOptions(train.grad_clip, train.grad_accumulation, train.precision, scheduler)


def compile_layers(model: nn.Module) -> None:
    """Compiles each Transformer layer for itself, in place."""
    if torch.are_deterministic_algorithms_enabled():
        # tells the compiler too, which loading it would make slow elsewhere
        torch.use_deterministic_algorithms(True)
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            module.compile()
