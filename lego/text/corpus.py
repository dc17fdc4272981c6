"""Documents, gathered on disk and assigned to splits: nothing here holds more of the text than one document.

A document's split follows from a hash of its group, its place within the split from a hash of its name. So neither
depends on the order of files or rows, and a cut after some tokens is a sample of the whole split.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from lego.base.artifacts import named
from lego.tokens.blocks import CorpusError

if TYPE_CHECKING:
    from datasketch import MinHash


class FewDocumentsError(CorpusError):
    """A split has no document; `documents` says how many different ones there are."""

    documents: int = 0


SPLITS = ("train", "validation", "calibration", "test")
SPOOL_BYTES = 2**20  # text per record batch of the spool file
SHINGLE = 5  # words per shingle of near-duplicate detection


@dataclass(frozen=True)
class Document:
    """One text. Documents of the same `group` always share a split."""

    name: str
    group: str
    text: str


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


def _digest(text: str) -> int:
    """64 bits of SHA-256: among a million documents two share them with a probability of 3e-8."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class Corpus:
    """Documents in one Arrow file on disk, by split, exact duplicates left out.

    Args:
        documents: read once, one at a time; those without a visible character are skipped.
        path: the file to write; it must outlive the corpus.
        shares: validation, calibration and test, as in `split_of`.
        enough: stop reading once each split has this many bytes, if given.

    Raises:
        FewDocumentsError: a split has no document.
    """

    def __init__(
        self, documents: Iterable[Document], path: Path, shares: dict[str, float], enough: dict[str, int] | None = None
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.first: list[int] = [0]  # number of the first document of each record batch, and one past the last
        with named(path):
            places, contents, homes, sizes = map(np.array, self._write(documents, shares, enough))
        self.documents = len(places)
        self.bytes: dict[str, int] = {}  # of each split, duplicates left out
        self._arrange(places, contents, homes, sizes)

    def _write(
        self, documents: Iterable[Document], shares: dict[str, float], enough: dict[str, int] | None
    ) -> tuple[array[int], array[int], array[int], array[int]]:
        """Hashes of name and content, number of the split, and bytes of each document written."""
        places, contents, homes, lengths = array("Q"), array("Q"), array("B"), array("Q")
        sizes = dict.fromkeys(SPLITS, 0)
        pending: list[str] = []
        seen: set[int] = set()  # of a stream, which ends; a duplicate in it adds nothing
        size = 0
        schema = pa.schema([("text", pa.large_string())])
        with pa.OSFile(str(self.path), "wb") as file, pa.ipc.new_file(file, schema) as writer:

            def flush() -> None:
                writer.write_batch(pa.record_batch([pa.array(pending, pa.large_string())], schema=schema))
                self.first.append(len(places))
                pending.clear()

            for document in documents:
                if not document.text.strip():
                    continue
                split = split_of(document.group, **shares)
                places.append(_digest(document.name))
                contents.append(_digest(document.text))
                homes.append(SPLITS.index(split))
                lengths.append(len(document.text.encode()))
                pending.append(document.text)
                size += len(document.text)
                if size >= SPOOL_BYTES:
                    flush()
                    size = 0
                if enough and contents[-1] not in seen:
                    seen.add(contents[-1])
                    sizes[split] += lengths[-1]
                    if all(sizes[name] >= enough[name] for name in SPLITS):
                        break
            if pending:
                flush()
        return places, contents, homes, lengths

    def _arrange(self, places: np.ndarray, contents: np.ndarray, homes: np.ndarray, sizes: np.ndarray) -> None:
        kept = np.unique(contents, return_index=True)[1] if len(contents) else np.empty(0, dtype=np.int64)
        self.duplicates = len(contents) - len(kept)
        kept = kept[np.lexsort((kept, places[kept]))]  # by place; by number where names are equal
        self.order = {split: kept[homes[kept] == index] for index, split in enumerate(SPLITS)}
        for split, numbers in self.order.items():
            if not len(numbers):
                key = f"data.{split}_share" if split != "train" else "data.validation_share"
                error = FewDocumentsError(
                    f"params.yaml: {key} leaves the {split} split without a document (of {len(kept)} different ones); "
                    "change it, give more documents, or cut a big file into documents with data.split_on"
                )
                error.documents = len(kept)
                raise error
            self.bytes[split] = int(sizes[numbers].sum())

    def texts(self, split: str) -> Iterator[str]:
        """The texts of a split, in the order of their hashed names."""
        with pa.memory_map(str(self.path)) as file:
            reader = pa.ipc.open_file(file)
            batches = np.searchsorted(self.first, self.order[split], side="right") - 1
            for number, batch in zip(self.order[split].tolist(), batches.tolist(), strict=True):
                yield reader.get_batch(batch).column(0)[number - self.first[batch]].as_py()


class NearDuplicates:
    """Leaves out documents that nearly repeat one of an earlier split (MinHash, Broder 1997; LSH by datasketch).

    Args:
        similarity: estimated Jaccard similarity of word 5-grams from which a document is left out.
        permutations: of the estimate; its standard error is about 1 / sqrt(permutations).
    """

    def __init__(self, similarity: float, permutations: int = 128) -> None:
        from datasketch import MinHashLSH  # the option is rarely chosen, and scipy comes with it

        self.similarity, self.permutations = similarity, permutations
        # candidates are looked up generously and then compared: the index alone misses some and invents others
        self.index = MinHashLSH(threshold=0.9 * similarity, num_perm=permutations, weights=(0.1, 0.9))
        self.hashes: dict[int, MinHash] = {}
        self.pending: list[MinHash] = []
        self.dropped = 0

    def novel(self, texts: Iterable[str], remember: bool) -> Iterator[str]:
        """The texts of one split that resemble none of the splits before.

        Args:
            texts: in order.
            remember: whether later splits must not resemble these texts; false for the last split.
        """
        from datasketch import MinHash

        for one in self.pending:  # of the splits before, whether or not they were read to their end
            self.index.insert(len(self.hashes), one)
            self.hashes[len(self.hashes)] = one
        self.pending.clear()
        for text in texts:
            words = text.lower().split()
            shingles = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
            one = MinHash(num_perm=self.permutations)
            one.update_batch([shingle.encode() for shingle in sorted(shingles)])
            if any(one.jaccard(self.hashes[key]) >= self.similarity for key in self.index.query(one)):
                self.dropped += 1
                continue
            if remember:
                self.pending.append(one)
            yield text
