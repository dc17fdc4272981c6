"""Trained Llama checkpoints as block 1: their layers, with their own final norm and head as the exit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from lego.base.artifacts import ArtifactError
from lego.base.given import require_inside, where_from
from lego.model.naming import TOKEN_IDS, from_llama, require_numbers
from lego.model.transformer import DeepSupervisionTransformer

SUPPORTED = (
    "supported are model_type llama and mistral without sliding window, attention and MLP without biases, hidden_act "
    "silu, heads of width hidden_size / num_attention_heads, and rope_type default, linear or llama3"
)


NO_WEIGHTS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # kept by older versions
CHECKED_IDS = 12  # on which a converted model is compared with the original
TOLERANCE = 1e-3  # of a logit, as a share of the largest


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


def _sizes(config: Any, num_layers: int, tied: bool) -> dict[str, Any]:
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
        "tie_embeddings": tied,
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


def _require_readable(key: str, name: str, told: Mapping[str, Any]) -> None:
    """What config.json and the files beside it must not be, before transformers builds anything from them."""
    from transformers import PretrainedConfig
    from transformers.utils import find_adapter_config_file

    require_inside(name)
    found = PretrainedConfig.get_config_dict(name, **told)[0]
    if "auto_map" in found:
        raise ArtifactError(f"{key} brings code of its own (auto_map in config.json), which is not run; {SUPPORTED}")
    try:
        require_numbers(found)
    except ValueError as error:
        raise ArtifactError(f"{key} has a config.json that describes no model: {error}") from None
    if "gguf_file" not in told and find_adapter_config_file(name):
        raise ArtifactError(
            f"{key} has an adapter beside it (adapter_config.json), which is not read; merge the two with peft's "
            "merge_and_unload and save_pretrained, and name that folder"
        )


def _require_whole(key: str, checkpoint: Any, loading: Mapping[str, Any]) -> None:
    """Every weight is there and finite, and none is left over that the configuration does not use."""
    if missing := sorted(loading["missing_keys"]):
        raise ArtifactError(f"{key} lacks {missing[0]}; give a whole model, with its head")
    if wrong := sorted(map(str, loading["mismatched_keys"])):
        raise ArtifactError(f"{key} has {wrong[0]}, of another size than its config.json says; give a whole model")
    unused = [name for name in sorted(loading["unexpected_keys"]) if not name.endswith(NO_WEIGHTS)]
    if unused:
        raise ArtifactError(f"{key} has {unused[0]}, which its architecture does not compute with; {SUPPORTED}")
    for name, tensor in checkpoint.state_dict().items():
        if not tensor.isfinite().all():
            raise ArtifactError(f"{key} has a weight in {name} that is not finite; give another")


def _generation_config(key: str, checkpoint: Any) -> dict[str, Any]:
    """Where the checkpoint stops and starts, and how it samples, as its own generation_config.json says."""
    from transformers import GenerationConfig

    found = checkpoint.generation_config.to_diff_dict()
    for name in TOKEN_IDS:
        if found.get(name) is None and getattr(checkpoint.config, name, None) is not None:
            found[name] = getattr(checkpoint.config, name)
    left_out = {"transformers_version", "_from_model_config", "use_cache", "output_attentions", "output_hidden_states"}
    found = json.loads(json.dumps({name: value for name, value in found.items() if name not in left_out}))
    try:
        GenerationConfig.from_dict(found).validate(strict=True)
    except ValueError:  # transformers reads such settings, warns, and does not write them again
        print(f"{key}: its settings for sampling contradict one another and are left out; its stop ids are kept")
        found = {name: found[name] for name in TOKEN_IDS if name in found}
    return found


@torch.no_grad()
def _require_equal_logits(key: str, model: DeepSupervisionTransformer, checkpoint: Any) -> None:
    """Compares the converted model with the original on a few ids, whatever both were made from.

    Raises:
        ArtifactError: they do not compute the same.
    """
    rows = model.sizes["vocab_size"]
    ids = torch.arange(CHECKED_IDS)[None] * max(1, rows // CHECKED_IDS) % rows  # (1, T), from all over the vocabulary
    checkpoint.eval().model.layers = checkpoint.model.layers[: model.num_layers]
    checkpoint.config.num_hidden_layers = model.num_layers
    ours, theirs = model.eval()(ids), checkpoint(ids, use_cache=False).logits
    model.train()
    apart = float((ours - theirs).abs().max())
    if not apart <= TOLERANCE * max(1.0, float(theirs.abs().max())):  # NaN fails every comparison
        raise ArtifactError(
            f"{key} cannot be converted: its logits differ by {apart:.3g} from those that transformers computes; "
            f"{SUPPORTED}"
        )


def load_llama(
    name: str, num_layers: int | None = None, asked: str = "params.yaml: model.init_from"
) -> DeepSupervisionTransformer:
    """Block 1 from a checkpoint of Llama's architecture, in float32, whose exit is the checkpoint's own.

    Args:
        name: of a model on the hub, a folder that `save_pretrained` wrote, or a file in GGUF format.
        num_layers: only its first layers, read through its final norm and head; default all.
        asked: the parameter that names it, for sentences.

    Raises:
        ArtifactError: it cannot be loaded, has an architecture we do not compute, or too few layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report of missing weights would stand before our sentence
    key = f"{asked} {name}"
    try:
        source, told = where_from(name, key)
        _require_readable(key, source, told)
        config = AutoConfig.from_pretrained(source, **told)
        if what := _unsupported(config):
            raise ArtifactError(f"{key} has {what}; {SUPPORTED}")
        depth = config.num_hidden_layers if num_layers is None else num_layers
        if depth > config.num_hidden_layers:
            raise ArtifactError(
                f"{key} has {config.num_hidden_layers} layers, ashem.phase1_layers asks for {depth}; lower it"
            )
        checkpoint, loading = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **told
        )
        _require_whole(key, checkpoint, loading)
        tensors = checkpoint.state_dict()
        tied = torch.equal(tensors["model.embed_tokens.weight"], tensors["lm_head.weight"])  # whatever the flag says
        model = DeepSupervisionTransformer(**_sizes(config, depth, tied), exit_layer=depth)
        model.load_state_dict(from_llama(tensors, depth, depth))
        _require_equal_logits(key, model, checkpoint)
    except ArtifactError:
        raise
    except Exception as error:  # transformers raises many kinds; each means the same to the user
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ArtifactError(
            f"{key} cannot be loaded as a model ({reason}); give a folder with config.json and model.safetensors, or "
            "the name of a model on the hub, which needs the network"
        ) from None
    model.generation_config = _generation_config(key, checkpoint)
    return model
