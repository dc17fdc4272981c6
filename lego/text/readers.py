"""Files of text and tables, plain or compressed, read line by line or row by row."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lego.base.outside import other_separator
from lego.text.unpacking import COMPRESSIONS, unpacked, unreadable
from lego.tokens.blocks import CorpusError

KINDS = (".txt", ".md", ".jsonl", ".csv", ".parquet")
READABLE = f"{', '.join(KINDS)}, each also with {' or '.join(COMPRESSIONS)}"

Row = tuple[int, dict[str, Any]]
"""The number of a row, or of its line in a file of lines, and its cells by column."""


def kind_of(path: Path) -> str | None:
    """One of KINDS, whether or not compressed; None if it is another."""
    name = path.name.lower()
    compression = Path(name).suffix if name.endswith(COMPRESSIONS) else ""
    kind = Path(name.removesuffix(compression)).suffix
    return kind if kind in KINDS else None


class _Text(io.RawIOBase):
    """Bytes of a file, refused at the first zero: a sparse file would else be one line of any size."""

    def __init__(self, source: io.FileIO, name: Path) -> None:
        self.source, self.name = source, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self.source.read(len(buffer))
        if b"\0" in found:
            raise CorpusError(f"{self.name}: holds zero bytes, so it is not text; remove it or convert it to UTF-8")
        buffer[: len(found)] = found
        return len(found)


def lines(file: Path) -> Iterator[str]:
    """Lines with their ends as they are; a byte-order mark is not text."""
    try:
        with unpacked(file) as readable, readable.open("rb", buffering=0) as source:
            yield from io.TextIOWrapper(io.BufferedReader(_Text(source, file), 2**20), "utf-8-sig", newline="")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{file}: is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert it, e.g. with iconv -t utf-8"
        ) from None
    except OSError as error:
        raise unreadable(file, error) from None


def json_rows(file: Path, column: str) -> Iterator[Row]:
    """Objects, one a line; unlike the rows of a table they may differ in their keys."""
    for number, line in enumerate(lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise unreadable(file, ValueError(f"line {number} is nested too deep")) from None
        except json.JSONDecodeError as error:
            raise unreadable(file, ValueError(f"line {number}: {error}")) from None
        except ValueError:  # Python's own limit, which keeps a line from taking minutes
            digits = sys.get_int_max_str_digits()
            raise unreadable(file, ValueError(f"line {number}: a number of more than {digits} digits")) from None
        if not isinstance(row, dict):
            raise unreadable(file, ValueError(f"line {number} is no JSON object"))
        yield number, row


def csv_rows(file: Path, column: str) -> Iterator[Row]:
    """Rows below a header. A cell is text, also where it looks like a number, a date or a missing value."""
    csv.field_size_limit(sys.maxsize)
    text = lines(file)
    header = next(text, "")
    if header and not header.strip(" \t\r\n,"):
        raise CorpusError(f"{file}: line 1 is blank where the names of the columns should stand; remove it")
    if separator := other_separator(header, [column]):
        raise CorpusError(f"{file}: line 1 separates its cells by {separator}; write the file anew with commas")
    reader = csv.DictReader(itertools.chain([header] if header else [], text), strict=True)
    try:
        if twice := {name for name in reader.fieldnames or () if (reader.fieldnames or []).count(name) > 1} & {column}:
            raise CorpusError(f"{file}: line 1 has the column {twice.pop()} twice; drop or rename one")
        for row in reader:
            if None in row:
                raise csv.Error("more cells than the header has; put quotes around text with commas")
            yield reader.line_num, row
    except csv.Error as error:
        raise unreadable(file, ValueError(f"line {reader.line_num}: {error}")) from None
