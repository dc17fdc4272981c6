"""Llama checkpoints in one file of llama.cpp: read as transformers reads them, or named."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from lego.base import given
from lego.base.artifacts import ArtifactError
from lego.model.llama import load_llama
from tests.model.test_llama import small_llama

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: LlamaForCausalLM, file: Path) -> None:
    """As llama.cpp's converter writes it: rows of queries and keys in the order of its rotation."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(7)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        part, values = name.removesuffix(".weight"), tensor.numpy()
        if part.startswith("model.layers."):
            number, part = part.removeprefix("model.layers.").split(".", 1)
            if part.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if "q_" in part else config.num_key_value_heads
                halves = values.reshape(heads, 2, len(values) // heads // 2, -1)
                values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
            part = f"blk.{number}.{GGUF_NAMES[part]}"
        writer.add_tensor(f"{names.get(part, part)}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_gguf_file_is_read_as_transformers_reads_it(tmp_path):
    pytest.importorskip("gguf")
    model, x = small_llama(tmp_path), torch.randint(0, 60, (2, 20))
    write_gguf(model, tmp_path / "tiny.gguf")
    block1 = load_llama(str(tmp_path / "tiny.gguf")).eval()
    torch.testing.assert_close(block1(x), model(x).logits)
    assert block1.generation_config == {"eos_token_id": 7, "bos_token_id": 1}  # the latter is that of all Llamas


def test_a_gguf_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(ArtifactError, match=r"model\.init_from nowhere\.gguf is no file"):
        load_llama("nowhere.gguf")
    if find_spec("gguf"):
        with pytest.raises(ArtifactError, match="cannot be loaded as a model"):
            load_llama(str(tmp_path / "x.gguf"))
    monkeypatch.setattr(given, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match=r"x\.gguf needs the package gguf, which reads it: pip install gguf"):
        load_llama(str(tmp_path / "x.gguf"))
