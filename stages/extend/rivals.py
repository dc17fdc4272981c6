"""What users would do with a given model instead of a second block: train all of it, adapters, some of its layers.

Each kind is a model of ours whose trained weights require a gradient, so that all train by one loop, on the same text.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lego.base.harness import StageError
from lego.evaluation.latency import seconds
from lego.model.checkpoint import load_model
from lego.model.transformer import BaseTransformer, DeepSupervisionTransformer
from stages.extend.settings import RivalParams

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def start(entry: RivalParams, block1: str | Path, seed: int) -> BaseTransformer:
    """The given model, ready to be trained.

    Args:
        entry: what is trained of it.
        block1: its folder.
        seed: of new weights.

    Raises:
        StageError: a package is missing, or it has fewer layers than are to be trained.
    """
    torch.manual_seed(seed)
    model = load_model(block1).requires_grad_(False)
    if entry.trains == "all":
        return model.requires_grad_(True)
    assert entry.size is not None
    if entry.trains == "lora":
        adapted(model, entry.size)
        return model
    if entry.size > model.num_layers:
        raise StageError(f"extend.yaml: a rival trains {entry.size} layers, and the model has {model.num_layers}")
    if entry.trains == "last_layers":
        model.layers[-entry.size :].requires_grad_(True)
        return model
    return interleaved(model, entry.size)


def adapted(model: nn.Module, rank: int) -> None:
    """Puts peft's LoRA on all linear layers of a model, in place; `merged` adds it to them.

    Raises:
        StageError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise StageError("extend.yaml: a rival needs peft: pip install -r stages/extend/requirements.txt") from None
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR), model)


def merged(model: BaseTransformer) -> BaseTransformer:
    """The model with its adapters added to the weights they change, in place; any other stays as it is."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, module.base_layer)
    return model


def interleaved(model: BaseTransformer, count: int) -> DeepSupervisionTransformer:
    """The model with copies of some of its layers put behind them, which at first add nothing and alone are trained.

    LLaMA-Pro (Wu et al. 2024, arXiv 2401.02415): layers are cut into `count` groups, and the last of each is copied.
    """
    depth = model.num_layers
    behind = {round(depth * (n + 1) / count) - 1 for n in range(count)}
    order = [layer for layer in range(depth) for _ in range(1 + (layer in behind))]  # of what each new place holds
    new = [place for place in range(1, len(order)) if order[place] == order[place - 1]]
    grown = DeepSupervisionTransformer(**model.sizes | {"num_layers": len(order)}, exit_layer=len(order))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("layers.")}
    for place, layer in enumerate(order):
        for name, tensor in model.layers[layer].state_dict().items():
            nothing = place in new and name.startswith(("self_attn.o_proj", "mlp.down_proj"))
            state[f"layers.{place}.{name}"] = torch.zeros_like(tensor) if nothing else tensor
    grown.load_state_dict(state)
    grown.requires_grad_(False)
    for place in new:
        grown.layers[place].requires_grad_(True)
    return grown


def macs_of(step: Callable[[], object]) -> int:
    """Multiply-accumulates of what is run, counted by torch with dense attention, as lego.model.cost counts."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() // 2


def seconds_of(runs: Sequence[Callable[[], object]], rounds: int = 3) -> list[float]:
    """Median seconds of each run, in turn, after one round to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, taken in zip(runs, times, strict=True):
            taken.append(seconds(run))
    return [statistics.median(taken[1:]) for taken in times]
