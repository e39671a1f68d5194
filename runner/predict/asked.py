"""Reads questions that are asked, not scored: whatever answers stand beside them do not count."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from runner.data.dataset import row_problem
from runner.data.readers import Row, file_rows, flat_rows, parse_json
from runner.errors import DataError
from runner.job.schema import Columns
from runner.job.sources import parse_data


@dataclass(frozen=True)
class Asked:
    """A question without right answers, and where it stands; `problem` says why it cannot be asked,
    and is None where it can."""

    place: str
    id: str
    question: str
    context: str
    problem: str | None


def read_asked(name: str, columns: Columns) -> list[Asked]:
    """Read the questions of a file, or of a slice of it, whatever answers stand beside them.

    Raises:
        DataError, AssetError: if the file cannot be read as a whole; a wrong row has its problem.
    """
    try:
        source = parse_data(name)
    except ValueError as error:
        raise DataError(str(error)) from None
    if source.kind == "hub":
        raise DataError(f"{name}: no file; questions are read from a file or from stdin")
    try:
        rows = file_rows(Path(source.location), columns, answers=False)
    except DataError as error:
        raise DataError(_for_command(error)) from None
    if source.slice is not None:
        rows = rows[slice(*source.slice.bounds(len(rows)))]
    texts: dict[str, str | None] = {}
    return [_asked(row, str(number), texts) for number, row in enumerate(rows, 1)]


def parse_asked(line: bytes, file: str, number: int, columns: Columns) -> Asked:
    """Read a question from a line of JSON; what is wrong with it is its problem."""
    place = f"{file}:{number}"
    try:
        table = [parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"), place)]
        row, *_ = flat_rows(file, table, None, columns, answers=False, first=number)
    except UnicodeDecodeError as error:
        return Asked(place, "", "", "", f"byte 0x{line[error.start]:02x} is not UTF-8")
    except DataError as error:
        why = _for_command(error).removeprefix(f"{place}: ").removeprefix(f"{file}: ")
        return Asked(place, "", "", "", why)
    return _asked(row, str(number), {})


def _for_command(error: DataError) -> str:
    # Who has no job file names columns on the command line.
    return str(error).replace("in [data.columns]", "with --column KEY=NAME")


def _asked(row: Row, number: str, texts: dict[str, str | None]) -> Asked:
    row = row if row.id is not None else dataclasses.replace(row, id=number)
    bad = isinstance(row.answers, str) and row.question is None and row.context is None
    why = str(row.answers) if bad else row_problem(row, texts)
    if why is not None:
        return Asked(row.place, number, "", "", why)
    return Asked(row.place, str(row.id), str(row.question), str(row.context), None)
