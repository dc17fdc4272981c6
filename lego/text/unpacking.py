"""Compressed files, unpacked beside: to their end, and no further than text can reach."""

from __future__ import annotations

import errno
import gzip
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lego.base.outside import RATIO, allowed
from lego.tokens.blocks import CorpusError

COMPRESSIONS = (".gz", ".zst")
PIECE = 2**20
PACKED_PIECE = (
    2**13
)  # bytes of zstandard at a time: a block of 4 may unpack to 128 KiB, and all of a piece comes at once
LONGEST_WINDOW = 2**31  # bytes; what `zstd --long=31` takes, as the big dumps of forums are written


@contextmanager
def unpacked(file: Path) -> Iterator[Path]:
    """The file itself, or its content unpacked for as long as it is read.

    Raises:
        CorpusError: the file is damaged, cut short, or unpacks to more than any text does.
    """
    compression = file.suffix.lower()
    if compression not in COMPRESSIONS:
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / file.stem
        left = allowed(file.stat().st_size)
        try:
            with file.open("rb") as source, target.open("wb") as sink:
                for piece in _gzip_pieces(source) if compression == ".gz" else _zstd_pieces(source):
                    left -= len(piece)
                    if left < 0:
                        raise too_large(file)
                    sink.write(piece)
        except (OSError, EOFError, zlib.error, _zstd_error()) as error:
            raise unreadable(file, error) from None
        yield target


def _gzip_pieces(source: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=source) as packed:
        while piece := packed.read(PIECE):
            yield piece


def _zstd_pieces(source: BinaryIO) -> Iterator[bytes]:
    """All frames, the last one to its end: zstandard.open takes a file that is cut short for a shorter one."""
    import zstandard

    reader = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW)
    frame = reader.decompressobj()
    while chunk := source.read(PACKED_PIECE):
        while chunk:
            if frame.eof:
                frame = reader.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data
    if not frame.eof:
        raise zstandard.ZstdError("the file is cut short")


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def too_large(file: Path) -> CorpusError:
    """What a bomb is told."""
    return CorpusError(
        f"{file}: unpacks to more than {RATIO} times its size, as no text does; remove it, or, if you trust it, "
        "unpack it yourself into a .txt, .jsonl or .csv file"
    )


def unreadable(file: Path | str, error: Exception) -> Exception:
    """The error as one sentence that names the file, unless the file is sound."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error  # there is no room to unpack it
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    return CorpusError(f"{file}: cannot be read ({reason}); restore or remove the file")
