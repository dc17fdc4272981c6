"""Tables of one's own: reading them, and what is wrong with them in one sentence."""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from lego.base.harness import StageError
from lego.base.outside import RATIO, allowed, other_separator, special


class TaskError(StageError):
    """Data that cannot be used; the message names file, column and row."""


def read_table(file: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """A CSV or Parquet file.

    Args:
        file: its path.
        columns: those that are needed; of a Parquet file no others are read, so what they hold does not matter.

    Raises:
        TaskError: it cannot be read, a row has more fields than the header, or a column is there twice.
    """
    try:
        if (what := special(file)) and not str(file).startswith("/dev/fd/") and file != Path("/dev/stdin"):
            raise TaskError(f"{file}: is {what}, not a file; save what it gives, or hand it over as /dev/stdin")
        if file.suffix.lower() == ".parquet":
            return _read_parquet(file, columns)
        content = _text(file)  # once, as it may be a pipe
        with warnings.catch_warnings():  # else the first column becomes an index, and all others move
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(io.BytesIO(content), index_col=False)
        header = pd.read_csv(io.BytesIO(content), header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0]
    except pd.errors.ParserWarning:
        raise _other_separator(file, content, columns or ()) or TaskError(
            f"{file}: rows have more fields than the header; name every column, or drop one"
        ) from None
    except (OSError, ValueError, OverflowError, MemoryError, pd.errors.ParserError) as error:
        what = f"as {file.suffix or 'CSV'} ({' '.join(str(error).split())})"
        raise TaskError(f"{file}: cannot be read {what}; give a CSV file with a header, or a .parquet file") from None
    if wrong := _other_separator(file, content, columns or ()):
        raise wrong
    if not any(name.strip() for name in header):
        raise TaskError(f"{file}: line 1 is blank where the names of the columns should stand; remove it")
    if (twice := header[header.duplicated() & (header != "")]).any():
        raise TaskError(f"{file}: has the column {twice.iloc[0]} twice; drop or rename one")
    return frame


def _read_parquet(file: Path, columns: list[str] | None) -> pd.DataFrame:
    """The columns that are there of those that are needed.

    Raises:
        TaskError: a small file would fill the memory.
    """
    about = pq.read_metadata(file)
    values = about.num_rows * about.num_columns
    packed = sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups))
    if max(8 * values, packed) > allowed(file.stat().st_size):
        raise TaskError(
            f"{file}: unpacks to {values:,} values, more than {RATIO} times its size; give fewer rows, or a CSV "
            "file if it is sound"
        )
    names = about.schema.to_arrow_schema().names
    there = None if columns is None else [name for name in dict.fromkeys(columns) if name in names]
    return pd.read_parquet(file, columns=there)


def _text(file: Path) -> bytes:
    """The bytes of a CSV file up to the first zero, with which text ends: a sparse file may go on for terabytes."""
    parts = []
    with file.open("rb") as source:
        while part := source.read(2**20):
            if b"\0" in part:
                raise ValueError("it holds zero bytes, so it is not text")
            parts.append(part)
    return b"".join(parts)


def _other_separator(file: Path, content: bytes, wanted: Collection[str]) -> TaskError | None:
    separator = other_separator(content.lstrip().partition(b"\n")[0].decode(errors="replace"), wanted)
    return TaskError(f"{file}: separates its cells by {separator}; write it anew with commas") if separator else None


def features_of(frame: pd.DataFrame, columns: list[str], name: str) -> np.ndarray:
    """The named columns (n, features).

    Raises:
        TaskError: a column is missing, not numeric, or has a missing or infinite value.
    """
    if missing := [column for column in columns if column not in frame]:
        raise TaskError(f"{name}: has no column {', '.join(missing[:3])}; give all {len(columns)} that were trained on")
    if not len(frame):
        raise TaskError(f"{name}: has no rows; give at least one below the header")
    chosen = frame[columns]
    for column in columns:
        if not pd.api.types.is_numeric_dtype(chosen[column]):
            raise TaskError(f"{name}: column {column} is not numeric; write it as numbers, or leave it out of training")
    values = chosen.to_numpy(dtype=np.float64)
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise TaskError(
            f"{name}: row {row}, column {columns[column]} is not a finite number; fill it or leave the row out"
        )
    return values


def labelled(
    frame: pd.DataFrame, label: str, name: str, numbers: bool = False
) -> tuple[pd.DataFrame, np.ndarray, list[str]]:
    """Features, answers (n,), and the names of the classes or of the number.

    Args:
        frame: a table.
        label: its column of answers.
        name: of the table, for messages.
        numbers: whether answers are numbers.

    Raises:
        TaskError: there is no such column, numbers that are none, or a class has fewer than four rows.
    """
    if label not in frame:
        raise TaskError(
            f"{name}: has no column {label}; task.label must name one of {', '.join(map(str, frame.columns))}"
        )
    x = frame.drop(columns=label)
    if x.columns.empty:
        raise TaskError(f"{name}: has no column beside {label}; give at least one to learn from")
    features_of(x, list(x.columns), name)
    if numbers:
        return x, features_of(frame, [label], name)[:, 0], [label]
    codes, values = pd.factorize(frame[label], sort=True)
    if (codes < 0).any():
        raise TaskError(f"{name}: column {label} has a missing value in row {int(np.argmax(codes < 0))}")
    counts = np.bincount(codes)
    if len(counts) < 2 or counts.min() < 4:
        raise TaskError(f"{name}: column {label} needs at least two classes of four rows each")
    return x, codes, [str(value) for value in values]
