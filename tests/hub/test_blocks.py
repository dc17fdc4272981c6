"""Several blocks on one base: each answers as the model it was saved from, and the base stays what and where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lego.hf import LegoForCausalLM, to_hf
from lego.hub.block_files import write_block
from lego.model.exit_criteria import StateCriterion
from lego.model.growth import grow_model
from lego.model.llama import load_llama
from lego.model.low_rank import LowRankLinear
from tests.routing.test_gated import gate_of

KINDS = {
    "branch": {"num_layers": 3, "branch_layer": 1},
    "branch and new layers": {"num_layers": 4, "branch_layer": 2, "head": "own"},
    "second pass": {"num_layers": 3, "branch_layer": 0},
    "low rank": {"num_layers": 3, "branch_layer": 0, "branch_rank": 2},
    "on top": {"num_layers": 5, "head": "own"},
    "token": {"num_layers": 4, "block2_context": "token"},
}
X = torch.arange(60).view(2, 30) * 7 % 300


def extended(checkpoint: Path, kind: str, seed: int) -> LegoForCausalLM:
    """The given Llama with a block that learned something, some of whose tokens leave."""
    torch.manual_seed(seed)
    sizes = {"block2_context": "sequence", "init": "copy"} | KINDS[kind]
    model = grow_model(load_llama(str(checkpoint)), **sizes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                torch.nn.init.normal_(module.up.weight, std=0.1)
        for parameter in model.parameters():
            if parameter.requires_grad and "low rank" not in kind:
                parameter += 0.02 * torch.randn_like(parameter)
    gated = seed % 2 == 1
    scorer = StateCriterion(48, 4, reads_logits=gated).requires_grad_(False) if gated else None
    made = to_hf(model, 0.5, "gain" if gated else "max_prob", scorer, gate_of() if gated else None)
    made.calibrate(X, deep_share=0.5)
    return made


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_block_answers_as_the_model_it_was_saved_from(checkpoint, kind, tmp_path):
    first, second = extended(checkpoint, "branch", 0), extended(checkpoint, kind, 1)
    answers = {"default": first(X), "other": second(X)}
    wrote = second.generate(X[:1, :5], max_new_tokens=12, do_sample=False)
    second.save_block(tmp_path / "block")
    base = first.model.layers[0].self_attn.q_proj.weight.data_ptr()
    first.load_block(tmp_path / "block", "other")
    assert first.blocks == ["default", "other"]
    for name in ("other", "default", "other"):
        first.set_block(name)
        assert first.active_block == name
        answer = first(X)
        assert torch.equal(answer.went_deep, answers[name].went_deep)
        torch.testing.assert_close(answer.logits, answers[name].logits, rtol=1e-5, atol=1e-5)
        left = ~answer.went_deep
        assert torch.equal(answer.logits[left], AutoModelForCausalLM.from_pretrained(checkpoint)(X).logits[left])
        assert first.model.layers[0].self_attn.q_proj.weight.data_ptr() == base
    assert torch.equal(first.generate(X[:1, :5], max_new_tokens=12, do_sample=False), wrote)
    first.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(again(X).logits, first(X).logits)
    first.set_block("default")
    first.delete_block("other")
    assert first.blocks == ["default"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_block_and_its_base_make_the_model_again(checkpoint, kind, tmp_path):
    model = extended(checkpoint, kind, 1)
    model.save_block(tmp_path)
    again = LegoForCausalLM.from_block(tmp_path, checkpoint)
    torch.testing.assert_close(again(X).logits, model(X).logits, rtol=1e-5, atol=1e-5)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert (again.blocks, again.active_block) == (["block"], "block")
    half = LegoForCausalLM.from_block(tmp_path, checkpoint, dtype=torch.bfloat16)
    assert half.model.layers[-1].mlp.up_proj.weight.dtype == torch.bfloat16
    assert half.gate.weight.dtype == torch.float32
    half.config.exit_threshold = model.config.exit_threshold = None  # else rounding decides of depths
    torch.testing.assert_close(half(X).logits.float(), model(X).logits, rtol=0.1, atol=0.3)


@torch.no_grad()
def test_changes_of_low_rank_are_stored_as_their_factors(checkpoint, tmp_path):
    sizes = {}
    for kind in ("second pass", "low rank"):
        extended(checkpoint, kind, 0).save_block(tmp_path / kind)
        sizes[kind] = {name: t.numel() for name, t in load_file(tmp_path / kind / "block.safetensors").items()}
    assert not any(name.endswith(".up") for name in sizes["second pass"])
    factors = {name: count for name, count in sizes["low rank"].items() if name.endswith((".up", ".down"))}
    assert len(factors) == 2 * 3 * 5  # of q, o and the MLP in each layer
    assert factors["layers.0.self_attn.q_proj.weight.up"] == 2 * 48
    assert sum(sizes["low rank"].values()) < 0.25 * sum(sizes["second pass"].values())


@torch.no_grad()
def test_each_block_keeps_its_threshold(checkpoint, tmp_path):
    model, other = extended(checkpoint, "branch", 0), extended(checkpoint, "second pass", 2)
    other.config.exit_threshold = 0.25
    other.save_block(tmp_path)
    model.load_block(tmp_path, "other")
    model.config.exit_threshold = 0.125
    model.set_block("other")
    assert model.config.exit_threshold == 0.25
    model.config.exit_threshold = None
    model.set_block("default")
    assert model.config.exit_threshold == 0.125
    model.set_block("other")
    assert model.config.exit_threshold is None


@torch.no_grad()
def test_what_cannot_be_a_block_of_this_base_is_named(checkpoint, tmp_path):
    model, other = extended(checkpoint, "branch", 0), extended(checkpoint, "second pass", 2)
    other.save_block(tmp_path / "block")
    with pytest.raises(ValueError, match="there is no block x; there are default"):
        model.set_block("x")
    with pytest.raises(ValueError, match="there is a block default already"):
        model.load_block(tmp_path / "block", "default")
    with pytest.raises(ValueError, match=r"llama: holds no block\.safetensors; save_block writes one"):
        model.load_block(tmp_path / "llama", "x")
    with pytest.raises(ValueError, match="block default is active; set another one first"):
        model.delete_block("default")
    llama = LlamaForCausalLM.from_pretrained(checkpoint)
    llama.model.layers[1].mlp.up_proj.weight.mul_(1.2)
    llama.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="is a block of another base, whose weights differ"):
        LegoForCausalLM.from_block(tmp_path / "block", tmp_path / "llama")
    file = tmp_path / "block/block.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"layers.9.x": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"block\.safetensors: is not as save_block wrote it; take it again"):
        model.load_block(tmp_path / "block", "x")
    write_block(file.parent, tensors | {"layers.9.x": torch.ones(1)}, other.config)
    with pytest.raises(ValueError, match=r"safetensors: has layers\.9\.x, which its configuration does not know"):
        model.load_block(tmp_path / "block", "x")
    name = "layers.1.mlp.up_proj.weight"
    for wrong in ({}, {name: torch.ones(2, 2)}):
        write_block(file.parent, {key: t for key, t in tensors.items() if key != name} | wrong, other.config)
        with pytest.raises(ValueError, match=r"lacks layers\.1\.mlp\.up_proj\.weight as its configuration has it"):
            model.load_block(tmp_path / "block", "x")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"block\.safetensors: is not as save_block wrote it"):
        model.load_block(tmp_path / "block", "x")
    assert model.blocks == ["default"]
    small = LlamaForCausalLM(LlamaConfig(vocab_size=304, hidden_size=48, num_attention_heads=4, num_hidden_layers=2))
    small.save_pretrained(tmp_path / "small")
    other.save_block(tmp_path / "block")
    with pytest.raises(ValueError, match="is a block of a base with exit_layer 3, this one has 2; give that base"):
        LegoForCausalLM.from_block(tmp_path / "block", tmp_path / "small")


@torch.no_grad()
def test_a_base_that_was_trained_on_is_another(checkpoint, tmp_path):
    model = extended(checkpoint, "branch", 0)
    for parameter in model.model.layers[0].parameters():
        parameter.mul_(1 + 1e-5)
    model.save_block(tmp_path)
    with pytest.raises(ValueError, match="is a block of another base, whose weights differ"):
        LegoForCausalLM.from_block(tmp_path, checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.no_grad()
def test_the_smallest_step_of_training_is_kept(checkpoint, dtype, tmp_path):
    """A change of one last place here and there is no more than what rounding does, and may be all that was learned."""
    extended(checkpoint, "branch", 0).save_block(tmp_path / "block")
    model = LegoForCausalLM.from_block(tmp_path / "block", checkpoint, dtype=dtype)
    weight = model.model.layers[3].mlp.up_proj.weight
    weight.copy_(model.model.layers[1].mlp.up_proj.weight)  # as a branch layer begins
    for at in range(0, weight.numel(), 37):
        value = weight.view(-1)[at]
        weight.view(-1)[at] = value * (1 + 2 * torch.finfo(dtype).eps)
    model.save_block(tmp_path / "block")
    again = LegoForCausalLM.from_block(tmp_path / "block", checkpoint, dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@torch.no_grad()
def test_what_is_set_for_the_whole_model_reaches_a_block_that_is_set_later(checkpoint, tmp_path):
    other = extended(checkpoint, "on top", 0)
    other.save_block(tmp_path / "block")
    model = extended(checkpoint, "branch", 0)
    model.load_block(tmp_path / "block", "other")
    model.resize_token_embeddings(320)
    model.set_attn_implementation("eager")
    model.gradient_checkpointing_enable()
    model.set_block("other")
    assert model(X).logits.shape[-1] == 320
    model.config.exit_threshold = other.config.exit_threshold = None  # 16 new logits change the exit's scores
    torch.testing.assert_close(model(X).logits[..., :300], other(X).logits[..., :300], rtol=1e-4, atol=1e-4)
    above = model.model.layers[-1]
    assert above.gradient_checkpointing
    assert above.self_attn.config._attn_implementation == "eager"
    assert model(X, output_attentions=True).attentions[-1] is not None
    model.to(torch.bfloat16)
    model.set_block("default")
    assert model.model.layers[-1].mlp.up_proj.weight.dtype == torch.bfloat16


def test_an_adapter_is_merged_first(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    model = extended(checkpoint, "branch", 0)
    model.save_block(tmp_path / "block")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    for call in (lambda: model.save_block(tmp_path), lambda: model.load_block(tmp_path / "block", "x")):
        with pytest.raises(ValueError, match="an adapter of peft lies on the model; merge_and_unload it first"):
            call()


@torch.no_grad()
def test_a_block_trains_while_the_base_stays(checkpoint, tmp_path):
    model = extended(checkpoint, "branch", 0)
    extended(checkpoint, "second pass", 2).save_block(tmp_path)
    model.load_block(tmp_path, "other")
    model.set_block("other")
    model.freeze_block1()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.enable_grad():
        model.train()(input_ids=X, labels=X).loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter -= 0.1 * parameter.grad
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(re_block(name) for name in changed)


def re_block(name: str) -> bool:
    """Whether a weight lies above the exit of 3 layers."""
    return name.startswith("model.norm") or (name.startswith("model.layers.") and int(name.split(".")[2]) >= 3)
