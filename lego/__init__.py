"""LEGO: language models trained block by block; block 2 learns from the tokens block 1 finds hard (ASHEM).

Names are handed on lazily (PEP 562), so that importing one room of the house does not load all of it.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "StandardTransformer": "transformer",
    "DeepSupervisionTransformer": "transformer",
    "BaseTransformer": "transformer",
    "StageConfig": "trainer",
    "TrainingConfig": "trainer",
    "create_standard_config": "trainer",
    "create_deep_supervision_config": "trainer",
    "Trainer": "trainer",
    "StepOptions": "steps",
    "NonFiniteLossError": "steps",
    "ASHEMConfig": "ashem",
    "compute_confidence": "exits",
    "compute_confidence_threshold": "exits",
    "collect_hard_examples": "ashem",
    "create_hard_example_loader": "ashem",
    "train_upper_layers": "ashem",
    "evaluate_on_hard_examples": "ashem",
    "grow_model": "checkpoint",
    "save_model": "checkpoint",
    "load_model": "checkpoint",
    "load_routed": "checkpoint",
    "RoutedDecoder": "routing",
    "Ledger": "cost",
    "HiddenStateStore": "hidden_states",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lego' has no attribute {name!r}")
    return getattr(import_module(f"lego.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
