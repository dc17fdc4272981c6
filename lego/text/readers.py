"""Files of text and tables, plain or compressed, read line by line or row by row."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lego.tokens.blocks import CorpusError

KINDS = (".txt", ".md", ".jsonl", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
READABLE = f"{', '.join(KINDS)}, each also with {' or '.join(COMPRESSIONS)}"


def kind_of(path: Path) -> tuple[str | None, str]:
    """One of KINDS, None if it is another, and the compression, if any."""
    name = path.name.lower()
    compression = Path(name).suffix if name.endswith(COMPRESSIONS) else ""
    kind = Path(name.removesuffix(compression)).suffix
    return kind if kind in KINDS else None, compression


@contextmanager
def unpacked(file: Path) -> Iterator[Path]:
    """The file itself, or its content unpacked for as long as it is read.

    Raises:
        CorpusError: the file is damaged or cut short.
    """
    compression = kind_of(file)[1]
    if not compression:
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / file.stem
        try:
            with file.open("rb") as source, unpacked.open("wb") as target:
                if compression == ".gz":
                    shutil.copyfileobj(gzip.GzipFile(fileobj=source), target)
                else:
                    _unpack_zstd(source, target)
        except (OSError, EOFError, zlib.error, _zstd_error()) as error:
            raise _unreadable(file, error) from None
        yield unpacked


def _unpack_zstd(source: BinaryIO, target: BinaryIO) -> None:
    """All frames, the last one to its end: zstandard.open takes a file that is cut short for a shorter one."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    while chunk := source.read(2**20):
        while chunk:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            target.write(frame.decompress(chunk))
            chunk = frame.unused_data
    if not frame.eof:
        raise zstandard.ZstdError("the file is cut short")


def lines(file: Path) -> Iterator[str]:
    """Lines with their ends as they are; a byte-order mark is not text."""
    try:
        with unpacked(file) as readable, readable.open(encoding="utf-8-sig", newline="") as handle:
            for line in handle:
                if "\0" in line:
                    raise CorpusError(f"{file}: holds zero bytes, so it is not text; remove it or convert it to UTF-8")
                yield line
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{file}: is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert it, e.g. with iconv -t utf-8"
        ) from None
    except OSError as error:
        raise _unreadable(file, error) from None


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def _unreadable(file: Path | str, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error  # the file is sound: there is no room to unpack it
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    return CorpusError(f"{file}: cannot be read ({reason}); restore or remove the file")


def json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Objects, one a line; unlike the rows of a table they may differ in their keys."""
    for number, line in enumerate(lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _unreadable(file, ValueError(f"line {number}: {error}")) from None
        if not isinstance(row, dict):
            raise _unreadable(file, ValueError(f"line {number} is no JSON object"))
        yield row


def csv_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows below a header. A cell is text, also where it looks like a number, a date or a missing value."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(lines(file), strict=True)
    try:
        for row in reader:
            if None in row:
                raise csv.Error("more cells than the header has; put quotes around text with commas")
            yield row
    except csv.Error as error:
        raise _unreadable(file, ValueError(f"line {reader.line_num}: {error}")) from None


def parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows, a thousand at a time."""
    with unpacked(file) as readable:
        try:
            with pq.ParquetFile(readable) as table:
                for batch in table.iter_batches(batch_size=1000) if table.metadata.num_rows else ():
                    yield from batch.to_pylist()
        except (OSError, pa.ArrowException, KeyError, ValueError, NotImplementedError) as error:
            raise _unreadable(file, error) from None
