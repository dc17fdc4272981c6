"""Parquet files: the one column that is wanted, whatever the others hold, and no more of it than text can be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lego.base.outside import allowed
from lego.text.readers import Row
from lego.text.unpacking import too_large, unpacked, unreadable
from lego.tokens.blocks import CorpusError

BAD_FILE = (OSError, pa.ArrowException, KeyError, ValueError, NotImplementedError, OverflowError)


def parquet_rows(file: Path, column: str) -> Iterator[Row]:
    """Rows of one column; if there is no such column, one row that names those there are."""
    with unpacked(file) as readable:
        try:
            with pq.ParquetFile(readable) as table:
                names = table.schema_arrow.names
                parts = _text_parts(table, column)
            if names.count(column) > 1:
                raise CorpusError(f"{file}: has the column {column} twice; drop or rename one")
            if not parts:
                yield 1, dict.fromkeys(names)
                return
            # as dictionaries: else a text that a small file repeats a thousand times takes its thousandfold at once
            with pq.ParquetFile(readable, read_dictionary=parts) as table:
                yield from ((number, {column: value}) for number, value in _values(table, column, parts, file))
        except BAD_FILE as error:
            raise unreadable(file, error) from None


def _text_parts(table: pq.ParquetFile, column: str) -> list[str]:
    """Paths within a column that hold text; all of them if none does, so that the reader can say what it holds.

    Of a chat whose turns bear a date the date is not read: it may be one that Python has no name for.
    """
    top = table.schema_arrow.get_field_index(column)
    if top < 0:
        return []
    leaves = [_leaves(field.type) for field in table.schema_arrow]
    first = sum(leaves[:top])
    found = [table.schema.column(number) for number in range(first, first + leaves[top])]
    text = [leaf.path for leaf in found if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL"]
    return text or [leaf.path for leaf in found]


def _leaves(kind: pa.DataType) -> int:
    """Columns that a type takes in a Parquet file."""
    if pa.types.is_dictionary(kind):
        return 1
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return sum(_leaves(kind.field(number).type) for number in range(kind.num_fields)) if kind.num_fields else 1


def _values(table: pq.ParquetFile, column: str, parts: list[str], file: Path) -> Iterator[tuple[int, Any]]:
    """Values with the numbers of their rows, a thousand at a time."""
    left, number = allowed(file.stat().st_size), 0
    groups = [table.metadata.row_group(index) for index in range(table.metadata.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    if sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in parts) > left:
        raise too_large(file)
    for batch in table.iter_batches(batch_size=1000, columns=parts) if table.metadata.num_rows else ():
        values = batch.column(batch.schema.get_field_index(column))
        left -= len(values) + _bytes(values)
        if left < 0:
            raise too_large(file)
        if pa.types.is_temporal(values.type):
            kind = str(values.type).split("[")[0]
            raise CorpusError(f"{file}: {column} holds {kind}, not text; set params.yaml: data.column")
        for value in values:
            number += 1
            yield number, value.as_py()


def _bytes(values: pa.Array) -> int:
    """Bytes of text that an array stands for."""
    kind = values.type
    if pa.types.is_dictionary(kind) and not pa.types.is_primitive(kind.value_type):
        lengths = pc.binary_length(values.dictionary.cast(pa.large_binary()))
        return pc.sum(lengths.take(values.indices)).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(_bytes(part) for part in values.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        return _bytes(values.flatten() if not pa.types.is_map(kind) else values.items) + len(values)
    return values.nbytes
