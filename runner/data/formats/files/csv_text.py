"""CSV files as tables, whatever separates their fields."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from runner.data.formats.files.json_text import decode
from runner.data.formats.rows import RawTable
from runner.errors import DataError
from runner.job.sources import file_suffix

_SEPARATORS = ",;\t"


def csv_table(path: Path, raw: bytes) -> RawTable:
    """Rows under a header that names the columns, by whichever separator it has the most of them; a
    field may hold line breaks."""
    csv.field_size_limit(2**31 - 1)
    text = decode(path, raw)
    separators = _SEPARATORS[::-1] if file_suffix(path.name) == ".tsv" else _SEPARATORS
    separator = max(separators, key=lambda sign: _count_columns(text, sign))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    records: list[list[str]] = []
    lines: list[int] = []
    line = 1
    try:
        for record in reader:
            if record:
                records.append(record)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid CSV: {error}") from None
    names, *fields = records or [[]]
    return RawTable([_row(names, values) for values in fields], names, lines[1:])


def _count_columns(text: str, separator: str) -> int:
    header = csv.reader(io.StringIO(text[:100_000], newline=""), delimiter=separator)
    return len(next(filter(None, header), []))


def _row(names: list[str], values: list[str]) -> dict[str | None, str | list[str] | None]:
    """A row's fields by name; those that lack a name at None, None for those that lack a value."""
    row: dict[str | None, str | list[str] | None] = dict.fromkeys(names)
    row |= dict(zip(names, values, strict=False))
    return row | {None: values[len(names) :]} if len(values) > len(names) else row
