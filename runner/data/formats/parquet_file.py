"""Parquet files as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runner.data.formats.rows import RawTable
from runner.errors import DataError
from runner.utils.text import first_line

_EXPANSION = 100  # times that a file may grow when it is read, beyond 256 MiB
_BATCH = 64  # rows that are looked at before more are read


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
        for batch in file.iter_batches(batch_size=_BATCH):
            part = batch.to_pylist()
            size += sum(len(text) for row in part for text in row.values() if type(text) is str)
            if size > limit:
                raise DataError(f"{path}: its {len(raw):,} bytes hold more than {limit:,} of text")
            rows += part
    except (pyarrow.ArrowException, MemoryError, OSError, ValueError) as error:
        raise DataError(f"{path}: not valid Parquet: {first_line(error)}") from None
    return RawTable(rows, names)
