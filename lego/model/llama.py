"""Trained Llama checkpoints as block 1: their layers, with their own final norm and head as the exit."""

from __future__ import annotations

from typing import Any

import torch

from lego.base.artifacts import ArtifactError
from lego.model.naming import from_llama
from lego.model.transformer import DeepSupervisionTransformer

SUPPORTED = (
    "supported are model_type llama and mistral without sliding window, attention and MLP without biases, hidden_act "
    "silu, heads of width hidden_size / num_attention_heads, and rope_type default, linear or llama3"
)


def _unsupported(config: Any) -> str | None:
    """What of a transformers configuration we do not compute; None if all is well."""
    if config.model_type not in ("llama", "mistral"):
        return f"model_type {config.model_type}"
    wanted = {"sliding_window": None, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    for key, value in wanted.items():
        if getattr(config, key, value) != value:
            return f"{key} {getattr(config, key)}"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size or head_dim % 2:
        return f"head_dim {head_dim}"
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    return None if rope_type in ("default", "linear", "llama3") else f"rope_type {rope_type}"


def _sizes(config: Any, num_layers: int) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    return {
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "num_layers": num_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "ffn_dim": config.intermediate_size,
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "norm_eps": config.rms_norm_eps,
        "init_std": config.initializer_range,
        "tie_embeddings": config.tie_word_embeddings,
        "context": config.max_position_embeddings,
    }


def require_fit(model: DeepSupervisionTransformer, vocab_size: int, seq_len: int) -> None:
    """Refuses text that the checkpoint cannot read.

    Args:
        model: as loaded.
        vocab_size: ids of the tokenizer that encoded the text; checkpoints may have more rows than that.
        seq_len: tokens per block.

    Raises:
        ArtifactError: the tokenizer has ids that the checkpoint lacks, or blocks are longer than its context.
    """
    have, context = model.sizes["vocab_size"], model.sizes["context"]
    if vocab_size > have:
        raise ArtifactError(
            f"params.yaml: model.init_from has a vocabulary of {have}, the tokenizer of data/tokens one of "
            f"{vocab_size}; let data.pretrained be its own, or null"
        )
    if seq_len > context:
        raise ArtifactError(f"params.yaml: model.seq_len {seq_len} exceeds the {context} tokens of model.init_from")


def load_llama(name: str, num_layers: int | None = None) -> DeepSupervisionTransformer:
    """Block 1 from a checkpoint of Llama's architecture, in float32, whose exit is the checkpoint's own.

    Args:
        name: of a model on the hub, or a folder that `save_pretrained` wrote.
        num_layers: only its first layers, read through its final norm and head; default all.

    Raises:
        ArtifactError: it cannot be loaded, has an architecture we do not compute, or too few layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report of missing weights would stand before our sentence
    key = f"params.yaml: model.init_from {name}"
    try:
        config = AutoConfig.from_pretrained(name)
        if what := _unsupported(config):
            raise ArtifactError(f"{key} has {what}; {SUPPORTED}")
        depth = config.num_hidden_layers if num_layers is None else num_layers
        if depth > config.num_hidden_layers:
            raise ArtifactError(
                f"{key} has {config.num_hidden_layers} layers, ashem.phase1_layers asks for {depth}; lower it"
            )
        checkpoint, loading = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        if missing := sorted(loading["missing_keys"]):
            raise ArtifactError(f"{key} lacks {missing[0]}; give a whole model, with its head")
        for tensor_name, tensor in checkpoint.state_dict().items():
            if not tensor.isfinite().all():
                raise ArtifactError(f"{key} has a weight in {tensor_name} that is not finite; give another")
    except ArtifactError:
        raise
    except Exception as error:  # transformers raises many kinds; each means the same to the user
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ArtifactError(
            f"{key} cannot be loaded as a model ({reason}); give a folder with config.json and model.safetensors, or "
            "the name of a model on the hub, which needs the network"
        ) from None
    model = DeepSupervisionTransformer(**_sizes(config, depth), exit_layer=depth)
    model.load_state_dict(from_llama(checkpoint.state_dict(), depth, depth))
    return model
