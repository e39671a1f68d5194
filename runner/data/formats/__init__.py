"""Rows of questions from files and hub repositories, and what is to be said of them.

A file becomes a table; of the layouts that rows may have there, the first one that recognises the
table takes it. A new format is a file in `layouts` and its name in LAYOUTS there.

- `files`: files as tables (a folder: one file a kind)
- `layouts`: rows of a table (a folder: one file a format)
- `rows`: a table, a row, and values as messages name them
- `written`: tables and lists that stand in a file as text
- `columns`: which column is what, where nobody says
- `judge`: what a row says, whether it can be true, and the examples of the good ones
- `diagnosis`: what is seen where they do not fit
- `repair`: what of it can be mended
- `hub_split`: a split of a hub repository
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runner.data.formats.columns import guess_columns, to_declare
from runner.data.formats.files import file_table
from runner.data.formats.layouts import LAYOUTS
from runner.data.formats.rows import RawTable, Reading
from runner.errors import DataError
from runner.job.schema import Columns
from runner.job.sources import DataSource, parse_data, unread_here


def source_here(name: str) -> DataSource:
    """What a data name points to, from the current folder.

    Raises:
        DataError: if it has no meaning, or is that of a file of another kind.
    """
    try:
        source = parse_data(name)
    except ValueError as error:
        raise DataError(str(error)) from None
    if problem := unread_here(source, Path.cwd()):
        raise DataError(problem)
    return source


def file_rows(path: Path, columns: Columns, *, answers: bool = True) -> Reading:
    """Rows of a file of a known suffix; without `answers`, right answers need not be there.

    Raises:
        AssetError: if there is no such file.
        DataError: if it cannot be read as a whole.
    """
    return table_rows(path.name, file_table(path), columns, answers=answers)


def table_rows(file: str, table: RawTable, columns: Columns, *, answers: bool = True) -> Reading:
    """Rows of a table, in the first layout that recognises it.

    Raises:
        DataError: if none does, or the one that does cannot read it as a whole.
    """
    found = (layout(file, table, columns, answers=answers) for layout in LAYOUTS)
    return next(reading for reading in found if reading is not None)


def guessed_rows(file: str, table: RawTable, columns: Columns) -> tuple[Reading, Columns]:
    """Rows of a table of which nobody has said what its columns are, but for those that `columns`
    names, and the columns that a job must name to get the same.

    Raises:
        DataError: as `table_rows`.
    """
    if not table.rows or is_flat(table.rows[0]):
        names = [name for name in table.columns() if isinstance(name, str) and name.strip()]
        guessed = to_declare(guess_columns(table.rows, names, columns), names)
        columns = Columns(**{**guessed, **columns.model_dump(exclude_unset=True)})
    return table_rows(file, table, columns), columns


def is_flat(row: Any) -> bool:
    """Whether a row, the first one of its file, is in none of the layouts that are asked before the
    flat one."""
    try:
        table = RawTable([row])
        return all(layout("", table, Columns(), answers=False) is None for layout in LAYOUTS[:-1])
    except DataError:
        return False
