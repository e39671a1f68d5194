"""The flat layout: a question a row, in named columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from runner.data.formats.columns import guess_columns, to_declare
from runner.data.formats.diagnosis import known_export, nested_names
from runner.data.formats.rows import (
    NO_ROW,
    RawTable,
    Reading,
    Row,
    given,
    is_blank,
    kind,
    number,
    paired_answers,
    row_id,
    short_value,
)
from runner.data.formats.written import unwritten, written_as_text
from runner.errors import DataError
from runner.job.schema import Columns

_IMPOSSIBLE = "is_impossible"
_SHOWN = 20  # columns that a message names


def flat_rows(
    file: str, table: RawTable, columns: Columns, *, answers: bool = True, first: int = 1
) -> Reading:
    """Rows of a table with named columns: its own, or those that its rows have. Rows without an id
    are numbered from `first`. Takes any table: it is the last layout that is asked.

    Raises:
        DataError: if a column is missing or there twice.
    """
    if not table.rows:
        return Reading("an empty file", [])
    names = table.columns()
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
        told = _no_columns(missing, names, free, table.rows, answers, columns)
        raise DataError(f"{file}: {told}")
    identity = columns.id or ("id" if "id" in names else None)
    read = [columns.question, columns.context]
    read += [name for name in (answer or "answers", start) if name in names] if answers else []
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
                _answers(row, columns.context, answer, start) if answers else [],
                given(row.get(_IMPOSSIBLE)),
            )
        )
    return Reading(f"rows of {', '.join(read)}", rows)


def _no_columns(
    missing: Sequence[str],
    names: Sequence[str],
    free: Sequence[str],
    rows: Sequence[Any],
    answers: bool,
    columns: Columns,
) -> str:
    """What to say of columns that are not there; which others to name, as far as can be guessed,
    only where there are enough."""
    nested = nested_names(names, rows)
    needed = "a question, a context and answers" if answers else "a question and a context"
    tool = known_export(names) if nested else None
    if tool is not None:
        return f"looks like {tool}, not read; convert it to SQuAD's JSON, or rows with {needed}"
    shown = [f"{n!r} ({nested[n]})" if n in nested else repr(n) for n in names[:_SHOWN]]
    shown += [f"{len(names) - _SHOWN:,} more"] if len(names) > _SHOWN else []
    helps = len([name for name in free if name not in nested]) >= len(missing)
    fix = "name them in [data.columns]" if helps else f"a row has {needed}"
    guessed = to_declare(guess_columns(rows, names, columns), names) if helps else {}
    keys = [key for key in guessed if answers or not key.startswith("answer")]
    if keys:
        fix += f": {', '.join(f'{key} = {short_value(guessed[key])}' for key in keys)}"
    return f"no column {missing[0]!r}; the columns are {', '.join(shown)}; {fix}"


def _answers(
    row: Any, context: str, answer: str | None, start: str | None
) -> list[tuple[Any, Any]] | str:
    """One answer, or all, of the column `answer` or of SQuAD's column "answers"."""
    if (answer or "answers") not in row:
        return f"no {answer or 'answers'}"
    value, place = given(row[answer or "answers"]), unwritten(row.get(start)) if start else None
    if isinstance(value, str):
        written = written_as_text(value)
        if answer is None and is_blank(value):
            return []
        if answer is None and not written:
            return (
                "answers are text, not tables with text and answer_start; if they are the answers"
                ' themselves, write answer = "answers" in [data.columns]'
            )
        # An answer may begin with a bracket itself: then it stands in the context.
        if answer is not None and (not written or value in str(row.get(context))):
            return [(value, number(place))]
    elif answer is not None and not isinstance(value, list | dict):
        return [(value, number(place))]
    pairs = paired_answers(value)
    if place is None or isinstance(pairs, str) or any(at is not None for _, at in pairs):
        return pairs
    starts = list(place) if isinstance(place, list | tuple) else [place]
    if len(pairs) == 1 and len(starts) > 1:  # a start and an end
        starts = [place]
    if len(starts) != len(pairs):
        return f"answers pair no texts with {start} ({len(pairs)} and {len(starts)})"
    return [(text, number(at)) for (text, _), at in zip(pairs, starts, strict=True)]
