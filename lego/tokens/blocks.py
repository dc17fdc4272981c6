"""Packed blocks of token ids: written as they come, read memory-mapped.

A split is one stream of tokens: its documents in hashed order, an end-of-text token after each. The stream is cut into
blocks of seq_len tokens, so a block may hold the end of one document and the start of the next. Each row stores
seq_len + 1 ids; the last one is only a target and opens the next row, so every token but the first is predicted once.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch import Tensor

from lego.base.artifacts import ArtifactError, derived_seed, named, read_checked, read_json, sha256
from lego.base.digests import inside, verify, way_back

ROWS_AT_A_TIME = 8192  # blocks per record batch


class CorpusError(ArtifactError):
    """Text that cannot be turned into blocks; the message names the key or file and the remedy."""


def pack(ids: np.ndarray, seq_len: int) -> np.ndarray:
    """Rows (n, seq_len + 1) of a token stream (m,); neighbours overlap by one id, an incomplete last row is dropped."""
    n = max(0, (len(ids) - 1) // seq_len)
    starts = np.arange(n)[:, None] * seq_len  # (n, 1)
    return ids[starts + np.arange(seq_len + 1)]  # (n, seq_len + 1)


class BlockWriter:
    """Packs a token stream into an Arrow dataset with the one column `input_ids`, a few thousand blocks at a time.

    Args:
        folder: the dataset to write.
        seq_len: tokens per block.
    """

    def __init__(self, folder: str | Path, seq_len: int) -> None:
        self.folder, self.seq_len = Path(folder), seq_len
        self.scratch = self.folder.with_name(f".{self.folder.name}.arrow")
        self.schema = pa.schema([("input_ids", pa.list_(pa.int32(), seq_len + 1))])
        self.file = pa.OSFile(str(self.scratch), "wb")
        self.writer = pa.ipc.new_stream(self.file, self.schema)
        self.pending = np.empty(0, dtype=np.int32)
        self.parts: list[np.ndarray] = []  # taken since the last rows were written
        self.waiting = 0  # ids in pending and parts
        self.digest = hashlib.sha256()
        self.rows = self.ids = 0

    def add(self, ids: np.ndarray) -> None:
        """Takes the next ids (m,) of the stream."""
        self.ids += len(ids)
        self.waiting += len(ids)
        self.parts.append(ids.astype(np.int32))
        if self.waiting > ROWS_AT_A_TIME * self.seq_len:
            with named(self.folder):
                self._flush()

    def _flush(self) -> None:
        ids = np.concatenate([self.pending, *self.parts])
        rows = pack(ids, self.seq_len)
        self.pending = ids[len(rows) * self.seq_len :].copy()
        self.parts, self.waiting = [], len(self.pending)
        for part in np.array_split(rows, range(ROWS_AT_A_TIME, len(rows), ROWS_AT_A_TIME)):
            column = pa.FixedSizeListArray.from_arrays(part.ravel(), self.seq_len + 1)
            self.writer.write_batch(pa.record_batch([column], schema=self.schema))
        self.digest.update(np.ascontiguousarray(rows).tobytes())
        self.rows += len(rows)

    def close(self) -> None:
        """Writes the dataset in the format that `datasets.load_from_disk` reads.

        Raises:
            CorpusError: the stream was shorter than one row.
        """
        with named(self.folder):
            self._flush()
            self.writer.close()
            self.file.close()
        if not self.rows:
            self.scratch.unlink()
            raise CorpusError(
                f"params.yaml: model.seq_len is {self.seq_len}, but the {self.folder.name} split has only {self.ids} "
                "tokens; lower it, or raise data.max_*_tokens or the split's share"
            )
        import datasets

        datasets.disable_progress_bars()
        table = datasets.Dataset.from_file(str(self.scratch)).data
        # the fingerprint names datasets' own cache files; taken from the content, so that equal text gives equal bytes
        with named(self.folder):
            datasets.Dataset(table, fingerprint=self.sha256[:16]).save_to_disk(str(self.folder))
        self.scratch.unlink()

    @property
    def sha256(self) -> str:
        """Of the rows as int32."""
        return self.digest.hexdigest()

    @property
    def tokens(self) -> int:
        """Predicted tokens: each row has seq_len targets."""
        return self.rows * self.seq_len


def _read_arrow(folder: Path) -> list[np.ndarray]:
    """The rows (n, seq_len + 1) that a BlockWriter wrote, in pieces, each mapped into memory.

    `datasets.load_from_disk` would map the same files, but importing it costs every stage a second.
    """
    listed = folder / "state.json"
    files = [inside(folder, entry["filename"], listed) for entry in read_json(listed, "_data_files")["_data_files"]]
    pieces = []
    for file in files:
        column = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()["input_ids"]
        width = column.type.list_size
        pieces += [chunk.flatten().to_numpy().reshape(-1, width) for chunk in column.chunks]
    return pieces


class PackedBlocks:
    """Memory-mapped blocks of one split.

    Args:
        folder: the tokenize stage's output, data/tokens.
        split: one of SPLITS.
        part: (from, to) as shares of the split's blocks; default all.
        shuffle_seed: of a permutation of the split's blocks, of which the part is cut; default the order of the text.

    Raises:
        ArtifactError: the folder is missing or damaged.
    """

    def __init__(
        self, folder: str | Path, split: str, part: tuple[float, float] = (0.0, 1.0), shuffle_seed: int | None = None
    ) -> None:
        source = Path(folder) / split
        if (Path(folder) / "corpus.json").exists():  # first of all: Arrow ends the process at some damages
            facts = corpus_facts(folder)["splits"]
            if split not in facts:
                what = f"says nothing of {split}; {way_back(Path(folder) / 'corpus.json')}"
                raise ArtifactError(f"{folder}/corpus.json: {what}")
            if not verify(source) and source.exists() and facts[split]["files_sha256"] != sha256(source):
                raise ArtifactError(f"{source}: was changed; {way_back(source)}")
        try:
            self.pieces = _read_arrow(source)
            self.starts = np.cumsum([0, *(len(piece) for piece in self.pieces)])
            self.seq_len = self.pieces[0].shape[1] - 1
        except (OSError, pa.ArrowException, KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{source}: cannot be read ({error}); run dvc repro to make it") from None
        total = int(self.starts[-1])
        self.first, last = (round(share * total) for share in part)
        self.count = last - self.first
        self.order = None if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(total)
        if self.count < 1:
            raise CorpusError(
                f"{source}: the part {part[0]:g} to {part[1]:g} of its {total} blocks is empty; "
                "change params.yaml: ashem.phase2_share or raise data.max_train_tokens"
            )

    def __len__(self) -> int:
        return self.count

    @property
    def tokens(self) -> int:
        """Predicted tokens: each row has seq_len targets."""
        return self.count * self.seq_len

    def rows(self, indices: Tensor) -> Tensor:
        """Token ids (b, seq_len + 1) of the blocks at `indices` (b,)."""
        wanted = indices.numpy() + self.first
        if self.order is not None:
            wanted = self.order[wanted]
        piece = np.searchsorted(self.starts, wanted, side="right") - 1
        rows = [self.pieces[p][row] for p, row in zip(piece, wanted - self.starts[piece], strict=True)]
        return torch.from_numpy(np.stack(rows)).long()

    def targets(self) -> np.ndarray:
        """Ids of all predicted tokens (n,), in the order of the text."""
        parts = torch.arange(len(self)).split(1024)
        return torch.cat([self.rows(part)[:, 1:] for part in parts]).flatten().numpy()


def train_text(
    folder: str | Path, phase: int, phase2_share: float, phase2_split: str, seed: int, phase2_text: str = "fresh"
) -> PackedBlocks:
    """The train text of a phase: phase 1 has 1 - phase2_share of it, phase 2 the rest, or the `same`.

    Args:
        folder: the tokenize stage's output.
        phase: 1 or 2.
        phase2_share, phase2_split, phase2_text: keys of the section `ashem`.
        seed: of the run, from which a division by blocks follows.

    Raises:
        CorpusError: the part is empty.
    """
    part = (0.0, 1.0 - phase2_share) if phase == 1 or phase2_text == "same" else (1.0 - phase2_share, 1.0)
    return PackedBlocks(folder, "train", part, derived_seed(seed, "phases") if phase2_split == "blocks" else None)


class _Split(BaseModel):
    model_config = ConfigDict(strict=True)
    documents: PositiveInt
    tokens: PositiveInt
    bytes: PositiveInt
    sha256: str
    files_sha256: str


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True)
    vocab_size: PositiveInt
    seq_len: PositiveInt
    end_of_text: NonNegativeInt
    splits: dict[str, _Split]


def corpus_facts(folder: str | Path) -> dict[str, Any]:
    """What tokenize counted: vocab_size, seq_len, the id end_of_text and by split documents, tokens, bytes and sha256.

    Raises:
        ArtifactError: corpus.json is missing or not as it was written.
    """
    return read_checked(Path(folder) / "corpus.json", _Facts)


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
