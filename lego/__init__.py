"""LEGO: language models trained block by block; block 2 learns from the tokens block 1 finds hard (ASHEM).

Names are handed on lazily (PEP 562), so that importing one room of the house does not load all of it.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "StandardTransformer": "model.transformer",
    "DeepSupervisionTransformer": "model.transformer",
    "BaseTransformer": "model.transformer",
    "StageConfig": "training.trainer",
    "TrainingConfig": "training.trainer",
    "create_standard_config": "training.trainer",
    "create_deep_supervision_config": "training.trainer",
    "Trainer": "training.trainer",
    "StepOptions": "training.steps",
    "NonFiniteLossError": "training.steps",
    "ASHEMConfig": "growing.upper_layers",
    "compute_confidence": "mining.thresholds",
    "compute_confidence_threshold": "mining.thresholds",
    "collect_hard_examples": "mining.hard_tokens",
    "create_hard_example_loader": "growing.upper_layers",
    "train_upper_layers": "growing.upper_layers",
    "evaluate_on_hard_examples": "growing.upper_layers",
    "grow_model": "model.checkpoint",
    "save_model": "model.checkpoint",
    "load_model": "model.checkpoint",
    "load_routed": "model.checkpoint",
    "RoutedDecoder": "routing.decoder",
    "Ledger": "model.cost",
    "HiddenStateStore": "mining.hidden_states",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lego' has no attribute {name!r}")
    return getattr(import_module(f"lego.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
