"""Text to packed blocks: documents, splits by module, tokenizer, Arrow files (written and read through `datasets`).

A split is one stream of tokens: its documents in hashed order, an end-of-text token after each. The stream is cut into
blocks of seq_len tokens, so a block may hold the end of one document and the start of the next. Each row stores
seq_len + 1 ids; the last one is only a target and opens the next row, so every token but the first is predicted once.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from lego.artifacts import ArtifactError, read_json

SPLITS = ("train", "validation", "calibration", "test")
END_OF_TEXT = "<|endoftext|>"
# tests/ and data-like packages: 82 % of the lines of encodings/ stand in a sibling file
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
EXCLUDED_FILES = "_sysconfigdata"  # written by the build of this very interpreter, paths included


class CorpusError(ArtifactError):
    """Text that cannot be turned into blocks; the message names the key or file and the remedy."""


@dataclass(frozen=True)
class Document:
    """One text. Documents of the same `group` always share a split."""

    name: str
    group: str
    text: str


def stdlib_documents(root: str | Path | None = None) -> list[Document]:
    """The running interpreter's standard library: its .py files without tests and site-packages.

    Args:
        root: folder to read instead. The group of a file is its top-level module or package.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if EXCLUDED_FOLDERS.intersection(parts[:-1]) or path.name.startswith(EXCLUDED_FILES):
            continue
        documents.append(Document("/".join(parts), parts[0].removesuffix(".py"), path.read_text("utf-8", "replace")))
    if not documents:
        raise CorpusError(f"{root}: holds no .py file of a standard library; use a Python that ships its sources")
    return documents


def unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def split_of(group: str, validation: float, calibration: float, test: float) -> str:
    """The split of a group of documents, by a stable hash of its name.

    Args:
        group: what must not straddle two splits.
        validation, calibration, test: shares of the groups; train has the rest.
    """
    position = unit_hash(group)
    for split, size in (("test", test), ("calibration", calibration), ("validation", validation)):
        if position < size:
            return split
        position -= size
    return "train"


def split_documents(documents: Iterable[Document], **shares: float) -> dict[str, list[Document]]:
    """Documents by split, each in hashed order, so that a cut after some tokens is a sample of the whole split.

    Raises:
        CorpusError: a split has no document.
    """
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest()):
        splits[split_of(document.group, **shares)].append(document)
    for split, members in splits.items():
        if not members:
            raise CorpusError(f"params.yaml: data.{split}_share leaves the {split} split without a document; change it")
    return splits


def fit_bpe(texts: Iterable[str], vocab_size: int, max_bytes: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) fitted on the first max_bytes of the texts.

    Raises:
        CorpusError: the text is too small to fill the vocabulary.
    """

    def capped() -> Iterator[str]:
        left = max_bytes
        for text in texts:
            if left <= 0:
                return
            yield text[:left]
            left -= len(text.encode())

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(capped(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise CorpusError(
            f"params.yaml: data.vocab_size is {vocab_size}, but the train text fills only "
            f"{tokenizer.get_vocab_size()} entries; lower it or use more text"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes the tokenizer in Hugging Face format: `transformers.AutoTokenizer.from_pretrained(folder)` reads it."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(str(folder))


def encode(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, int]:
    """Token ids (n,) of the texts, end-of-text after each, cut after max_tokens; and how many texts it took."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.encode_special_tokens = True  # a document that spells out end-of-text does not end there
    parts: list[np.ndarray] = []
    total = used = 0
    queue = iter(texts)
    while total < max_tokens and (batch := list(islice(queue, 64))):  # encode_batch uses all cores
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            if total >= max_tokens:
                break
            parts.append(np.array([*encoding.ids, end], dtype=np.int32))
            total += len(parts[-1])
            used += 1
    return np.concatenate(parts)[:max_tokens], used


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text (V,) behind each id: one byte a character in the byte-level alphabet, none for end-of-text."""
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token == END_OF_TEXT else len(token)
    return lengths


def pack(ids: np.ndarray, seq_len: int) -> np.ndarray:
    """Rows (n, seq_len + 1) of a token stream (m,); neighbours overlap by one id, an incomplete last row is dropped.

    Raises:
        CorpusError: the stream is shorter than one row.
    """
    n = (len(ids) - 1) // seq_len
    if n < 1:
        raise CorpusError(
            f"params.yaml: model.seq_len is {seq_len}, but a split has only {len(ids)} tokens; "
            "lower it, or raise data.max_*_tokens or the split's share"
        )
    starts = np.arange(n)[:, None] * seq_len  # (n, 1)
    return ids[starts + np.arange(seq_len + 1)]  # (n, seq_len + 1)


def save_blocks(rows: np.ndarray, folder: str | Path) -> None:
    """Writes packed rows (n, seq_len + 1) as an Arrow dataset with the one column `input_ids`."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=rows.shape[1])})
    # the fingerprint names datasets' own cache files; taken from the content, so that equal text gives equal bytes
    fingerprint = hashlib.sha256(rows.tobytes()).hexdigest()[:16]
    table = datasets.Dataset.from_dict({"input_ids": rows}, features=features).data
    datasets.Dataset(table, fingerprint=fingerprint).save_to_disk(str(folder))


def _read_arrow(folder: Path) -> np.ndarray:
    """The rows (n, seq_len + 1) that save_blocks wrote, mapped into memory where the file is one piece.

    `datasets.load_from_disk` would map the same file, but importing it costs every stage a second.
    """
    files = [folder / entry["filename"] for entry in read_json(folder / "state.json")["_data_files"]]
    chunks = []
    for file in files:
        column = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()["input_ids"]
        width = column.type.list_size
        chunks += [chunk.flatten().to_numpy().reshape(-1, width) for chunk in column.chunks]
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


class PackedBlocks:
    """Memory-mapped blocks of one split.

    Args:
        folder: the tokenize stage's output, data/tokens.
        split: one of SPLITS.
        part: (from, to) as shares of the split's blocks; default all.

    Raises:
        ArtifactError: the folder is missing or damaged.
    """

    def __init__(self, folder: str | Path, split: str, part: tuple[float, float] = (0.0, 1.0)) -> None:
        source = Path(folder) / split
        try:
            self.table = _read_arrow(source)  # (n, seq_len + 1)
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise ArtifactError(f"{source}: cannot be read ({error}); run dvc repro to make it") from None
        self.first, last = (round(share * len(self.table)) for share in part)
        self.count = last - self.first
        if self.count < 1:
            raise CorpusError(
                f"{source}: the part {part[0]:g} to {part[1]:g} of its {len(self.table)} blocks is empty; "
                "change params.yaml: ashem.phase2_share or raise data.max_train_tokens"
            )
        self.seq_len = self.table.shape[1] - 1

    def __len__(self) -> int:
        return self.count

    @property
    def tokens(self) -> int:
        """Predicted tokens: each row has seq_len targets."""
        return self.count * self.seq_len

    def rows(self, indices: Tensor) -> Tensor:
        """Token ids (b, seq_len + 1) of the blocks at `indices` (b,)."""
        return torch.from_numpy(self.table[(indices + self.first).numpy()]).long()


def train_part(phase2_share: float, phase: int, phase2_text: str = "fresh") -> tuple[float, float]:
    """Part of train that a phase reads: phase 1 the first 1 - phase2_share, phase 2 the rest, or the `same`."""
    seen = (0.0, 1.0 - phase2_share)
    return seen if phase == 1 or phase2_text == "same" else (1.0 - phase2_share, 1.0)


def corpus_facts(folder: str | Path) -> dict[str, Any]:
    """What tokenize counted: vocab_size, seq_len and `splits: {split: {tokens, bytes, documents, sha256}}`."""
    return read_json(Path(folder) / "corpus.json", "vocab_size", "seq_len", "splits")


def bits_per_byte(ppl: float, facts: dict[str, Any]) -> float:
    """Loss in bits per byte of text, comparable across tokenizers.

    Args:
        ppl: perplexity per token of a split.
        facts: what `corpus_facts` says of that split.
    """
    return math.log2(ppl) * facts["tokens"] / facts["bytes"]


def data_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each split's blocks, for the record of a stage."""
    return {f"{split}_sha256": facts["sha256"] for split, facts in corpus_facts(folder)["splits"].items()}
