"""Tokenizers: byte-level BPE and lower-cased words fitted on train text, or any pretrained one; text to token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lego.base.artifacts import ArtifactError, sha256
from lego.base.given import where_from
from lego.tokens.blocks import BlockWriter, CorpusError

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<unk>"
PIECE = 2**20  # characters encoded at a time: enough for all cores, little memory


def _capped(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        part = text.encode()[:left].decode(errors="ignore")
        yield part
        left -= len(text.encode())
        if left <= 0:
            return


def _told(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer; a text that cannot fill the vocabulary is told of, which then has as many entries as it fills."""
    if (filled := tokenizer.get_vocab_size()) < vocab_size:
        print(f"vocabulary: {filled:,} entries, as the train text fills no more of data.vocab_size {vocab_size:,}")
    return tokenizer


def fit_bpe(texts: Iterable[str], vocab_size: int, max_bytes: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) fitted on the first max_bytes of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(_capped(texts, max_bytes), trainer)
    return _told(tokenizer, vocab_size)


def fit_words(texts: Iterable[str], vocab_size: int, max_bytes: int) -> Tokenizer:
    """The most frequent lower-cased words between white space, all others `<unk>`: the historical protocol."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(_capped(texts, max_bytes), trainer)
    return _told(tokenizer, vocab_size)


class TextEncoder:
    """A tokenizer with its end-of-text id, as the pipeline uses it.

    Args:
        fast: what encodes.
        end: id of the end-of-text token.
        vocab_size: number of ids, added tokens included.
        pretrained: the transformers tokenizer it came from, if any.
    """

    def __init__(self, fast: Tokenizer, end: int, vocab_size: int, pretrained: Any = None) -> None:
        self.fast, self.end, self.vocab_size, self.pretrained = fast, end, vocab_size, pretrained
        self.fast.encode_special_tokens = True  # a document that spells out end-of-text does not end there
        self.fast.no_truncation()
        self.fast.no_padding()

    @classmethod
    def fitted(cls, fast: Tokenizer) -> TextEncoder:
        return cls(fast, fast.get_vocab()[END_OF_TEXT], fast.get_vocab_size())

    @classmethod
    def load(cls, name: str, key: str = "data.pretrained") -> TextEncoder:
        """A pretrained tokenizer from the hub or a folder, which this key of params.yaml names.

        Raises:
            CorpusError: it cannot be loaded, has no fast version or no end-of-text token.
        """
        from transformers import AutoTokenizer

        asked = key if ".yaml: " in key else f"params.yaml: {key}"
        try:
            source, told = where_from(name, f"{asked} {name}")
            loaded = AutoTokenizer.from_pretrained(source, **told)
        except ArtifactError as error:
            raise CorpusError(str(error)) from None
        except Exception as error:  # transformers raises many kinds; each means the same to the user
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise CorpusError(
                f"{asked} {name} cannot be loaded as a tokenizer ({reason}); give a folder with "
                "tokenizer.json, or the name of a model on the hub, which needs the network"
            ) from None
        if not loaded.is_fast or loaded.eos_token_id is None:
            what = "end-of-text token" if loaded.is_fast else "tokenizer.json"
            raise CorpusError(f"{asked} {name} has no {what}; choose another tokenizer")
        size = max(loaded.get_vocab().values()) + 1  # ids may have holes
        return cls(loaded.backend_tokenizer, loaded.eos_token_id, size, loaded)

    def save(self, folder: str | Path) -> None:
        """Writes it in Hugging Face format: `transformers.AutoTokenizer.from_pretrained(folder)` reads it."""
        from transformers import PreTrainedTokenizerFast

        unknown = UNKNOWN if isinstance(self.fast.model, models.WordLevel) else None
        fast = PreTrainedTokenizerFast(tokenizer_object=self.fast, eos_token=END_OF_TEXT, unk_token=unknown)
        try:
            (self.pretrained or fast).save_pretrained(str(folder))
        except Exception as error:  # the tokenizer's own writer has no error class of its own
            raise ArtifactError(f"{folder}: cannot be written ({error}); make room or let it be written") from None

    def encode(self, texts: Iterable[str]) -> Iterator[tuple[np.ndarray, int]]:
        """Token ids (n,) and bytes of each text in order, end-of-text after each; all cores work on many at once."""
        for group in _groups(texts):
            pieces = [piece for text in group for piece in _pieces(text)]
            try:
                encoded = iter(self.fast.encode_batch_fast(pieces, add_special_tokens=False))
            except Exception as error:  # a pretrained one without an unknown token; its errors have no class
                sentence = f"params.yaml: data.tokenizer cannot encode the text ({error}); use another"
                raise CorpusError(sentence) from None
            for text in group:
                parts = [np.array(next(encoded).ids, dtype=np.int32) for _ in _pieces(text)]
                yield (
                    np.concatenate([*parts, np.array([self.end], dtype=np.int32)]),
                    len(text.encode()),
                )

    def token_bytes(self) -> np.ndarray | None:
        """Bytes of text (V,) behind each id, none for end-of-text; None if ids do not stand for fixed bytes.

        In a byte-level vocabulary each character stands for one byte, unless a normalizer or a space put in front
        changes the text. Words lose their case and the white space between them: there the documents are counted.
        """
        before = json.dumps(json.loads(self.fast.to_str())["pre_tokenizer"])
        changed = self.fast.normalizer is not None or '"add_prefix_space": true' in before
        if changed or not isinstance(self.fast.decoder, decoders.ByteLevel):
            return None
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        added = {index: len(token.content.encode()) for index, token in self.fast.get_added_tokens_decoder().items()}
        for token, index in self.fast.get_vocab().items():
            lengths[index] = added.get(index, len(token))
        lengths[self.end] = 0
        return lengths


def write_tokens(
    encoded: Iterable[tuple[np.ndarray, int]], encoder: TextEncoder, writer: BlockWriter, limit: int, keep: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Packs encoded texts into blocks until `limit` tokens are reached, and counts them.

    Args:
        encoded: ids (n,) and bytes of each text, as `encode` yields them.
        encoder: what encoded them.
        writer: takes the ids; it is closed.
        limit: most tokens written.
        keep: most ids returned.

    Returns:
        documents, tokens, bytes, sha256 of the blocks and of their files; and the first `keep` ids of the stream.

    Raises:
        CorpusError: there is less text than one block.
    """
    lengths, kept = encoder.token_bytes(), [np.empty(0, dtype=np.int32)]
    documents = all_bytes = all_ids = predicted_bytes = 0
    for ids, size in encoded:
        documents, all_bytes, all_ids = documents + 1, all_bytes + size, all_ids + len(ids)
        ids = ids[: limit - writer.ids]
        if writer.ids < keep:
            kept.append(ids[: keep - writer.ids])
        if lengths is not None:  # the first id of all is never predicted
            predicted_bytes += int(lengths[ids[0 if writer.ids else 1 :]].sum())
        writer.add(ids)
        if writer.ids == limit:
            break
    writer.close()
    if lengths is None:
        predicted_bytes = round(all_bytes * writer.tokens / all_ids)
    else:  # the incomplete last row was dropped
        predicted_bytes -= int(lengths[writer.pending[1:]].sum())
    facts = {"documents": documents, "tokens": writer.tokens, "bytes": predicted_bytes, "sha256": writer.sha256}
    facts["files_sha256"] = sha256(writer.folder)
    return facts, np.concatenate(kept)


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts by the handful, about PIECE characters together."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _pieces(text: str) -> list[str]:
    """A text longer than PIECE in parts that end with a line where there is one: tokens do not cross their borders."""
    if len(text) <= PIECE:
        return [text]
    return re.findall(rf"(?s).{{1,{PIECE - 1}}}\n|.{{1,{PIECE}}}", text)
