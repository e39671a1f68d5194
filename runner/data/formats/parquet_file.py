"""Parquet files as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runner.data.formats.rows import RawTable
from runner.errors import DataError
from runner.utils.text import first_line

_EXPANSION = 100  # times that a file may grow when it is read, beyond 256 MiB
_BATCH = 64  # rows, at most, that are looked at before more are read


def parquet_table(path: Path, raw: bytes) -> RawTable:
    """Rows in the columns of the file's schema."""
    import pyarrow
    import pyarrow.parquet

    # A few megabytes can stand for any number of equal texts.
    limit = _EXPANSION * len(raw) + 2**28
    rows: list[Any] = []
    size = 0
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw))
        names = file.schema_arrow.names
        largest = _largest_row(file.metadata)
        if largest > limit:
            raise DataError(f"{path}: its {len(raw):,} bytes hold more than {limit:,} of content")
        for batch in file.iter_batches(batch_size=min(_BATCH, limit // max(1, largest))):
            # Of every column and all that is nested in it; a dictionary as the texts it stands for.
            plain = (
                part.dictionary_decode() if pyarrow.types.is_dictionary(part.type) else part
                for part in batch.columns
            )
            size += sum(part.nbytes for part in plain)
            if size > limit:
                raise DataError(
                    f"{path}: its {len(raw):,} bytes hold more than {limit:,} of content"
                )
            rows += batch.to_pylist()
    except (pyarrow.ArrowException, MemoryError, OSError, ValueError) as error:
        raise DataError(f"{path}: not valid Parquet: {first_line(error)}") from None
    return RawTable(rows, names)


def _largest_row(metadata: Any) -> int:
    """Bytes that no row of a file exceeds: a row lies in one group, and a text that is named often
    stands in the group once."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = ([group.column(place) for place in range(group.num_columns)] for group in groups)
    return max(
        (sum(part.total_uncompressed_size + 8 * part.num_values for part in c) for c in columns),
        default=0,
    )
