"""Small files that would fill memory or disk: each is stopped and named before it does."""

from __future__ import annotations

import gzip
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lego.tokens.blocks import CorpusError
from tests.text.test_sources import read


@contextmanager
def memory(largest: int) -> Iterator[None]:
    """No more than this beside what the process has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def bomb(name: str) -> bytes:
    """300 MiB and more of text in as little as can be."""
    if name.endswith(".gz"):
        return gzip.compress(b"a" * 300 * 2**20)
    if name.endswith(".zst"):
        frame = zstandard.ZstdCompressor().compressobj()
        return b"".join([*(frame.compress(b"ab\n" * 2**20) for _ in range(100)), frame.flush()])
    sink, text = pa.BufferOutputStream(), "x" * 10**6
    if name == "chats.parquet":
        same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3000, dtype=np.int32)), [text])
        turns = pa.StructArray.from_arrays([same], ["content"])
        table = pa.table({"text": pa.ListArray.from_arrays([0, 3000], turns)})
    else:
        table = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array(np.zeros(3000, dtype=np.int32)), [text])})
    if name == "page.parquet":
        table = pa.table({"text": [chr(97 + number) * 20 * 2**20 for number in range(20)]})
    pq.write_table(table, sink, compression="zstd", use_dictionary=name != "page.parquet")
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.parquet", "chats.parquet", "page.parquet", "a.parquet.gz"]
)
def test_a_file_that_unpacks_beyond_measure_is_stopped_and_named(tmp_path, name):
    content = bomb(name)
    (tmp_path / name).write_bytes(content)
    assert len(content) < 400_000
    with (
        memory(2**30),
        pytest.raises(CorpusError, match=rf"{name}: unpacks to more than 200 times its size, as no text"),
    ):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "csv", "parquet"])
def test_a_sparse_file_of_a_tebibyte_is_named_at_once(tmp_path, kind):
    with (tmp_path / f"a.{kind}").open("wb") as file:
        file.write(b"text\n")
        file.truncate(2**40)
    with memory(2**30), pytest.raises(CorpusError, match=rf"a\.{kind}: (holds zero bytes|cannot be read \(Parquet)"):
        read(tmp_path)
