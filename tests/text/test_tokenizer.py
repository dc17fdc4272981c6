"""Tokenizers and the way from texts to counted blocks."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.base.artifacts import sha256
from lego.text.sources import stdlib_documents
from lego.text.tokenizer import TextEncoder, fit_bpe, fit_words, write_tokens
from lego.tokens.blocks import BlockWriter, CorpusError, PackedBlocks

ODD = "naïve café ☕ \t\n  mixed\x00 text 日本"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [d.text for d in stdlib_documents() if d.group in {"json", "asyncio", "textwrap", "heapq"}]


@pytest.fixture(scope="module")
def encoder(texts) -> TextEncoder:
    return TextEncoder.fitted(fit_bpe(texts, 1000, 300_000))


def encoded(encoder: TextEncoder, texts: list[str]) -> list[np.ndarray]:
    return [ids for ids, _ in encoder.encode(texts)]


def test_bpe_round_trips_is_deterministic_and_is_read_by_transformers(encoder, texts, tmp_path):
    from transformers import AutoTokenizer

    some = [*texts[:5], ODD]
    pieces = encoded(encoder, some)
    assert all((piece == encoder.end).sum() == 1 and piece[-1] == encoder.end for piece in pieces)
    assert [encoder.fast.decode(piece[:-1].tolist()) for piece in pieces] == some
    lengths = encoder.token_bytes()
    assert [int(lengths[piece].sum()) for piece in pieces] == [len(text.encode()) for text in some]
    encoder.save(tmp_path / "a")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert loaded(some[0])["input_ids"] == pieces[0][:-1].tolist()
    assert loaded.eos_token_id == encoder.end
    TextEncoder.fitted(fit_bpe(texts, 1000, 300_000)).save(tmp_path / "b")
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


def test_end_of_text_in_a_document_is_text(encoder):
    assert (encoded(encoder, ["a <|endoftext|> b"])[0] == encoder.end).sum() == 1


@pytest.mark.parametrize("fit", [fit_bpe, fit_words])
def test_a_vocabulary_the_text_cannot_fill_becomes_what_it_fills_and_says_so(fit, capsys):
    size = fit(["short text"], 5000, 1000).get_vocab_size()
    assert size == {"fit_bpe": 265, "fit_words": 4}[fit.__name__]  # 256 bytes, the end and 8 merges; two words and two
    told = f"vocabulary: {size} entries, as the train text fills no more of data.vocab_size 5,000\n"
    assert capsys.readouterr().out == told
    assert fit(["short text"], size, 1000).get_vocab_size() == size
    assert capsys.readouterr().out == ""


def test_words_are_lower_cased_and_rare_ones_unknown(tmp_path):
    from transformers import AutoTokenizer

    encoder = TextEncoder.fitted(fit_words(["The cat saw the dog . the cat ran .", "THE end"], 5, 1000))
    assert encoder.fast.get_vocab().keys() == {"<|endoftext|>", "<unk>", "the", "cat", "."}
    ids = encoded(encoder, ["The CAT slept . <unk>"])[0]
    assert [encoder.fast.id_to_token(i) for i in ids] == ["the", "cat", "<unk>", ".", "<unk>", "<|endoftext|>"]
    assert encoder.token_bytes() is None
    encoder.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("The CAT slept .")["input_ids"] == ids[:4].tolist()


def test_a_pretrained_tokenizer_comes_from_a_folder_and_is_handed_on(encoder, texts, tmp_path):
    encoder.save(tmp_path / "model")
    loaded = TextEncoder.load(str(tmp_path / "model"))
    assert (loaded.end, loaded.vocab_size) == (encoder.end, encoder.vocab_size)
    for mine, theirs in zip(encoded(loaded, texts[:3]), encoded(encoder, texts[:3]), strict=True):
        assert np.array_equal(mine, theirs)
    loaded.save(tmp_path / "again")
    again = TextEncoder.load(str(tmp_path / "again"))
    assert np.array_equal(encoded(again, [ODD])[0], encoded(encoder, [ODD])[0])


def test_a_pretrained_tokenizer_may_have_holes_in_its_ids_and_change_the_text(tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"a": 0, "b": 7, "</s>": 12, "\u0120a": 3, "\u0120": 5}
    fast = Tokenizer(models.BPE(vocab, [("\u0120", "a")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    fast.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>").save_pretrained(str(tmp_path / "prefix"))
    encoder = TextEncoder.load(str(tmp_path / "prefix"))
    assert (encoder.vocab_size, encoder.end) == (13, 12)
    assert encoder.token_bytes() is None  # "a" becomes " a": two bytes for one
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>").save_pretrained(str(tmp_path / "plain"))
    assert TextEncoder.load(str(tmp_path / "plain")).token_bytes()[[0, 3, 7, 12]].tolist() == [1, 2, 1, 0]
    fast.normalizer = normalizers.NFC()
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>").save_pretrained(str(tmp_path / "nfc"))
    assert TextEncoder.load(str(tmp_path / "nfc")).token_bytes() is None


def test_long_texts_are_encoded_in_parts_that_lose_nothing(encoder, texts, monkeypatch):
    whole = encoded(encoder, texts)
    monkeypatch.setattr("lego.text.tokenizer.PIECE", 500)
    cut = encoded(encoder, [*texts, "x" * 1700])
    for text, ids in zip([*texts, "x" * 1700], cut, strict=True):
        assert encoder.fast.decode(ids[:-1].tolist()) == text
    same = sum(len(ids) for ids in whole)
    assert abs(sum(len(ids) for ids in cut[:-1]) / same - 1) < 0.02


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8),
    limit=st.integers(6, 150),
    keep=st.integers(1, 40),
)
def test_what_is_written_is_the_start_of_the_stream_and_its_bytes_are_counted(tmp_path_factory, parts, limit, keep):
    encoder = BYTES
    stream = np.concatenate(encoded(encoder, parts))
    writer = BlockWriter(tmp_path_factory.mktemp("blocks") / "train", 4)
    if min(limit, len(stream)) < 5:
        with pytest.raises(CorpusError, match=r"model\.seq_len is 4, but the train split has only \d+ tokens"):
            write_tokens(encoder.encode(parts), encoder, writer, limit, keep)
        return
    facts, head = write_tokens(encoder.encode(parts), encoder, writer, limit, keep)
    assert np.array_equal(head, stream[: min(keep, limit)])
    blocks = PackedBlocks(writer.folder.parent, "train")
    rows = (min(limit, len(stream)) - 1) // 4
    assert (len(blocks), facts["tokens"]) == (rows, 4 * rows)
    predicted = stream[1 : 4 * rows + 1]
    assert facts["bytes"] == sum(len(encoder.fast.id_to_token(i)) for i in predicted if i != encoder.end)
    ends = np.cumsum([len(ids) for ids in encoded(encoder, parts)])
    assert facts["documents"] == min(len(parts), int(np.searchsorted(ends, limit)) + 1)


def test_texts_are_let_go_once_they_are_written(tmp_path):
    """Not even an empty view of their ids may stay: at 100 million tokens that held 400 MB."""
    alive: list[weakref.ref] = []

    def encoded_texts():
        for _ in range(60):
            ids = np.full(100, 65, dtype=np.int32)
            alive.append(weakref.ref(ids))
            yield ids, 100
            del ids
            assert sum(reference() is not None for reference in alive) <= 4

    facts, head = write_tokens(encoded_texts(), BYTES, BlockWriter(tmp_path / "train", 10), 10_000, 250)
    assert (facts["tokens"], len(head)) == (5990, 250)


def test_bytes_of_words_are_those_of_the_documents(tmp_path):
    texts = ["The cat saw the dog . " * 20, "the dog ran . " * 30]
    encoder = TextEncoder.fitted(fit_words(texts, 7, 10_000))
    facts, _ = write_tokens(encoder.encode(texts), encoder, BlockWriter(tmp_path / "train", 10), 10_000, 10)
    total = sum(len(text) for text in texts)
    assert 0.95 * total < facts["bytes"] <= total


BYTES = TextEncoder.fitted(fit_bpe(["abc"], 257, 10))
