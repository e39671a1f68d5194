"""Files as tables, whatever their rows look like: the suffix decides, and gzip around a file is
known by its first bytes. A new kind of file is a file here, a line in PARSERS, and a suffix in
`runner.job.sources.FILE_SUFFIXES`.

- `json_text`, `csv_text`, `parquet_file`: bytes as a table
- `packed`: what gzip has packed
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runner.data.formats.files.csv_text import csv_table
from runner.data.formats.files.json_text import json_table
from runner.data.formats.files.packed import unpacked
from runner.data.formats.files.parquet_file import parquet_table
from runner.data.formats.rows import RawTable
from runner.errors import AssetError, DataError
from runner.job.sources import file_suffix

PARSERS: dict[str | None, Callable[[Path, bytes], RawTable]] = {
    ".json": json_table,
    ".jsonl": json_table,
    ".csv": csv_table,
    ".tsv": csv_table,
    ".parquet": parquet_table,
}


def file_table(path: Path) -> RawTable:
    """What a file of a known suffix holds.

    Raises:
        AssetError, DataError: as `read_file`; the latter also if it is no file of its kind.
    """
    return PARSERS[file_suffix(path.name)](path, read_file(path))


def read_file(path: Path) -> bytes:
    """All bytes of a file, without gzip around them.

    Raises:
        AssetError: if there is no such file.
        DataError: if it cannot be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is not a file")
        return unpacked(path, path.read_bytes())
    except FileNotFoundError:
        raise AssetError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from None
