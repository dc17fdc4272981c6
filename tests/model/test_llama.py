"""Llama checkpoints as block 1: they compute what they did, and what cannot be read is named."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lego.base.artifacts import ArtifactError
from lego.model.llama import load_llama, require_fit

ROPES = [
    {"rope_type": "default", "rope_theta": 5000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 50000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("layers", [None, 2])
@torch.no_grad()
def test_a_checkpoint_as_block_1_computes_what_it_did(tmp_path, rope, layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters=rope,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
    )
    llama = LlamaForCausalLM(config)
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    llama.to(torch.bfloat16).save_pretrained(tmp_path)
    block1 = load_llama(str(tmp_path), layers).eval()
    llama = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    llama.model.layers = llama.model.layers[:layers]
    llama.config.num_hidden_layers = len(llama.model.layers)
    x = torch.randint(0, 60, (2, 200))
    assert torch.equal(block1(x), llama(x).logits)
    assert block1.sizes["context"] == 256
    assert block1.exit_layer == block1.num_layers == (layers or 3)


def test_checkpoints_that_are_not_supported_are_named(tmp_path, checkpoint):
    from transformers import GPT2Config, MistralConfig

    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 10}
    cases = {
        "model_type gpt2; supported are model_type llama and mistral": GPT2Config(n_layer=1),
        "sliding_window 4096; supported are": MistralConfig(**small),
        "attention_bias True": LlamaConfig(**small, attention_bias=True),
        "hidden_act gelu": LlamaConfig(**small, hidden_act="gelu"),
        "head_dim 8": LlamaConfig(**small, head_dim=8),
        "rope_type yarn": LlamaConfig(**small, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
    }
    for sentence, config in cases.items():
        config.save_pretrained(tmp_path)
        with pytest.raises(ArtifactError, match=rf"params\.yaml: model\.init_from \S+ has {sentence}"):
            load_llama(str(tmp_path))
    headless = LlamaForCausalLM(LlamaConfig(**small, intermediate_size=32)).model
    headless.save_pretrained(tmp_path / "headless")
    with pytest.raises(ArtifactError, match=r"headless lacks lm_head\.weight; give a whole model, with its head"):
        load_llama(str(tmp_path / "headless"))
    whole = LlamaForCausalLM(LlamaConfig(**small, intermediate_size=32))
    whole.model.layers[0].mlp.up_proj.weight.data[3, 4] = float("nan")
    whole.save_pretrained(tmp_path / "nan")
    with pytest.raises(
        ArtifactError, match=r"nan has a weight in model\.layers\.0\.mlp\.up_proj\.weight that is not f"
    ):
        load_llama(str(tmp_path / "nan"))
    with pytest.raises(ArtifactError, match=r"has 3 layers, ashem\.phase1_layers asks for 4; lower it"):
        load_llama(str(checkpoint), 4)
    with pytest.raises(ArtifactError, match="nowhere cannot be loaded as a model"):
        load_llama(str(tmp_path / "nowhere"))
    block1 = load_llama(str(checkpoint))
    with pytest.raises(ArtifactError, match="has a vocabulary of 304, the tokenizer of data/tokens one of 305"):
        require_fit(block1, 305, 32)
    with pytest.raises(ArtifactError, match=r"model\.seq_len 65 exceeds the 64 tokens of model\.init_from"):
        require_fit(block1, 300, 65)
