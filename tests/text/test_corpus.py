"""Documents and splits: what may not straddle, what is dropped, what order does not matter."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.two_files import arrange
from lego.base.params import load_params
from lego.base.sections import DataParams
from lego.text.corpus import SPLITS, Corpus, Document, FewDocumentsError, NearDuplicates, split_of, unit_hash
from lego.text.packing import write_splits
from lego.text.sources import documents, stdlib_documents
from lego.text.tokenizer import TextEncoder, fit_bpe
from lego.tokens.blocks import CorpusError
from tests.conftest import ROOT

SHARES = dict(validation=0.1, calibration=0.1, test=0.1)
WORDS = [f"word{i}" for i in range(400)]


def article(seed: int, length: int = 120) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


@pytest.fixture(scope="module")
def stdlib() -> list[Document]:
    return list(stdlib_documents())


def test_the_standard_library_comes_without_tests_and_generated_files(stdlib):
    names = [d.name for d in stdlib]
    assert len(names) == len(set(names)) > 300
    assert not [n for n in names if {"test", "tests", "site-packages", "encodings"} & set(n.split("/"))]
    assert not [n for n in names if "_sysconfigdata" in n]
    assert {"argparse.py", "json/decoder.py"} <= set(names)


def test_a_package_never_straddles_two_splits(stdlib, tmp_path):
    corpus = Corpus(stdlib, tmp_path / "spool", SHARES)
    home = {text: split for split in SPLITS for text in corpus.texts(split)}
    where = defaultdict(set)
    for document in stdlib:
        if document.text in home:
            where[document.group].add(home[document.text])
    straddling = {group for group, splits in where.items() if len(splits) > 1}
    repeated = Counter(document.text for document in stdlib)
    assert all(any(repeated[d.text] > 1 for d in stdlib if d.group == group) for group in straddling)
    assert where["asyncio"] == {split_of("asyncio", **SHARES)}


def test_the_splits_share_few_20_grams(stdlib, tmp_path):
    params = load_params(ROOT / "params.yaml").data
    corpus = Corpus(stdlib, tmp_path / "spool", SHARES)
    encoder = TextEncoder.fitted(fit_bpe(corpus.texts("train"), params.vocab_size, params.max_tokenizer_bytes))
    limits = {"train": params.max_train_tokens, "test": params.max_test_tokens}
    grams = {}
    for split, limit in limits.items():
        parts, count = [], 0
        for ids, _ in encoder.encode(corpus.texts(split)):
            parts.append(ids)
            count += len(ids)
            if count >= limit:
                break
        windows = np.lib.stride_tricks.sliding_window_view(np.concatenate(parts)[:limit], 20).astype(np.uint64)
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


def test_an_empty_split_names_its_key(tmp_path):
    with pytest.raises(CorpusError, match=r"data\.\w+_share leaves the \w+ split without a document \(of 1 different"):
        Corpus([Document("a", "a", "text")], tmp_path / "spool", SHARES)


def split_texts(texts: list[str], folder: Path) -> dict[str, list[str]]:
    documents = [Document(text, text, text) for text in texts]
    corpus = Corpus(documents, folder / "spool", dict(validation=0.25, calibration=0.25, test=0.25))
    return {split: list(corpus.texts(split)) for split in SPLITS}


def test_neither_order_nor_repetition_of_documents_matters(tmp_path):
    texts = [article(i) for i in range(60)]
    once = split_texts(texts, tmp_path)
    assert sorted(text for split in once.values() for text in split) == sorted(texts)
    shuffled = texts + texts[:20] + ["", " \n\t "]
    random.Random(1).shuffle(shuffled)
    assert split_texts(shuffled, tmp_path) == once


def test_exact_duplicates_are_counted_and_the_first_is_kept_across_groups(tmp_path):
    documents = [Document(str(i), f"group {i}", article(i // 2)) for i in range(80)]
    corpus = Corpus(documents, tmp_path / "spool", SHARES | dict(validation=0.3))
    kept = [text for split in SPLITS for text in corpus.texts(split)]
    assert (corpus.duplicates, len(kept), len(set(kept))) == (40, 40, 40)
    for split in SPLITS:
        for text in corpus.texts(split):
            first = next(d for d in documents if d.text == text)
            assert split_of(first.group, **SHARES | dict(validation=0.3)) == split


def test_a_stream_is_read_only_until_every_split_has_enough(tmp_path):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield Document(str(read), str(read), article(read))

    def repetitive():  # what it repeats counts once
        for document in endless():
            yield document
            yield Document(f"again {document.name}", f"again {document.name}", document.text)

    corpus = Corpus(endless(), tmp_path / "spool", SHARES, enough=dict.fromkeys(SPLITS, 5000))
    assert all(sum(map(len, corpus.texts(split))) >= 5000 for split in SPLITS)
    assert corpus.documents == read < 500
    corpus = Corpus(repetitive(), tmp_path / "spool", SHARES, enough=dict.fromkeys(SPLITS, 5000))
    assert all(sum(map(len, corpus.texts(split))) >= 5000 for split in SPLITS)


def test_the_spool_is_read_back_across_record_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("lego.text.corpus.SPOOL_BYTES", 1500)
    texts = [article(i) for i in range(50)]
    many = split_texts(texts, tmp_path)
    monkeypatch.undo()
    assert many == split_texts(texts, tmp_path)


def test_near_duplicates_give_way_across_splits_and_stay_within_one():
    original, unrelated = article(1), article(2)
    words = original.split()
    near = " ".join([*words[:60], "changed", *words[61:]])
    near_again = " ".join([*words[:30], "changed", *words[31:]])
    filtered = NearDuplicates(similarity=0.8)
    assert list(filtered.novel([original, near], remember=True)) == [original, near]
    assert list(filtered.novel([near_again, unrelated, original.upper()], remember=False)) == [unrelated]
    assert filtered.dropped == 2
    cut = NearDuplicates(similarity=0.8)
    assert next(cut.novel([original, unrelated], remember=True)) == original  # the token limit was reached
    assert list(cut.novel([near], remember=False)) == []
    strict = NearDuplicates(similarity=0.99)
    assert list(strict.novel([original], remember=True)) == [original]
    assert list(strict.novel([near], remember=False)) == [near]


def two_files(folder: Path) -> tuple[Path, Path, DataParams]:
    for name, seeds in (("a.txt", range(60)), ("b.txt", range(60, 80))):
        (folder / name).write_text("".join(f"= {seed} =\n{article(seed)}\n" for seed in seeds).rstrip("\n"))
    data = load_params(ROOT / "params.yaml").data
    changed = {"source": "text", "path": str(folder / "both"), "split_on": "= "}
    return folder / "a.txt", folder / "b.txt", data.model_copy(update=changed)


def test_two_files_become_one_text_whose_test_split_is_the_second(tmp_path):
    train, test, data = two_files(tmp_path)
    counts = arrange(train, test, tmp_path / "both", data)
    homes = defaultdict(set)
    for document in documents(data):
        homes[split_of(document.group, **SHARES)].add(int(document.text.split()[1]))
    assert homes["test"] == set(range(60, 80))
    assert {split: len(found) for split, found in homes.items()} == counts
    assert counts.total() == 80
    assert counts["train"] > 40


def test_two_files_refuse_what_would_leak_or_be_lost(tmp_path):
    train, test, data = two_files(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    for files, sentence in (
        ((train, test, tmp_path), "must be a new or empty folder"),
        ((tmp_path / "rows.jsonl", test, tmp_path / "new"), r"must be a \.txt or \.md file"),
        ((train, tmp_path / "none.txt", tmp_path / "new"), "is missing"),
    ):
        with pytest.raises(CorpusError, match=sentence):
            arrange(*files, data)
        assert not (tmp_path / "new").exists()
        assert (train.read_text()[:7], test.read_text()[:8]) == ("= 0 =\nw", "= 60 =\nw")


@pytest.mark.parametrize("language", ["english", "japanese"])
def test_two_small_files_give_every_split_some_text_and_say_how(tmp_path, capsys, language):
    words = {"english": "the ship sailed on over a quiet sea. ", "japanese": "吾輩は猫である。名前はまだ無い。"}[
        language
    ]
    (tmp_path / "text").mkdir()
    for name in "ab":
        lines = (f"{name}{number} {words * 3}" for number in range(25_000 // len((words * 3).encode()) * 2))
        (tmp_path / f"text/{name}.txt").write_text("".join(lines))  # without a line's end
    data = load_params(ROOT / "params.yaml").data.model_copy(
        update={"source": "text", "path": str(tmp_path / "text"), "vocab_size": 400}
    )
    (tmp_path / "tokens").mkdir()
    done = write_splits(data, 128, None, tmp_path / "tokens")
    assert all(facts["tokens"] >= 2 * 128 for facts in done.facts.values()), done.facts
    assert re.search(
        r"text: so few documents .* are cut into [\d,]+ parts of at most [\d,]+ char", capsys.readouterr().out
    )


def test_many_documents_are_never_cut(tmp_path):
    """There the shares are at fault."""
    documents = [Document(str(n), str(n), f"text {n}") for n in range(500)]
    with pytest.raises(FewDocumentsError) as told:
        Corpus(documents, tmp_path / "spool", {"validation": 0.1, "calibration": 0.1, "test": 1e-9})
    assert told.value.documents == 500
