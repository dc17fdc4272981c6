"""Model folders: the same model comes back, a damaged one is named; and what growing a model makes of block 1."""

from __future__ import annotations

import pytest
import torch

from lego import DeepSupervisionTransformer, StandardTransformer, grow_model, load_model, load_routed, save_model
from lego.base.artifacts import ArtifactError, atomic_folder, read_json, sha256, write_json, write_tensors
from tests.conftest import VOCAB, logits_close, random_batches


@torch.no_grad()
def test_zero_initialised_layers_leave_the_logits_and_copies_repeat_block_1(block1):
    x = random_batches(1)[0][0]
    for context in ("full", "token"):
        zero = grow_model(block1, 5, init="zero", block2_context=context)
        logits_close(zero(x), block1(x), 1e-6)
    for layers, pairs in ((5, ((2, 1), (3, 0), (4, 1))), (4, ((2, 0), (3, 1))), (3, ((2, 1),))):
        copied = grow_model(block1, layers, init="copy")  # the last new one is a copy of block 1's last
        for new, old in pairs:
            for name, tensor in copied.layers[new].state_dict().items():
                source = block1.layers[1 if name.startswith("exit_norm") else old]
                assert torch.equal(tensor, source.state_dict()[name])
    fresh = grow_model(block1, 4, init="random")
    assert not torch.equal(fresh.layers[2].mlp.up_proj.weight, block1.layers[0].mlp.up_proj.weight)


def test_growing_refuses_what_it_cannot_do(block1):
    for arguments, message in (
        (dict(num_layers=2), "num_layers must exceed block 1's 2, got 2"),
        (dict(num_layers=4, init="ones"), "init must be one of copy, zero, random, got 'ones'"),
        (dict(num_layers=4, head="none"), "head must be shared, own or shared_trainable, got 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            grow_model(block1, **arguments)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["standard", "routed", "own head"])
def test_a_saved_model_is_the_same_model(tmp_path, tied, kind):
    if kind == "standard":
        model = StandardTransformer(VOCAB, 32, 2, 4, tie_embeddings=tied, num_kv_heads=2, rope_theta=123.0)
    else:
        block1 = DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2, tie_embeddings=tied)
        head = "own" if kind == "own head" else "shared"
        model = grow_model(block1, 3, routing_threshold=0.25, block2_context="token", head=head)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.sizes == model.sizes
    x = torch.randint(0, VOCAB, (2, 6))
    assert torch.equal(loaded(x), model(x))
    for name in ("exit_layer", "routing_threshold", "block2_context"):
        assert getattr(loaded, name, None) == getattr(model, name, None)
    assert (loaded.output_head.weight is loaded.embedding.weight) == tied
    first = sha256(tmp_path)
    save_model(loaded, tmp_path)
    assert sha256(tmp_path) == first


def test_a_damaged_model_folder_is_named(tmp_path):
    save_model(StandardTransformer(VOCAB, 32, 1, 4), tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"hidden_size": 64})
    with pytest.raises(ArtifactError, match=r"model\.safetensors: does not fit config\.json"):
        load_model(tmp_path)
    write_json(tmp_path / "config.json", {"vocab_size": 3})
    with pytest.raises(ArtifactError, match=r"config\.json: describes no model"):
        load_model(tmp_path)
    write_json(tmp_path / "config.json", config)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: cannot be read as safetensors"):
        load_model(tmp_path)
    save_model(StandardTransformer(VOCAB, 32, 1, 4, tie_embeddings=True), tmp_path)
    write_tensors(tmp_path / "model.safetensors", {"other": torch.zeros(1)})
    with pytest.raises(ArtifactError, match=r"model\.safetensors: does not fit config\.json"):
        load_model(tmp_path)


def test_a_grown_model_starts_with_block_1s_function(tmp_path):
    block1 = DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2)
    grown = grow_model(block1, 4)
    x = torch.randint(0, VOCAB, (2, 6))
    logits_close(grown.forward_train(x)["shallow_logits"], block1(x), 0)


def test_a_published_model_is_read_as_it_was_written_or_not_at_all(tmp_path, block1):
    tokenizer = tmp_path / "tokens" / "tokenizer"
    with atomic_folder(tmp_path / "tokens") as folder:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_text('{"model": "whole"}')
    model = tmp_path / "phase1"
    with atomic_folder(model) as folder:
        save_model(block1, folder, tokenizer)
    x = torch.randint(0, VOCAB, (2, 6))
    assert torch.equal(load_routed(model).model(x), block1(x))
    for name, read in (("model.safetensors", load_model), ("config.json", load_model), ("tokenizer.json", load_routed)):
        file = model / name
        before = file.read_bytes()
        file.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
        with pytest.raises(ArtifactError, match=f"{name}: is not as it was written; take it again"):
            read(model)
        file.write_bytes(before)
    (tokenizer / "tokenizer.json").write_text('{"model": "whale"}')
    (tmp_path / "phase2").mkdir()
    with pytest.raises(ArtifactError, match=r"tokens/tokenizer/tokenizer\.json: is not as it was written"):
        save_model(block1, tmp_path / "phase2", tokenizer)
