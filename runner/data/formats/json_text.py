"""JSON files and JSON Lines as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runner.data.formats.rows import RawTable, kind
from runner.errors import DataError


def json_table(path: Path, raw: bytes) -> RawTable:
    """A list, or the one that stands under "data", as in SQuAD's files."""
    parsed = parse_json(decode(path, raw), str(path))
    if isinstance(parsed, dict) and isinstance(parsed.get("data"), list):
        parsed = parsed["data"]
    if not isinstance(parsed, list):
        raise DataError(
            f"{path}: expected SQuAD's {{'data': [...]}} or a list of rows, found {kind(parsed)}"
        )
    return RawTable(parsed)


def json_lines_table(path: Path, raw: bytes) -> RawTable:
    """A value a line; empty lines are left out."""
    lines = enumerate(decode(path, raw).split("\n"), 1)
    return RawTable([parse_json(line, f"{path}:{n}") for n, line in lines if line.strip()])


def decode(path: Path, raw: bytes) -> str:
    """The text of a file in UTF-8.

    Raises:
        DataError: naming the line where it is none.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; convert the file to UTF-8"
        ) from None


def parse_json(text: str, place: str) -> Any:
    """Read JSON.

    Raises:
        DataError: naming `place` and what is wrong there.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = place if error.lineno == 1 and ":" in place else f"{place}:{error.lineno}"
        raise DataError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise DataError(f"{place}: JSON is nested too deeply to be a data set") from None
    except ValueError:
        raise DataError(f"{place}: holds a number of thousands of digits") from None
