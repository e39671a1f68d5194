"""The flat layout: a question a row, in named columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from runner.data.formats.diagnosis import known_export, nested_names, written_as_text
from runner.data.formats.rows import (
    NO_ROW,
    RawTable,
    Row,
    given,
    is_blank,
    kind,
    number,
    paired_answers,
    row_id,
)
from runner.errors import DataError
from runner.job.schema import Columns

_IMPOSSIBLE = "is_impossible"


def flat_rows(
    file: str, table: RawTable, columns: Columns, *, answers: bool = True, first: int = 1
) -> list[Row]:
    """Rows of a table with named columns: its own, or those that its rows have. Rows without an id
    are numbered from `first`.

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
    # A question that is_impossible needs no answers: whether all others have them, each row tells.
    if answers and (_IMPOSSIBLE not in names or columns.answer):
        wanted += [answer or "answers"]
    wanted += [columns.answer_start] if answers else []
    missing = [name for name in wanted if name is not None and name not in names]
    if missing:
        free = [name for name in names if name not in (*wanted, "id")]
        raise DataError(f"{file}: {_no_columns(missing, names, free, table.rows, answers)}")
    identity = columns.id or ("id" if "id" in names else None)
    rows = []
    for place, (count, row) in zip(table.places(file), enumerate(table.rows, first), strict=True):
        if not isinstance(row, dict) or None in row:
            what = "more fields than columns" if isinstance(row, dict) else f"a row is {kind(row)}"
            rows.append(Row(place, *NO_ROW, what))
            continue
        rows.append(
            Row(
                place,
                row_id(row.get(identity) if identity else None, count),
                given(row.get(columns.question)),
                given(row.get(columns.context)),
                _answers(row, answer, start) if answers else [],
                given(row.get(_IMPOSSIBLE)),
            )
        )
    return rows


def _no_columns(
    missing: Sequence[str],
    names: Sequence[str],
    free: Sequence[str],
    rows: Sequence[Any],
    answers: bool,
) -> str:
    """What to say of columns that are not there; to name others only where there are enough."""
    nested = nested_names(names, rows)
    needed = "a question, a context and answers" if answers else "a question and a context"
    tool = known_export(names) if nested else None
    if tool is not None:
        return f"looks like {tool}, not read; convert it to SQuAD's JSON, or rows with {needed}"
    spelled = (f"{name!r} ({nested[name]})" if name in nested else repr(name) for name in names)
    helps = len([name for name in free if name not in nested]) >= len(missing)
    fix = "name them in [data.columns]" if helps else f"a row has {needed}"
    return f"no column {missing[0]!r}; the columns are {', '.join(spelled)}; {fix}"


def _answers(row: Any, answer: str | None, start: str | None) -> list[tuple[Any, Any]] | str:
    """One answer of the column `answer`, or all that SQuAD's column "answers" holds."""
    if (answer or "answers") not in row:
        return f"no {answer or 'answers'}"
    if answer is not None:
        return [(given(row[answer]), number(row.get(start)) if start else None)]
    value = row["answers"]
    if not isinstance(value, str) or is_blank(value):
        return [] if isinstance(value, str) else paired_answers(value)
    if written := written_as_text(value):
        return f"answers are a {written}; write JSON Lines or Parquet instead"
    return (
        "answers are text, not tables with text and answer_start; if they are the answers"
        ' themselves, write answer = "answers" in [data.columns]'
    )
