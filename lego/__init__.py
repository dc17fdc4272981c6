"""LEGO: language models trained block by block; block 2 learns from the tokens block 1 finds hard (ASHEM).

Models
    StandardTransformer            a plain decoder, equal to Llama
    DeepSupervisionTransformer     a decoder whose easy tokens may leave at an exit
    BaseTransformer                what both are: every layer can be read as logits

Training
    Trainer                        trains with losses at chosen layers, stops early, evaluates
    TrainingConfig                 where loss is computed and where inference stops
    StageConfig                    layers that each have a loss, and its weight
    create_standard_config         a loss at the last layer alone
    create_deep_supervision_config a loss at every layer, of equal weight
    StepOptions                    clipping, accumulation, precision and schedule of a step
    NonFiniteLossError             a loss or gradient that is not finite, with its step

Mining
    compute_confidence             largest probability at the exit
    compute_confidence_threshold   the confidence below which a given share of tokens lies
    collect_hard_examples          tokens below the threshold, with their exit states
    HiddenStateStore               whole blocks on disk, with their exit states and which tokens are hard

Growing
    ASHEMConfig                    the method's own numbers
    grow_model                     untrained layers on top of a trained block 1
    add_block                      one more block on top of two or more
    create_hard_example_loader     shuffled batches of hard tokens
    train_upper_layers             block 2 on every hard token once
    evaluate_on_hard_examples      perplexity of the full depth on hard tokens

Routing and cost
    RoutedDecoder                  reads tokens, each to its depth, with a cache
    Ledger                         multiply-accumulates of a token at each exit, and of training

Files
    save_model                     writes a model folder
    load_model                     reads one
    load_routed                    reads one with how its tokens are routed: threshold and criterion

Names are handed on lazily (PEP 562), so that importing one room of the house does not load all of it.
"""

from importlib import import_module
from typing import Any

_HOME = {
    # models
    "StandardTransformer": "model.transformer",
    "DeepSupervisionTransformer": "model.transformer",
    "BaseTransformer": "model.transformer",
    # training
    "Trainer": "training.trainer",
    "TrainingConfig": "training.trainer",
    "StageConfig": "training.trainer",
    "create_standard_config": "training.trainer",
    "create_deep_supervision_config": "training.trainer",
    "StepOptions": "training.steps",
    "NonFiniteLossError": "training.steps",
    # mining
    "compute_confidence": "mining.thresholds",
    "compute_confidence_threshold": "mining.thresholds",
    "collect_hard_examples": "mining.hard_tokens",
    "HiddenStateStore": "mining.hidden_states",
    # growing
    "ASHEMConfig": "growing.upper_layers",
    "grow_model": "model.growth",
    "add_block": "model.growth",
    "create_hard_example_loader": "growing.upper_layers",
    "train_upper_layers": "growing.upper_layers",
    "evaluate_on_hard_examples": "growing.upper_layers",
    # routing and cost
    "RoutedDecoder": "routing.decoder",
    "Ledger": "model.cost",
    # files
    "save_model": "model.checkpoint",
    "load_model": "model.checkpoint",
    "load_routed": "model.checkpoint",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lego' has no attribute {name!r}")
    return getattr(import_module(f"lego.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
