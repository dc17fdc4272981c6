"""Llama checkpoints as block 1: they compute what they did, and what cannot be read is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from lego.base.artifacts import ArtifactError, read_json, write_json
from lego.model import llama as module
from lego.model.checkpoint import load_model, save_model
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


SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def small_llama(folder: Path, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[7, 9], pad_token_id=0, temperature=0.5)
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    return model.eval()


def change(file: Path, **changes: object) -> None:
    write_text = json.dumps(json.loads(file.read_text()) | changes)
    file.write_text(write_text)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("said", [True, False])
@torch.no_grad()
def test_whether_the_head_is_the_embedding_is_seen_in_the_tensors(tmp_path, tied, said):
    small_llama(tmp_path, tied)
    if tied and not said:  # a file that has both
        tensors = load_file(tmp_path / "model.safetensors")
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        save_file(tensors | head, tmp_path / "model.safetensors", {"format": "pt"})
    change(tmp_path / "config.json", tie_word_embeddings=said)
    block1, x = load_llama(str(tmp_path)).eval(), torch.randint(0, 60, (2, 20))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(block1(x), theirs(x).logits)
    assert block1.sizes["tie_embeddings"] == (block1.output_head.weight is block1.embedding.weight) == tied


@torch.no_grad()
def test_a_model_folder_whose_flag_is_wrong_keeps_its_embedding(tmp_path, block1):
    save_model(block1, tmp_path)  # untied
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | {"tie_word_embeddings": True})
    x = torch.randint(0, 97, (2, 9))
    assert torch.equal(load_model(tmp_path)(x), block1(x))


NUMBERS = [
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", -1e-6),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", float("inf")),
    ("rope_theta", -1.0),
    ("rope_parameters", {"rope_type": "default", "rope_theta": float("nan")}),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 1.5),
    ("num_attention_heads", 0),
    ("num_key_value_heads", -2),
    ("hidden_size", "many"),
    ("vocab_size", 0),
    ("intermediate_size", True),
    ("max_position_embeddings", -4),
    ("initializer_range", float("nan")),
]


@pytest.mark.parametrize(("field", "value"), NUMBERS)
def test_a_number_with_which_nothing_can_be_computed_is_named(tmp_path, field, value):
    small_llama(tmp_path)
    change(tmp_path / "config.json", **{field: value})
    inner = "rope_theta|factor" if field == "rope_parameters" else field
    with pytest.raises(ArtifactError, match=rf"describes no model: ({inner}) (is no|must be a \w+) number") as error:
        load_llama(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("field", "value"), [one for one in NUMBERS if one[0] not in ("rope_theta",)])
def test_so_it_is_in_a_model_folder(tmp_path, block1, field, value):
    save_model(block1, tmp_path)
    field = "trained_context" if field == "max_position_embeddings" else field
    change(tmp_path / "config.json", **{field: value})
    with pytest.raises(ArtifactError, match=r"config\.json: describes no model \(|does not fit config\.json"):
        load_model(tmp_path)


def test_code_of_a_folder_is_not_run_whatever_stands_on_stdin(tmp_path, monkeypatch):
    small_llama(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    (tmp_path / "evil.py").write_text(code)
    change(tmp_path / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ArtifactError, match=r"brings code of its own \(auto_map in config\.json\), which is not run"):
        load_llama(str(tmp_path))
    change(tmp_path / "config.json", model_type="evil")
    with pytest.raises(ArtifactError, match="brings code of its own"):
        load_llama(str(tmp_path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../model.safetensors", "a/../../model.safetensors"])
def test_an_index_names_no_file_outside_its_folder(tmp_path, name):
    model = small_llama(tmp_path / "given")
    (tmp_path / "given/model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), name)}
    write_json(tmp_path / "given/model.safetensors.index.json", index)
    with pytest.raises(ArtifactError, match=r"index\.json: names the file .* which does not lie in"):
        load_llama(str(tmp_path / "given"))


def test_biases_adapters_and_other_logits_are_named(tmp_path, monkeypatch):
    model = small_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    biased = tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file(biased, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"has model\.layers\.0\.self_attn\.q_proj\.bias, which its architecture"):
        load_llama(str(tmp_path))
    old = tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # holds no weight
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    load_llama(str(tmp_path))
    monkeypatch.setattr(module, "_sizes", lambda *a, real=module._sizes: real(*a) | {"rope_theta": 3.0})
    with pytest.raises(ArtifactError, match=r"cannot be converted: its logits differ by \S+ from those that transf"):
        load_llama(str(tmp_path))
    monkeypatch.undo()
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "x"})
    with pytest.raises(ArtifactError, match=r"has an adapter beside it \(adapter_config\.json\), which is not read"):
        load_llama(str(tmp_path))
    assert model.config.num_hidden_layers == 2
