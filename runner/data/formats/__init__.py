"""Rows of questions from files and hub repositories, and what is to be said of them.

The suffix of a file decides how its bytes become a table; of the layouts that rows may have there,
the first one that recognises the table takes it. A new format is a file here and a line in FORMATS
(and, with a new suffix, its name in `runner.job.sources.FILE_SUFFIXES`).

- `rows`: a table, a row, and values as messages name them
- `json_text`, `csv_text`, `parquet_file`: bytes as a table
- `squad`, `flat`: layouts of a table
- `judge`: what a row says, and whether it can be true
- `diagnosis`: what is seen where they do not fit
- `repair`: what of it can be mended
- `hub_split`: a split of a hub repository
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runner.data.formats.csv_text import csv_table
from runner.data.formats.flat import flat_rows
from runner.data.formats.json_text import json_table
from runner.data.formats.parquet_file import parquet_table
from runner.data.formats.rows import RawTable, Row
from runner.data.formats.squad import squad_rows
from runner.errors import AssetError, DataError
from runner.job.schema import Columns

Parser = Callable[[Path, bytes], RawTable]
Layout = Callable[..., list[Row] | None]

FORMATS: dict[str, tuple[Parser, tuple[Layout, ...]]] = {
    ".json": (json_table, (squad_rows, flat_rows)),
    ".jsonl": (json_table, (squad_rows, flat_rows)),
    ".csv": (csv_table, (flat_rows,)),
    ".parquet": (parquet_table, (flat_rows,)),
}


def file_rows(path: Path, columns: Columns, *, answers: bool = True) -> list[Row]:
    """Rows of a file of a known suffix; without `answers`, right answers need not be there.

    Raises:
        AssetError: if there is no such file.
        DataError: if it cannot be read as a whole.
    """
    parse, layouts = FORMATS[path.suffix.lower()]
    table = parse(path, read_file(path))
    found = (layout(path.name, table, columns, answers=answers) for layout in layouts)
    return next(rows for rows in found if rows is not None)


def read_file(path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        AssetError: if there is no such file.
        DataError: if it cannot be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is not a file")
        return path.read_bytes()
    except FileNotFoundError:
        raise AssetError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from None
