"""Metric tables: append a row to a CSV whose header carries units, and show rows as Markdown or on
a terminal."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from runner.errors import printable_lines
from runner.utils.files import Fence, open_own, storage_errors

CellValue = str | int | float | None


def append_row(path: Path, row: Mapping[str, CellValue], fence: Fence | None = None) -> None:
    """Append one row; see `append_rows`."""
    append_rows(path, [row], fence)


def append_rows(
    path: Path,
    rows: Sequence[Mapping[str, CellValue]],
    fence: Fence | None = None,
    *,
    durable: bool = True,
) -> None:
    """Append rows, at least one; the first row's keys become the header, and every later row must
    have the same keys.

    `fence` raises if the table is no longer ours. It is asked while the file is open: a successor
    replaces the file, so that what is written after that reaches nobody's table. What is `durable`
    outlives the machine's end, and is waited for.

    Raises:
        StorageError: if the file cannot be written.
        ValueError: if the keys are not those of the first row, in their order.
    """
    with storage_errors(path), open_own(path, "a+", newline="") as file:
        if fence is not None:
            fence()
        columns = list(rows[0])
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        file.seek(0)
        header = next(csv.reader(file), None)
        if header is None:
            writer.writeheader()
        for row in rows:
            if list(row) != (header or columns):
                raise ValueError(f"{path.name} has the columns {header}, a row has {list(row)}")
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a table back; a run that has not written it yet has no rows.

    Raises:
        StorageError: if it cannot be read now.
    """
    with storage_errors(path):
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def markdown(rows: Sequence[Mapping[str, CellValue]]) -> str:
    """Show rows as a Markdown table, numbers to the right."""
    if not rows:
        return ""
    keys = list(rows[0])
    numeric = [all(isinstance(row[key], int | float | None) for row in rows) for key in keys]
    out = io.StringIO()
    out.write("| " + " | ".join(keys) + " |\n")
    out.write("|" + "|".join("---:" if right else "---" for right in numeric) + "|\n")
    for row in rows:
        cells = (" ".join(format_value(row[key], key).split()).replace("|", "\\|") for key in keys)
        out.write("| " + " | ".join(cells) + " |\n")
    return out.getvalue()


def rich_table(
    title: str, rows: Sequence[Mapping[str, CellValue]], *, right: Collection[str] = ()
) -> Table:
    """Show rows as a rich table that stays readable at 80 columns.

    Args:
        title: above the table.
        rows: its cells by the columns' names; a name may have several lines.
        right: columns that are set to the right and in one line; those of numbers always are to
            the right.
    """
    table = Table(
        title=_text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
    )
    for key in rows[0] if rows else ():
        numbers = all(isinstance(row[key], int | float | None) for row in rows)
        table.add_column(
            _text(key),
            justify="right" if numbers or key in right else "left",
            overflow="fold",
            no_wrap=key in right,
        )
    for row in rows:
        # As Text, so that nothing is markup: [CLS] stays.
        table.add_row(*(_text(format_value(value, key)) for key, value in row.items()))
    return table


def _text(text: str) -> Text:
    return Text(printable_lines(text))


def _cell(value: CellValue) -> CellValue:
    # Full precision for other programs; `repr` of a float round-trips.
    return "" if value is None else repr(float(value)) if isinstance(value, float) else value


def format_value(value: CellValue, column: str) -> str:
    """A value as tables show it: three figures or one decimal, percent with one decimal always."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if "%" in column:
            return f"{value:.1f}"
        if value and abs(value) < 1e-3:
            return f"{value:.2e}"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
