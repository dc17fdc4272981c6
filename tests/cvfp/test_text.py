"""Which text CVFP learns and is judged on: policies, leaks, refusals."""

from __future__ import annotations

import ast
import inspect

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.base.artifacts import ArtifactError, read_json, read_tensors, write_json, write_tensors
from lego.base.parameter_files import ParamsError
from lego.cvfp import text as policy
from lego.cvfp.sections import load
from lego.cvfp.text import (
    UnseenIdError,
    auto_split,
    in_vocabulary,
    overlap,
    read_text_ids,
    require_seen,
    stream,
    validation_from_train,
    without_overlap,
    write_text_ids,
)
from lego.text.tokenizer import TextEncoder, fit_bpe, write_tokens
from lego.tokens.blocks import BlockWriter
from tests.conftest import ROOT, SOURCE
from tests.cvfp.conftest import PARAMS

HALF = len(SOURCE) // 2


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.fitted(fit_bpe([SOURCE], 400, 10**6))


@pytest.fixture
def tokens(tmp_path, encoder):
    """A folder as tokenize writes it: train and test from different halves of a text."""
    facts = {}
    pieces = {"train": SOURCE[:HALF], "validation": SOURCE[HALF : HALF + 8000], "test": SOURCE[HALF + 8000 :]}
    for split, piece in pieces.items():
        writer = BlockWriter(tmp_path / split, 16)
        facts[split], _ = write_tokens(encoder.encode([piece]), encoder, writer, 10**6, 0)
    write_json(tmp_path / "corpus.json", {"vocab_size": 400, "seq_len": 16, "end_of_text": 0, "splits": facts})
    return tmp_path


def test_a_stream_is_the_ids_in_the_order_of_the_text(tokens, encoder):
    ids = next(encoder.encode([SOURCE[:HALF]]))[0]
    found = stream(tokens, "train")
    assert np.array_equal(found, ids[: len(found)])
    assert len(ids) - len(found) < 16


def test_b22_held_out_text_shares_no_run_with_train(tokens, encoder):
    counts = write_text_ids(tokens, tokens, encoder, PARAMS.text.model_copy(update={"overlap_length": 8}))
    text = read_text_ids(tokens)
    assert counts["test_overlapping"] > 0
    for split in ("validation", "test"):
        ids, train = text.ids[split].numpy(), text.ids["train"].numpy()
        known = {tuple(train[i : i + 8]) for i in range(len(train) - 7)}
        assert not any(tuple(ids[i : i + 8]) in known for i in range(len(ids) - 7))
    assert text.bytes_of("test") == sum(int(text.token_bytes[one]) for one in text.ids["test"][1:])
    assert set(text.ids["validation"].tolist()) <= set(text.ids["train"].tolist())


def test_b22_what_is_left_out_joins_no_run_of_train(tmp_path):
    """Unseen ids are taken out before the cut, as their neighbours then stand side by side."""
    vocabulary = np.arange(600)
    held_out = np.r_[30:40, 500, 40:50, 3, 1, 2]
    kept, _ = in_vocabulary(held_out, vocabulary[:100], "filter", 0)
    left, places = without_overlap(kept, vocabulary[:100], 20)
    assert left.tolist() == [3, 1, 2]
    assert places.tolist() == [20, 21, 22]
    source = ast.unparse(ast.parse(inspect.getsource(write_text_ids)))
    assert source.index("in_vocabulary(") < source.index("without_overlap(")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=0, max_size=60), st.lists(st.integers(0, 3), max_size=60), st.integers(2, 5)
)
def test_overlap_equals_brute_force(ids, train, length):
    known = {tuple(train[i : i + length]) for i in range(len(train) - length + 1)}
    expected = [
        any(tuple(ids[j : j + length]) in known for j in range(max(0, i - length + 1), i + 1) if j + length <= len(ids))
        for i in range(len(ids))
    ]
    one, other = np.array(ids, dtype=np.int64), np.array(train, dtype=np.int64)
    assert overlap(one, other, length).tolist() == expected
    left, places = without_overlap(one, other, length)
    assert np.array_equal(left, one[places])
    assert (np.diff(places) > 0).all()
    assert not overlap(left, other, length).any()


def test_b21_unseen_ids_auto_split_and_missing_text_are_refused(tmp_path, tokens, encoder):
    with pytest.raises(UnseenIdError, match="validation: 2 ids do not occur in train, the first is 7"):
        require_seen(np.array([1, 7, 9, 7]), np.array([1, 2, 3]), "validation")
    with pytest.raises(
        ValueError, match="auto_split is not allowed: validation text is heldout_in_vocab or val_from_train"
    ):
        auto_split(np.arange(10))
    raw = yaml.safe_load((ROOT / "stages/cvfp/params.yaml").read_text())
    raw["text"]["validation"] = "auto_split"
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ParamsError, match=r"text\.validation must be one of 'heldout_in_vocab' or 'val_from_train'"):
        load(tmp_path / "p.yaml", ROOT / "params.yaml")
    with pytest.raises(FileNotFoundError, match=r"run dvc repro stages/cvfp/dvc.yaml"):
        read_text_ids(tmp_path / "nowhere")


def test_train_and_validation_are_made_together(tokens, encoder):
    write_text_ids(tokens, tokens, encoder, PARAMS.text)
    ids = read_tensors(tokens / "ids.safetensors")
    train = ids["train"].clone()
    ids["train"][3] += 1
    write_tensors(tokens / "ids.safetensors", ids)
    with pytest.raises(ArtifactError, match=r"train is not what text.json was written with"):
        read_text_ids(tokens)
    ids["train"] = train
    ids["validation"][0] = 10**6
    write_tensors(tokens / "ids.safetensors", ids)
    with pytest.raises(ArtifactError, match="validation is not what"):
        read_text_ids(tokens)


def test_validation_from_train_is_its_last_part_tokenized_again(tokens, encoder):
    settings = PARAMS.text.model_copy(update={"validation": "val_from_train"})
    counts = write_text_ids(tokens, tokens, encoder, settings)
    text = read_text_ids(tokens)
    train = text.ids["train"].tolist()
    last = train[-round(0.2 * len(train)) :]
    assert encoder.fast.decode(text.ids["validation"].tolist()) == encoder.fast.decode(last)
    assert counts["validation_tokens"] == pytest.approx(len(last), abs=3)
    assert text.validation == "val_from_train"
    assert "test_unseen" in counts  # the test ids are held out all the same


def test_b21_the_check_is_on_the_ids_as_tokenized_again():
    """Train spells `ab` as two ids where the tokenizer has one: decoding and encoding gives an id train never shows."""
    encoder = TextEncoder.fitted(fit_bpe(["ab ab ab ab"] * 50, 259, 10**6))
    merged = encoder.fast.encode("ab").ids
    letters = [encoder.fast.token_to_id(one) for one in "ab"]
    assert len(merged) == 1
    assert merged[0] not in letters
    with pytest.raises(UnseenIdError, match="validation from train: 1 ids do not occur in train"):
        validation_from_train(np.array(letters * 10), 0.5, encoder)


def test_ids_that_train_does_not_have_are_left_out_or_replaced_and_counted():
    ids, train = np.array([1, 9, 2, 8]), np.array([1, 2, 3])
    kept, count = in_vocabulary(ids, train, "filter", 0)
    assert (kept.tolist(), count) == ([1, 2], 2)
    kept, count = in_vocabulary(ids, train, "unk", 3)
    assert (kept.tolist(), count) == ([1, 3, 2, 3], 2)
    assert policy.MODES == "heldout_in_vocab or val_from_train"


def test_bytes_of_ids_that_were_replaced_still_count(tokens, encoder):
    settings = PARAMS.text.model_copy(update={"unseen": "unk", "overlap_length": 1000})
    counts = write_text_ids(tokens, tokens, encoder, settings)
    text, spelled = read_text_ids(tokens), stream(tokens, "test")
    assert counts["test_unseen"] > 0
    assert text.hidden_bytes["test"] > 0
    assert text.bytes_of("test") == int(encoder.token_bytes()[spelled[1:]].sum())


def test_b21_ids_that_train_does_not_have_are_refused_when_the_text_is_read(tokens, encoder):
    """Even where files and digests fit together, as those of another writer would."""
    write_text_ids(tokens, tokens, encoder, PARAMS.text)
    ids = read_tensors(tokens / "ids.safetensors")
    unseen = next(one for one in range(encoder.vocab_size) if one not in ids["train"])
    ids["validation"] = torch.cat([ids["validation"], torch.tensor([unseen])])
    facts = read_json(tokens / "text.json")
    facts["validation_sha256"] = policy.digest(ids["validation"])
    write_tensors(tokens / "ids.safetensors", ids)
    write_json(tokens / "text.json", facts)
    with pytest.raises(UnseenIdError, match=f"validation: 1 ids do not occur in train, the first is {unseen}"):
        read_text_ids(tokens)


@pytest.mark.parametrize("name", ["text.json", "ids.safetensors", "bytes.safetensors"])
def test_b21_each_missing_file_is_named(tokens, encoder, name):
    write_text_ids(tokens, tokens, encoder, PARAMS.text)
    (tokens / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read_text_ids(tokens)
