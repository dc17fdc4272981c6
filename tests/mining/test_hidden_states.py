"""The store: whole blocks on disk, the flattened view, refusals."""

from __future__ import annotations

import pytest
import torch

from lego import DeepSupervisionTransformer, HiddenStateStore, collect_hard_examples, compute_confidence_threshold
from lego.base.artifacts import ArtifactError, read_json, write_json
from lego.mining.hard_tokens import exit_states
from lego.mining.hidden_states import StoreWriter
from tests.conftest import VOCAB, random_batches


def random_block1() -> DeepSupervisionTransformer:
    torch.manual_seed(0)
    model = DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


@pytest.fixture(scope="module")
def model() -> DeepSupervisionTransformer:
    return random_block1()


DATA = random_batches(10, seed=4)  # 10 batches of 4 blocks of 12 tokens


def write(folder, model, dtype="float32", shard_tokens=100, ratio=0.5, layer=None, keys_values=False):
    threshold = compute_confidence_threshold(model, DATA, ratio, "cpu")
    writer = StoreWriter(folder, threshold, dtype, shard_tokens)
    for batch in exit_states(model, DATA, "cpu", layer, keys_values):
        writer.add(*batch)
    facts = {} if layer is None else {"layer": layer, "keys_values": keys_values}
    writer.close(split="train", block1_sha256="b", tokenizer_sha256="t", macs=1, **facts)
    return HiddenStateStore(folder), threshold


def test_the_store_holds_whole_blocks_and_its_flat_view_equals_the_api(tmp_path, model):
    store, threshold = write(tmp_path, model)
    assert [shard["blocks"] for shard in store.shards] == [12, 12, 12, 4]
    shard = store.read_shard(0)
    assert shard["exit_states"].shape == (12, 12, 32)
    assert torch.equal(shard["hard"], shard["confidences"] < threshold)
    flat = collect_hard_examples(model, DATA, threshold, "cpu")
    stored = [store.hard_examples(index) for index in range(len(store.shards))]
    for key, tensor in flat.items():
        assert torch.equal(torch.cat([part[key] for part in stored]), tensor)
    assert store.hard_tokens == len(flat["targets"]) == 240
    assert store.manifest["tokens"] == 480
    assert store.manifest["relative_error"] == 0.0


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_has_the_error_its_manifest_states(tmp_path, model, dtype, bound):
    (tmp_path / "half").mkdir()
    (tmp_path / "full").mkdir()
    half, _ = write(tmp_path / "half", model, dtype)
    full, _ = write(tmp_path / "full", model)
    exact, rounded = (torch.cat([s.read_shard(i)["exit_states"].double() for i in range(4)]) for s in (full, half))
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert half.manifest["relative_error"] == pytest.approx(error, rel=1e-6)
    assert 0 < error < bound


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    writer = StoreWriter(tmp_path, 0.5, "float16", 100)
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ArtifactError, match="store_dtype float16 cannot hold an exit state of magnitude 100000"):
        writer.add(ids, ids, torch.full((1, 2, 4), 1e5), torch.zeros(1, 2))


def test_a_store_of_another_model_or_tokenizer_is_refused(tmp_path, model):
    store, _ = write(tmp_path, model)
    store.verify("b", "t")
    with pytest.raises(ArtifactError, match="was made by another block1; run dvc repro collect_hard"):
        store.verify("x", "t")
    with pytest.raises(ArtifactError, match="was made by another tokenizer"):
        store.verify("b", "x")


def test_a_damaged_store_is_refused(tmp_path, model):
    store, _ = write(tmp_path, model)
    shard = tmp_path / store.shards[1]["file"]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"shard-00001.safetensors: was changed"):
        store.verify("b", "t")
    shard.write_bytes(content[:-9])
    with pytest.raises(ArtifactError, match=r"shard-00001.safetensors: cannot be read as safetensors"):
        store.read_shard(1)
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"shard-00001.safetensors: is missing"):
        store.verify("b", "t")
    manifest = read_json(tmp_path / "manifest.json")
    write_json(tmp_path / "manifest.json", manifest | {"hard_tokens": 1})
    with pytest.raises(ArtifactError, match="its counts disagree"):
        HiddenStateStore(tmp_path)
    del manifest["threshold"]
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(ArtifactError, match="lacks threshold; take it again"):
        HiddenStateStore(tmp_path)


def test_a_manifest_names_no_file_outside_its_folder(tmp_path, model):
    (tmp_path / "store").mkdir()
    store, _ = write(tmp_path / "store", model)
    store.shards[0]["file"] = "../secret.safetensors"
    for read in (lambda: store.verify("b", "t"), lambda: store.read_shard(0), lambda: store.hard_counts(0)):
        with pytest.raises(ArtifactError, match=r"manifest\.json: names the file '\.\./secret\.safetensors', which"):
            read()


def test_no_hard_token_is_an_error_before_the_manifest(tmp_path):
    writer = StoreWriter(tmp_path, 0.1, "float32", 100)
    ids = torch.zeros(1, 2, dtype=torch.long)
    writer.add(ids, ids, torch.zeros(1, 2, 4), torch.ones(1, 2))
    with pytest.raises(ArtifactError, match="no hard token: no confidence lies below the threshold"):
        writer.close()
    assert not (tmp_path / "manifest.json").exists()
