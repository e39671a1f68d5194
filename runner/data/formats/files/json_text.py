"""JSON files and JSON Lines as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.data.formats.rows import RawTable, kind
from runner.errors import DataError
from runner.job.sources import file_suffix


def json_table(path: Path, raw: bytes) -> RawTable:
    """A list, the one that stands under "data", as in SQuAD's files, or a row a line; a single
    table is one row."""
    parsed, lines = read_json(path, raw)
    if isinstance(parsed, dict) and isinstance(parsed.get("data"), list):
        parsed = parsed["data"]
    if isinstance(parsed, dict):
        before = raw[: len(raw) - len(raw.lstrip())]
        return RawTable([parsed], lines=[before.count(b"\n") + 1])
    if not isinstance(parsed, list):
        raise DataError(f"{path}: expected SQuAD's {{'data': [...]}} or rows, found {kind(parsed)}")
    return RawTable(parsed, lines=lines)


def read_json(path: Path, raw: bytes) -> tuple[Any, list[int] | None]:
    """The value that a file holds, or a list of those that its lines hold and the numbers of these
    lines, from 1. What is there decides, not the file's name; empty lines are left out.

    Raises:
        DataError: naming the line that is no JSON.
    """
    text = decode(path, raw)
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return [], []
    if not _are_values(lines):
        try:
            return parse_json(text, str(path)), None
        except DataError:
            if file_suffix(path.name) != ".jsonl":
                raise
    # The first wrong one of the lines is named.
    return [parse_json(line, f"{path}:{n}") for n, line in lines], [n for n, _ in lines]


def _are_values(lines: Sequence[tuple[int, str]]) -> bool:
    """Whether lines are values of their own, and not one value together."""
    if len(lines) < 2:
        return False
    try:
        json.loads(lines[0][1])
    except (ValueError, RecursionError):
        return False
    return True


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
