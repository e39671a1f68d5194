"""Parquet files as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runner.data.formats.files.packed import expansion_limit, too_large
from runner.data.formats.rows import RawTable
from runner.errors import DataError
from runner.utils.text import first_line

_BATCH = 64  # rows that are looked at before more are read


def parquet_table(path: Path, raw: bytes) -> RawTable:
    """Rows in the columns of the file's schema."""
    import pyarrow
    import pyarrow.parquet

    # Equal values are there once: all is counted before it is made.
    limit = expansion_limit(len(raw))
    rows: list[Any] = []
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw))
        leaves = [file.schema.column(n) for n in range(len(file.schema))]
        size = _declared_size(file, [max(8, leaf.length or 0) for leaf in leaves])
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        # As it stands in the file, where an equal text is there once.
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw), read_dictionary=texts)
        groups = range(file.num_row_groups) if size <= limit else ()
        for batch in (b for n in groups for b in file.iter_batches(_BATCH, row_groups=[n])):
            size += sum(map(_text_size, batch.columns))
            if size > limit:
                break
            rows += batch.to_pylist()
    except (pyarrow.ArrowException, MemoryError, OSError, ValueError) as error:
        raise DataError(f"{path}: not valid Parquet: {first_line(error)}") from None
    if size > limit:
        raise too_large(path, len(raw))
    return RawTable(rows, file.schema_arrow.names)


def _declared_size(file: Any, widths: list[int]) -> int:
    """Bytes that a file's columns take without their texts, or as they stand in it if that is
    more."""
    size = 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        for width, column in zip(widths, map(group.column, range(group.num_columns)), strict=True):
            size += max(width * column.num_values, column.total_uncompressed_size)
    return size


def _text_size(array: Any) -> int:
    """Bytes of all texts in an array, however deep."""
    import pyarrow
    import pyarrow.compute

    compute: Any = pyarrow.compute  # whose functions are made when it is imported
    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        lengths = compute.binary_length(array.dictionary).cast("int64")
        return compute.sum(lengths.take(array.indices)).as_py() or 0
    if pyarrow.types.is_struct(kind):
        return sum(map(_text_size, array.flatten()))
    if pyarrow.types.is_map(kind):
        return _text_size(array.keys) + _text_size(array.items)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return _text_size(array.flatten())
    return 0
