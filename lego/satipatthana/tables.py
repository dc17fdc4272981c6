"""Tables of one's own: reading them, and what is wrong with them in one sentence."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from lego.base.harness import StageError


class TaskError(StageError):
    """Data that cannot be used; the message names file, column and row."""


def read_table(file: Path) -> pd.DataFrame:
    """A CSV or Parquet file.

    Raises:
        TaskError: it cannot be read, a row has more fields than the header, or a column is there twice.
    """
    try:
        if file.suffix.lower() == ".parquet":
            return pd.read_parquet(file)
        content = file.read_bytes()  # once, as it may be a pipe
        with warnings.catch_warnings():  # else the first column becomes an index, and all others move
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(io.BytesIO(content), index_col=False)
        header = pd.read_csv(io.BytesIO(content), header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0]
    except pd.errors.ParserWarning:
        raise TaskError(f"{file}: rows have more fields than the header; name every column, or drop one") from None
    except (OSError, ValueError, pd.errors.ParserError) as error:
        what = f"as {file.suffix or 'CSV'} ({' '.join(str(error).split())})"
        raise TaskError(f"{file}: cannot be read {what}; give a CSV file with a header, or a .parquet file") from None
    if (twice := header[header.duplicated() & (header != "")]).any():
        raise TaskError(f"{file}: has the column {twice.iloc[0]} twice; drop or rename one")
    return frame


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
