"""Text of a source to packed blocks of token ids, split by split: what a tokenize stage does."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lego.base.artifacts import write_json
from lego.base.outside import shown
from lego.base.progress import track
from lego.base.sections import DataParams, pretrained_tokenizer
from lego.text.chats import told
from lego.text.corpus import SPLITS, Corpus, FewDocumentsError, NearDuplicates
from lego.text.parts import SIZES, parts
from lego.text.sources import documents
from lego.text.tokenizer import TextEncoder, fit_bpe, fit_words, write_tokens
from lego.tokens.blocks import BlockWriter

FEW = 400  # documents; with more of them no split is empty by chance
FEW_BLOCKS = 4  # of the smallest split, where documents are cut
BYTES_PER_TOKEN = 8  # when streaming: so much text surely gives a token, whatever the tokenizer
WRITE_ORDER = ("test", "calibration", "validation", "train")  # near-duplicates give way to earlier ones


@dataclass(frozen=True)
class Tokenized:
    """What a folder of tokens holds.

    Args:
        encoder: the tokenizer.
        facts: documents, tokens, bytes and digests by split, as `write_tokens` counts them.
        ids: first ids (n,) by split, at most data.max_ngram_tokens of each.
        dropped: documents left out, by reason.
    """

    encoder: TextEncoder
    facts: dict[str, dict[str, Any]]
    ids: dict[str, np.ndarray]
    dropped: dict[str, int]


def gather(data: DataParams, seq_len: int, path: Path, refused: Counter[str]) -> Corpus:
    """The source's documents by split; cut into parts where there are so few that a split would be short of text.

    Args:
        data: the section of the parameters.
        seq_len: tokens per block.
        path: the file they are kept in.
        refused: counts the chats that are left out, as `documents` does.
    """
    try:
        corpus = read_corpus(data, path, refused)
        if min(corpus.bytes.values()) > seq_len or corpus.documents >= FEW:
            return corpus
    except FewDocumentsError as error:
        if error.documents >= FEW:  # not their number is at fault, but the shares
            raise
    for size in SIZES:
        refused.clear()
        try:
            corpus = read_corpus(data, path, refused, size)
        except FewDocumentsError:
            if size == SIZES[-1]:
                raise
            continue
        if min(corpus.bytes.values()) >= FEW_BLOCKS * BYTES_PER_TOKEN * seq_len:
            break
    told = f"{corpus.documents:,} parts of at most {size:,} characters, each in a split of its own"
    print(f"text: so few documents leave a split short of text; they are cut into {told}", flush=True)
    return corpus


def read_corpus(data: DataParams, path: Path, refused: Counter[str], size: int | None = None) -> Corpus:
    """The source's documents by split, in a file; of a stream no more than the token limits can use.

    Args:
        data, path, refused: as for `gather`.
        size: most characters of a document, if they are cut.

    Raises:
        FewDocumentsError: a split has none.
    """
    enough = {split: BYTES_PER_TOKEN * getattr(data, f"max_{split}_tokens") for split in SPLITS}
    streaming = data.source == "hub" and data.streaming
    read = track(documents(data, refused), None, "reading", "document")
    try:
        return Corpus(parts(read, size) if size else read, path, data.held_out_shares, enough if streaming else None)
    finally:  # also where so few are left that there is no corpus
        if refused:
            missed = f"{refused.total():,} chats are left out, as {data.column} has no turns of role and content there"
            print(f"{missed}: {shown(told(refused))}", flush=True)


def text_encoder(data: DataParams, init_from: str | None, corpus: Corpus) -> TextEncoder:
    """The pretrained tokenizer that the parameters name, or one fitted on train text."""
    if pretrained := pretrained_tokenizer(data, init_from):
        return TextEncoder.load(*pretrained)
    fit = fit_bpe if data.tokenizer == "bpe" else fit_words
    return TextEncoder.fitted(fit(corpus.texts("train"), data.vocab_size, data.max_tokenizer_bytes))


def write_splits(data: DataParams, seq_len: int, init_from: str | None, folder: Path) -> Tokenized:
    """Writes the tokenizer, each split's blocks and corpus.json into a folder.

    Args:
        data: the section of the parameters.
        seq_len: tokens per block.
        init_from: model whose tokenizer is taken, if any.
        folder: exists and is empty.

    Raises:
        CorpusError: text that cannot be read or is too little.
    """
    spool = folder / ".documents.arrow"
    refused: Counter[str] = Counter()
    corpus = gather(data, seq_len, spool, refused)
    encoder = text_encoder(data, init_from, corpus)
    encoder.save(folder / "tokenizer")
    near = NearDuplicates(data.near_duplicate_similarity) if data.near_duplicates == "drop" else None
    facts, ids = {}, {}
    for split in WRITE_ORDER:
        texts = corpus.texts(split) if near is None else near.novel(corpus.texts(split), remember=split != "train")
        writer, limit = BlockWriter(folder / split, seq_len), getattr(data, f"max_{split}_tokens")
        encoded = track(encoder.encode(texts), limit, f"tokenizing {split}", "token", size=lambda one: len(one[0]))
        facts[split], ids[split] = write_tokens(encoded, encoder, writer, limit, data.max_ngram_tokens)
    spool.unlink()
    sizes = {"vocab_size": encoder.vocab_size, "seq_len": seq_len, "end_of_text": encoder.end}
    write_json(folder / "corpus.json", sizes | {"splits": facts})
    dropped = {"duplicates": corpus.duplicates, "near_duplicates": near.dropped if near else 0}
    if refused:  # a key only where there is something to tell: most text has no chats
        dropped["unknown_chats"] = refused.total()
    return Tokenized(encoder, facts, ids, dropped)
