"""CSV files as tables."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from runner.data.formats.json_text import decode
from runner.data.formats.rows import RawTable
from runner.errors import DataError


def csv_table(path: Path, raw: bytes) -> RawTable:
    """Rows under a header that names the columns."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(decode(path, raw), newline=""), strict=True)
    try:
        names = list(reader.fieldnames or ())
        return RawTable(list(reader), names)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.reader.line_num}: not valid CSV: {error}") from None
