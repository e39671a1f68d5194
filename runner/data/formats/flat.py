"""The flat layout: a question a row, in named columns."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from runner.data.formats.rows import NO_ROW, RawTable, Row, id_text, kind, paired_answers
from runner.errors import DataError
from runner.job.schema import Columns


def flat_rows(
    file: str, table: RawTable, columns: Columns, *, answers: bool = True, first: int = 1
) -> list[Row]:
    """Rows of a table with named columns: its own, or those that its rows have. Messages count from
    `first`.

    Raises:
        DataError: if a column is missing or there twice.
    """
    if not table.rows:
        return []
    names = table.names
    if names is None:
        tables = [row for row in table.rows if isinstance(row, dict)]
        names = list(dict.fromkeys(key for row in tables for key in row))
    if not names:
        raise DataError(f"{file}: expected rows with named columns, found {kind(table.rows[0])}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{file}: {len(twice)} column names appear twice, {twice[0]!r} first")
    answer = columns.answer or ("answer" if "answers" not in names and "answer" in names else None)
    start = columns.answer_start or ("answer_start" if "answer_start" in names else None)
    wanted = [columns.question, columns.context, columns.id]
    if answers:
        wanted += [answer or "answers", columns.answer_start]
    missing = [name for name in wanted if name is not None and name not in names]
    if missing:
        raise DataError(
            f"{file}: no column {missing[0]!r}; the columns are {', '.join(map(repr, names))}; "
            "name them in [data.columns]"
        )
    identity = columns.id or ("id" if "id" in names else None)
    rows = []
    for number, row in enumerate(table.rows, first):
        place = f"{file}:{number}"
        if not isinstance(row, dict) or None in row:
            what = "more fields than columns" if isinstance(row, dict) else f"a row is {kind(row)}"
            rows.append(Row(place, *NO_ROW, what))
            continue
        key = id_text(row.get(identity)) if identity else str(number)
        right = _answers(row, answer, start) if answers else []
        rows.append(Row(place, key, row.get(columns.question), row.get(columns.context), right))
    return rows


def _answers(row: Any, answer: str | None, start: str | None) -> list[tuple[Any, Any]] | str:
    """One answer of the column `answer`, or all that SQuAD's column "answers" holds."""
    if (answer or "answers") not in row:
        return f"no {answer or 'answers'}"
    if answer is None:
        return paired_answers(row["answers"])
    if row[answer] in (None, ""):
        return []
    return [(row[answer], _number(row.get(start)) if start else None)]


def _number(value: Any) -> Any:
    """CSV has no numbers: read what looks like one."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    return int(float(value)) if re.fullmatch(r"\s*-?[0-9]{1,15}(\.0*)?\s*", value) else value
