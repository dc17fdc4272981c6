"""Packing, blocks on disk, and the parts of train that the phases read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.base.artifacts import ArtifactError, sha256
from lego.tokens.blocks import BlockWriter, CorpusError, PackedBlocks, pack, train_text


def save_blocks(ids: np.ndarray, seq_len: int, folder: Path, at_a_time: int = 400) -> BlockWriter:
    folder.parent.mkdir(parents=True, exist_ok=True)
    writer = BlockWriter(folder, seq_len)
    for start in range(0, len(ids), at_a_time):
        writer.add(ids[start : start + at_a_time])
    writer.close()
    return writer


@settings(max_examples=150, deadline=None)
@given(n=st.integers(2, 300), seq_len=st.integers(2, 40))
def test_packing_predicts_every_token_but_the_first_once(n, seq_len):
    rows = pack(np.arange(n, dtype=np.int32), seq_len)
    assert rows.shape == ((n - 1) // seq_len, seq_len + 1)
    assert np.array_equal(rows[:, 1:].ravel(), np.arange(1, rows[:, 1:].size + 1))
    assert np.array_equal(rows[:, :-1], rows[:, 1:] - 1)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(8, 500), seq_len=st.integers(2, 7), at_a_time=st.integers(1, 90), rows_at_a_time=st.integers(1, 9))
def test_a_stream_written_in_parts_is_the_stream_packed_at_once(
    tmp_path_factory, n, seq_len, at_a_time, rows_at_a_time
):
    ids = np.random.default_rng(n).integers(0, 1000, n, dtype=np.int32)
    folder = tmp_path_factory.mktemp("blocks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lego.tokens.blocks.ROWS_AT_A_TIME", rows_at_a_time)
        writer = save_blocks(ids, seq_len, folder / "train", at_a_time)
    rows = pack(ids, seq_len)
    blocks = PackedBlocks(folder, "train")
    assert (writer.rows, writer.ids, len(blocks)) == (len(rows), n, len(rows))
    order = torch.randperm(len(rows))
    assert torch.equal(blocks.rows(order), torch.from_numpy(rows)[order].long())
    assert writer.sha256 == sha256_of(rows)


def sha256_of(rows: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()


def test_blocks_are_memory_mapped_arrow_that_datasets_reads_and_equal_text_gives_equal_bytes(tmp_path):
    import datasets

    ids = np.arange(1001, dtype=np.int32)
    for name, at_a_time in (("a", 100), ("b", 333)):
        save_blocks(ids, 10, tmp_path / name / "train", at_a_time)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["train"]
    plain = datasets.load_from_disk(str(tmp_path / "a" / "train"))
    assert plain.cache_files
    assert plain[3]["input_ids"] == list(range(30, 41))
    blocks = PackedBlocks(tmp_path / "a", "train")
    assert (len(blocks), blocks.seq_len, blocks.tokens) == (100, 10, 1000)
    assert torch.equal(blocks.rows(torch.tensor([7, 0])), torch.tensor(pack(ids, 10)[[7, 0]]).long())


def test_a_stream_shorter_than_a_block_names_the_keys(tmp_path):
    with pytest.raises(CorpusError, match=r"model\.seq_len is 10, but the test split has only 10 tokens; lower it"):
        save_blocks(np.arange(10), 10, tmp_path / "test")
    assert not list(tmp_path.iterdir())


def all_rows(blocks: PackedBlocks) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for row in blocks.rows(torch.arange(len(blocks)))]


@pytest.mark.parametrize("split", ["blocks", "documents"])
def test_the_two_phases_read_disjoint_parts_that_cover_train(tmp_path, split):
    save_blocks(np.arange(1001), 10, tmp_path / "train")
    whole = all_rows(PackedBlocks(tmp_path, "train"))
    for share in (0.4, 0.25, 0.013):
        seen, fresh = (train_text(tmp_path, phase, share, split, seed=3) for phase in (1, 2))
        same = train_text(tmp_path, 2, share, split, seed=3, phase2_text="same")
        assert len(fresh) == round(100 * share)
        assert sorted(all_rows(seen) + all_rows(fresh)) == whole
        assert all_rows(same) == all_rows(seen)
        assert (all_rows(seen) == whole[: len(seen)]) == (split == "documents")
        assert all_rows(train_text(tmp_path, 1, share, split, seed=3)) == all_rows(seen)
    other = all_rows(train_text(tmp_path, 1, 0.013, split, seed=4))
    assert (other == all_rows(seen)) == (split == "documents")
    with pytest.raises(CorpusError, match=r"is empty; change params\.yaml: ashem\.phase2_share"):
        train_text(tmp_path, 2, 0.001, split, seed=3)


def test_missing_blocks_are_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"train/state\.json: cannot be read .*; run dvc repro to make it"):
        PackedBlocks(tmp_path, "train")
    save_blocks(np.arange(1001), 10, tmp_path / "train")
    file = tmp_path / "train" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ArtifactError, match=r"train: cannot be read"):
        PackedBlocks(tmp_path, "train")
