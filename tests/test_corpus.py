"""Text, splits, tokenizer and blocks; and the n-gram references against brute force."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.artifacts import ArtifactError, sha256
from lego.corpus import (
    SPLITS,
    CorpusError,
    Document,
    PackedBlocks,
    encode,
    fit_bpe,
    pack,
    save_blocks,
    save_tokenizer,
    split_documents,
    split_of,
    stdlib_documents,
    token_bytes,
    train_part,
    unit_hash,
)
from lego.ngram import KneserNey, unigram_nll
from lego.params import load_params

SHARES = dict(validation=0.1, calibration=0.1, test=0.1)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Document]]:
    return split_documents(stdlib_documents(), **SHARES)


@pytest.fixture(scope="module")
def tokenizer(splits):
    return fit_bpe((d.text for d in splits["train"]), 1000, 300_000)


def test_the_standard_library_comes_without_tests_and_generated_files(splits):
    names = [d.name for members in splits.values() for d in members]
    assert len(names) == len(set(names)) > 300
    assert not [n for n in names if {"test", "tests", "site-packages", "encodings"} & set(n.split("/"))]
    assert not [n for n in names if "_sysconfigdata" in n]
    assert {"argparse.py", "json/decoder.py"} <= set(names)


def test_a_package_never_straddles_two_splits(splits):
    home = defaultdict(set)
    for split, members in splits.items():
        for document in members:
            home[document.group].add(split)
    assert all(len(where) == 1 for where in home.values())
    assert home["asyncio"] == {split_of("asyncio", **SHARES)}


def test_the_splits_share_few_20_grams(splits):
    params = load_params(ROOT / "params.yaml").data
    tokenizer = fit_bpe((d.text for d in splits["train"]), params.vocab_size, params.max_tokenizer_bytes)
    limits = {"train": params.max_train_tokens, "test": params.max_test_tokens}
    grams = {}
    for split, limit in limits.items():
        ids, _ = encode(tokenizer, [d.text for d in splits[split]], limit)
        windows = np.lib.stride_tricks.sliding_window_view(ids, 20).astype(np.uint64)
        powers = np.array([pow(1_000_003, i, 2**64) for i in range(20)], dtype=np.uint64)
        grams[split] = (windows * powers).sum(axis=1, dtype=np.uint64)  # a hash of each window, modulo 2**64
    shared = np.isin(grams["test"], grams["train"]).mean()
    assert 0 < shared < 0.02


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=20, unique=True))
def test_a_split_depends_on_the_name_alone(names):
    once = {name: split_of(name, **SHARES) for name in names}
    again = {name: split_of(name, **SHARES) for name in reversed(names)}
    assert once == again
    for name in names:
        position = unit_hash(name)
        assert 0 <= position < 1
        expected = SPLITS[3 - min(int(position * 10), 3)]
        assert once[name] == expected


def test_shares_of_many_groups_are_as_asked():
    counts = Counter(split_of(f"group {i}", validation=0.2, calibration=0.1, test=0.05) for i in range(20_000))
    for split, share in (("train", 0.65), ("validation", 0.2), ("calibration", 0.1), ("test", 0.05)):
        assert counts[split] / 20_000 == pytest.approx(share, abs=0.012)


def test_an_empty_split_names_its_key():
    with pytest.raises(CorpusError, match=r"data\.validation_share leaves the validation split without a document"):
        split_documents([Document("a", "a", "text")], **SHARES)


def test_bpe_round_trips_is_deterministic_and_is_read_by_transformers(tokenizer, splits, tmp_path):
    from transformers import AutoTokenizer

    texts = [*(d.text for d in splits["validation"][:5]), "naïve café ☕ \t\n  mixed\x00 text 日本"]
    ids, used = encode(tokenizer, texts, 10**9)
    assert used == len(texts)
    end = tokenizer.token_to_id("<|endoftext|>")
    assert (ids == end).sum() == len(texts)
    pieces = np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]
    assert [tokenizer.decode(piece[:-1].tolist()) for piece in pieces] == texts
    lengths = token_bytes(tokenizer)
    assert [int(lengths[piece].sum()) for piece in pieces] == [len(text.encode()) for text in texts]
    save_tokenizer(tokenizer, tmp_path / "a")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert loaded(texts[0])["input_ids"] == pieces[0][:-1].tolist()
    assert loaded.eos_token_id == end
    save_tokenizer(fit_bpe((d.text for d in splits["train"]), 1000, 300_000), tmp_path / "b")
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


def test_end_of_text_in_a_document_is_text(tokenizer):
    ids, _ = encode(tokenizer, ["a <|endoftext|> b"], 10**9)
    assert (ids == tokenizer.token_to_id("<|endoftext|>")).sum() == 1


def test_a_vocabulary_the_text_cannot_fill_is_refused():
    with pytest.raises(CorpusError, match=r"data\.vocab_size is 5000, but the train text fills only \d+ entries"):
        fit_bpe(["short text"], 5000, 1000)


def test_encoding_stops_at_the_limit(tokenizer, splits):
    texts = [d.text for d in splits["train"]]
    everything, _ = encode(tokenizer, texts[:40], 10**9)
    ids, used = encode(tokenizer, texts, 5000)
    assert np.array_equal(ids, everything[:5000])
    assert used < 40


@settings(max_examples=150, deadline=None)
@given(n=st.integers(2, 300), seq_len=st.integers(2, 40))
def test_packing_predicts_every_token_but_the_first_once(n, seq_len):
    ids = np.arange(n, dtype=np.int32)
    if n <= seq_len:
        with pytest.raises(CorpusError, match=f"model.seq_len is {seq_len}, but a split has only {n} tokens"):
            pack(ids, seq_len)
        return
    rows = pack(ids, seq_len)
    assert rows.shape == ((n - 1) // seq_len, seq_len + 1)
    assert np.array_equal(rows[:, 1:].ravel(), np.arange(1, rows[:, 1:].size + 1))
    assert np.array_equal(rows[:, :-1], rows[:, 1:] - 1)


def test_blocks_are_memory_mapped_arrow_that_datasets_reads_and_equal_text_gives_equal_bytes(tmp_path):
    import datasets

    rows = pack(np.arange(1001, dtype=np.int32), 10)
    for name in ("a", "b"):
        save_blocks(rows, tmp_path / name / "train")
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    plain = datasets.load_from_disk(str(tmp_path / "a" / "train"))
    assert plain.cache_files
    assert plain[3]["input_ids"] == list(range(30, 41))
    blocks = PackedBlocks(tmp_path / "a", "train")
    assert (len(blocks), blocks.seq_len, blocks.tokens) == (100, 10, 1000)
    assert torch.equal(blocks.rows(torch.tensor([7, 0])), torch.tensor(rows[[7, 0]]).long())


def test_the_two_phases_read_disjoint_parts_that_cover_train(tmp_path):
    save_blocks(pack(np.arange(1001, dtype=np.int32), 10), tmp_path / "train")
    for share in (0.4, 0.25, 0.013):
        seen = PackedBlocks(tmp_path, "train", train_part(share, phase=1))
        fresh = PackedBlocks(tmp_path, "train", train_part(share, phase=2, phase2_text="fresh"))
        same = PackedBlocks(tmp_path, "train", train_part(share, phase=2, phase2_text="same"))
        assert len(seen) + len(fresh) == 100
        assert seen.rows(torch.tensor([len(seen) - 1]))[0, -1] == fresh.rows(torch.tensor([0]))[0, 0]
        assert torch.equal(same.rows(torch.tensor([0])), seen.rows(torch.tensor([0])))
    with pytest.raises(CorpusError, match=r"is empty; change params\.yaml: ashem\.phase2_share"):
        PackedBlocks(tmp_path, "train", train_part(0.001, phase=2))


def test_missing_blocks_are_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"train/state\.json: cannot be read .*; run dvc repro to make it"):
        PackedBlocks(tmp_path, "train")
    save_blocks(pack(np.arange(1001, dtype=np.int32), 10), tmp_path / "train")
    file = tmp_path / "train" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ArtifactError, match=r"train: cannot be read"):
        PackedBlocks(tmp_path, "train")


def brute_force_kneser_ney(train: list[int], test: list[int], vocab: int, order: int) -> list[float]:
    """The textbook recursion over dictionaries of tuples."""
    grams = {n: Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1)) for n in range(1, order + 1)}
    counts = {order: grams[order]}
    for n in range(1, order):
        counts[n] = Counter(g[1:] for g in grams[n + 1])

    def probability(context: tuple[int, ...], word: int) -> float:
        n = len(context) + 1
        lower = probability(context[1:], word) if context else 1 / vocab
        once, twice = (sum(c == k for c in counts[n].values()) for k in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.0
        following = {g: c for g, c in counts[n].items() if g[:-1] == context}
        total = sum(following.values())
        if not total:
            return lower
        kept = max(following.get((*context, word), 0) - discount, 0)
        return (kept + discount * len(following) * lower) / total

    return [probability(tuple(test[max(0, i - order + 1) : i]), word) for i, word in enumerate(test)]


@settings(max_examples=100, deadline=None)
@given(
    train=st.lists(st.integers(0, 5), min_size=6, max_size=60),
    test=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    order=st.integers(1, 5),
)
def test_kneser_ney_equals_brute_force(train, test, order):
    model = KneserNey(np.array(train), 6, order)
    expected = brute_force_kneser_ney(train, test, 6, order)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(model.probabilities(np.array(test)), expected, rtol=1e-9, atol=1e-15)


@settings(max_examples=100, deadline=None)
@given(train=st.lists(st.integers(0, 5), min_size=6, max_size=60), history=st.lists(st.integers(0, 5), max_size=6))
def test_kneser_ney_sums_to_one(train, history):
    model = KneserNey(np.array(train), 6, 3)
    total = sum(model.probabilities(np.array([*history, word]))[-1] for word in range(6))
    assert total == pytest.approx(1.0)


def test_unigram_is_add_one():
    nll = unigram_nll(np.array([0, 0, 1]), np.array([0, 2]), 3)
    assert nll == pytest.approx(-(math.log(3 / 6) + math.log(1 / 6)) / 2)
