"""Hugging Face's names for our models: fields of config.json, and tensors as Llama calls them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lego.model.transformer import BaseTransformer, DeepSupervisionTransformer, StandardTransformer

FIELDS = {  # our argument -> Hugging Face's field
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
    "own_head": "own_head",
    "context": "trained_context",
}
COUNTS = {  # whole numbers of at least 1, and at most this many: more would fill memory before weights are compared
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "num_hidden_layers": 2**14,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "intermediate_size": 2**22,
    "head_dim": 2**16,
    "max_position_embeddings": 2**30,
    "trained_context": 2**30,
    "original_max_position_embeddings": 2**30,
    "exit_layer": 2**14,
}
TINY = 1e-30  # the least number that is not nothing in single precision arithmetic
LOWEST = {  # of finite numbers
    "rms_norm_eps": TINY,
    "rope_theta": TINY,
    "factor": TINY,
    "low_freq_factor": TINY,
    "high_freq_factor": TINY,
    "initializer_range": 0.0,
}
OPTIONAL = {  # may be null
    "trained_context",
    "head_dim",
    "num_key_value_heads",
    "max_position_embeddings",
    "original_max_position_embeddings",
}
ROUTING_FIELDS = ("exit_layer", "routing_threshold", "block2_context")
TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
ROUTED = "LegoForCausalLM"  # architecture of folders that lego.hf writes


def config_of(model: BaseTransformer) -> dict[str, Any]:
    """What config.json says of a model."""
    sizes = model.sizes
    config: dict[str, Any] = {field: sizes[name] for name, field in FIELDS.items()}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": sizes["rope_theta"]} | (
        sizes["rope_scaling"] or {}
    )
    config |= {"model_type": "lego", "architectures": [type(model).__name__]}
    if isinstance(model, DeepSupervisionTransformer):
        config |= {name: getattr(model, name) for name in ROUTING_FIELDS}
        if model.branches:
            config["branch_layer"] = model.branch_layer
        if later := model.blocks[1:]:
            config["later_blocks"] = [[block.layers, block.repeats] for block in later]
    return config


def require_numbers(config: Mapping[str, Any]) -> None:
    """Refuses sizes, counts and constants of a config.json with which nothing can be computed.

    Args:
        config: with Hugging Face's field names; fields that are not there are not missed.

    Raises:
        ValueError: a field is no number, or not a positive finite one, or one beyond what a model can have.
    """
    rope: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):  # the latter in files of older versions
        if isinstance(found := config.get(name), Mapping):
            rope |= found
    for field, value in {**rope, **config}.items():
        known = field in COUNTS or field in LOWEST
        if not known or (value is None and field in OPTIONAL):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{field} is no number")
        if field in COUNTS:
            if not (1 <= value <= COUNTS[field] and value == int(value)):
                raise ValueError(f"{field} must be a whole number from 1 to {COUNTS[field]:,}, got {value!r:.40}")
        elif not (LOWEST[field] <= value < math.inf):  # NaN fails every comparison
            raise ValueError(f"{field} must be a finite number of at least {LOWEST[field]:g}, got {value!r:.40}")


def sizes_of(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model from Hugging Face's fields.

    Raises:
        KeyError: a field is missing.
        ValueError: a number is none that a model can have.
    """
    rope = config["rope_parameters"]
    require_numbers(config)
    sizes = {name: config[field] for name, field in FIELDS.items()}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return sizes | {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
    }


def model_of(config: dict[str, Any]) -> BaseTransformer:
    """A model with new weights, as config.json describes it.

    Raises:
        KeyError, TypeError, ValueError: it describes none.
    """
    sizes = sizes_of(config)
    if config["architectures"] == [ROUTED]:
        by_confidence = config["exit_criterion"] == "max_prob"  # the only criterion that the model itself knows
        threshold = (config["exit_threshold"] or 0.0) if by_confidence else 0.0
        routing = {"exit_layer": config["exit_layer"], "block2_context": config["block2_context"]}
        routing["branch_layer"] = config.get("branch_layer")
        return DeepSupervisionTransformer(**sizes, **routing, routing_threshold=threshold)
    if config["architectures"] == [DeepSupervisionTransformer.__name__]:
        routing = {name: config[name] for name in ROUTING_FIELDS} | {"branch_layer": config.get("branch_layer")}
        routing["later_blocks"] = config.get("later_blocks", ())
        return DeepSupervisionTransformer(**sizes, **routing)
    return StandardTransformer(**sizes)


def is_tied(tensors: Mapping[str, Tensor], said: bool) -> bool:
    """Whether the output head is the embedding: the tensors decide, whatever the file says of them.

    Args:
        tensors: under our names.
        said: `tie_word_embeddings`, which counts where both are there and equal, or where the head is missing.
    """
    embedding, head = tensors.get("embedding.weight"), tensors.get("output_head.weight")
    return said if embedding is None or head is None else said and torch.equal(embedding, head)


def to_llama(tensors: dict[str, Tensor], num_layers: int, exit_layer: int) -> dict[str, Tensor]:
    """Our tensors under Llama's names: the last layer's exit norm is the final norm, the exit's is `exit_norm`.

    Norms of layers that nothing is read from are left out.
    """
    renamed = {}
    for name, tensor in tensors.items():
        if name == f"layers.{num_layers - 1}.exit_norm.weight":
            renamed["model.norm.weight"] = tensor
        if name == f"layers.{exit_layer - 1}.exit_norm.weight":
            renamed["exit_norm.weight"] = tensor
        elif name == "embedding.weight":
            renamed["model.embed_tokens.weight"] = tensor
        elif name == "output_head.weight":
            renamed["lm_head.weight"] = tensor
        elif name.startswith("layers.") and "exit_norm" not in name:
            renamed[f"model.{name}"] = tensor
        elif "exit_norm" not in name:
            renamed[name] = tensor
    return renamed


def from_llama(tensors: dict[str, Tensor], num_layers: int, exit_layer: int) -> dict[str, Tensor]:
    """Llama's tensors under our names; norms of layers that nothing is read from are one.

    Args:
        tensors: of a Llama, or of a LegoForCausalLM, which has an `exit_norm`.
        num_layers: how many of its layers are taken.
        exit_layer: whose norm `exit_norm` is.
    """
    final = tensors["model.norm.weight"]
    ours = {f"layers.{index}.exit_norm.weight": torch.ones_like(final) for index in range(num_layers)}
    ours[f"layers.{num_layers - 1}.exit_norm.weight"] = final
    for name, tensor in tensors.items():
        if name == "exit_norm.weight":
            ours[f"layers.{exit_layer - 1}.exit_norm.weight"] = tensor
        elif name == "model.embed_tokens.weight":
            ours["embedding.weight"] = tensor
        elif name == "lm_head.weight":
            ours["output_head.weight"] = tensor
        elif name.startswith("model.layers."):
            if int(name.split(".")[2]) < num_layers:
                ours[name.removeprefix("model.")] = tensor
        elif name == "deep_head.weight":
            ours[name] = tensor
    return ours
