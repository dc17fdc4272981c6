"""The store: whole blocks on disk, the flattened view, endless shuffled batches, refusals."""

from __future__ import annotations

import weakref

import pytest
import torch

from lego import DeepSupervisionTransformer, HiddenStateStore, collect_hard_examples, compute_confidence_threshold
from lego.base.artifacts import ArtifactError, read_json, write_json
from lego.growing.hard_batches import HardBlockBatches, HardTokenBatches
from lego.mining.hard_tokens import exit_states
from lego.mining.hidden_states import StoreWriter
from tests.conftest import VOCAB, random_batches


@pytest.fixture(scope="module")
def model() -> DeepSupervisionTransformer:
    torch.manual_seed(0)
    model = DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


DATA = random_batches(10, seed=4)  # 10 batches of 4 blocks of 12 tokens


def write(folder, model, dtype="float32", shard_tokens=100, ratio=0.5):
    threshold = compute_confidence_threshold(model, DATA, ratio, "cpu")
    writer = StoreWriter(folder, threshold, dtype, shard_tokens)
    for batch in exit_states(model, DATA, "cpu"):
        writer.add(*batch)
    writer.close(split="train", block1_sha256="b", tokenizer_sha256="t", macs=1)
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


def epoch(store, number, batch_size=50, tokens=120, seed=3):
    batches = HardTokenBatches(store, batch_size, tokens, seed)
    batches.set_epoch(number)
    return list(batches)


def test_two_passes_of_the_stream_hold_every_hard_token_twice(tmp_path, model):
    store, _ = write(tmp_path, model)
    parts = [batch for number in range(8) for batch in epoch(store, number, batch_size=20, tokens=60)]  # 480 = 2 * 240
    assert {h.shape for h, _ in parts} == {(20, 1, 32)}
    states = torch.cat([h[:, 0] for h, _ in parts])
    everything = torch.cat([store.hard_examples(i)["hidden_states"] for i in range(4)])
    for number in range(2):
        one_pass = states[number * 240 : (number + 1) * 240]
        assert torch.equal(one_pass.sum(1).sort().values, everything.sum(1).sort().values)
    assert not torch.equal(states[:240], states[240:])


def test_an_epoch_can_be_had_without_those_before_it(tmp_path, model):
    store, _ = write(tmp_path, model)
    running = HardTokenBatches(store, 50, 120, seed=3)
    for number in range(5):
        running.set_epoch(number)
        for (a, b), (c, d) in zip(running, epoch(store, number), strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
    assert not torch.equal(epoch(store, 0)[0][0], epoch(store, 0, seed=4)[0][0])
    assert (running.streamed(1), running.seen(2)) == (150, [150, 300])  # whole batches


def test_blocks_come_whole_shuffled_and_counted(tmp_path, model):
    store, threshold = write(tmp_path, model)
    batches = HardBlockBatches(store, batch_size=30, tokens_per_epoch=60, seed=3)
    assert (batches.blocks, len(batches)) == (5, 2)  # 6 of 12 tokens are hard, on average
    seen, blocks = 0, []
    for number in range(4):  # 40 blocks: one pass
        batches.set_epoch(number)
        for h, hard, y in batches:
            assert (h.shape, hard.shape, y.shape) == ((5, 12, 32), (5, 12), (5, 12))
            assert h.untyped_storage().nbytes() == h.numel() * 4
            assert torch.equal(model.compute_confidence(h) < threshold, hard)
            seen += int(hard.sum())
            blocks += list(h)
        assert (batches.streamed(number + 1), batches.seen(number + 1)[-1]) == ((number + 1) * 120, seen)
    assert seen == store.hard_tokens
    stored = torch.cat([store.read_shard(index)["exit_states"] for index in range(4)])
    assert torch.equal(torch.stack(blocks).sum((1, 2)).sort().values, stored.sum((1, 2)).sort().values)
    again = HardBlockBatches(store, batch_size=30, tokens_per_epoch=60, seed=3)
    again.set_epoch(3)
    assert all(
        torch.equal(a, b) for one, other in zip(again, batches, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_one_shard_at_a_time_is_in_memory(tmp_path, model, monkeypatch):
    store, _ = write(tmp_path, model)
    read: list[int] = []
    earlier: list[weakref.ref] = []
    original = HiddenStateStore.read_shard

    def watched(self, index):
        assert all(reference() is None for reference in earlier), "an earlier shard is still held"
        shard = original(self, index)
        read.append(index)
        earlier.extend(weakref.ref(tensor.untyped_storage()) for tensor in shard.values())
        return shard

    monkeypatch.setattr(HiddenStateStore, "read_shard", watched)
    batches = HardTokenBatches(store, batch_size=70, tokens_per_epoch=240, seed=3)  # batches span shards
    tokens = 0
    for h, y in batches:
        tokens += len(y)
        assert h.untyped_storage().nbytes() == h.numel() * 4  # a batch holds no more than itself
    assert tokens == 280
    assert sorted(read[:4]) == [0, 1, 2, 3]  # each once in a pass


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
    with pytest.raises(ArtifactError, match="lacks threshold; run dvc checkout"):
        HiddenStateStore(tmp_path)


def test_no_hard_token_is_an_error_before_the_manifest(tmp_path):
    writer = StoreWriter(tmp_path, 0.1, "float32", 100)
    ids = torch.zeros(1, 2, dtype=torch.long)
    writer.add(ids, ids, torch.zeros(1, 2, 4), torch.ones(1, 2))
    with pytest.raises(ArtifactError, match="no hard token: no confidence lies below the threshold"):
        writer.close()
    assert not (tmp_path / "manifest.json").exists()
