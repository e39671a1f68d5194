"""What tools that mark spans of texts have in common: fields of any names, of which one is the text
and one the question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from runner.data.formats.columns import guess_columns
from runner.data.formats.rows import (
    NO_ROW,
    RawTable,
    Reading,
    Row,
    given,
    is_blank,
    kind,
    marked,
    printable_id,
    row_id,
    short_value,
)
from runner.errors import DataError
from runner.job.schema import Columns

_ANSWER = "\0answer"  # no field is called so


class MarkedSpan(NamedTuple):
    """What was marked from `start` up to `end`, as the tool spells it, if it does: with which of
    the interface's controls, if it has names for them, and with which label."""

    start: Any
    end: Any
    text: Any
    control: str
    label: str


class Marked(NamedTuple):
    """A text that was annotated: its id, its fields, the spans that were marked in one of them;
    `problem` is a sentence where nobody has annotated it."""

    id: Any
    fields: dict[str, Any]
    spans: list[MarkedSpan]
    problem: str | None


def marked_rows(
    file: str,
    table: RawTable,
    columns: Columns,
    tool: str,
    read: Callable[[dict[str, Any]], Marked],
    *,
    answers: bool,
) -> Reading:
    """Rows of a tool's export: several annotations of a question are answers of one row. Where
    spans have several labels, `columns.answer` names the one of answers.

    Raises:
        DataError: if no field is the text or the question; if nobody says which spans are answers.
    """
    texts = [read(row) if isinstance(row, dict) else None for row in table.rows]
    is_answer = _answer_test(file, tool, texts, columns.answer) if answers else None
    question, context = _fields(file, tool, [text for text in texts if text], columns)
    rows: dict[Any, Row] = {}
    for n, (place, text) in enumerate(zip(table.places(file), texts, strict=True), 1):
        if text is None:
            rows[n] = Row(place, *NO_ROW, f"a row is {kind(table.rows[n - 1])}")
            continue
        asked, told = (given(text.fields.get(name)) for name in (question, context))
        identity = row_id(text.id, n)
        own = "" if is_blank(text.id) else f": {printable_id(identity)}"
        key = f"{identity}", f"{asked}", f"{told}"
        row = rows.setdefault(key, Row(f"{place}{own}", identity, asked, told, []))
        if text.problem is not None:
            rows[key] = replace(row, answers=row.answers or text.problem)
            continue
        found = list(row.answers) if isinstance(row.answers, list) else []
        for span in filter(is_answer, text.spans) if is_answer else ():
            answer = marked(told, span.start, span.end, span.text)
            found += [answer] if answer not in found else []
        rows[key] = replace(row, answers=found)
    return Reading(f"{tool}, question in {question!r}, text in {context!r}", list(rows.values()))


def _answer_test(
    file: str, tool: str, texts: Sequence[Marked | None], wanted: str | None
) -> Callable[[MarkedSpan], bool]:
    """Which spans are answers: all, where only one label, and one control, marks any."""
    spans = [span for text in texts if text for span in text.spans]
    for name in ("control", "label"):
        found = sorted({getattr(span, name) for span in spans})
        if wanted in found:
            return lambda span: getattr(span, name) == wanted
    for name in ("control", "label"):
        found = sorted({getattr(span, name) for span in spans})
        if len(found) > 1:
            raise DataError(
                f"{file}: looks like {tool}, whose spans have several {name}s"
                f" ({', '.join(map(repr, found))}); name the one that marks answers in"
                f" [data.columns]: answer = {short_value(found[0])}"
            )
    return lambda span: True


def _fields(file: str, tool: str, texts: Sequence[Marked], columns: Columns) -> tuple[str, str]:
    """The names of the question's field and of the text's, which holds what was marked."""
    tables = [
        {**text.fields, _ANSWER: next((span.text for span in text.spans), None)} for text in texts
    ]
    names = list(dict.fromkeys(name for table in tables for name in table))
    named = columns.model_copy(update={"answer": _ANSWER})
    found = guess_columns(tables, names, named)
    for key in ("question", "context"):
        if key in columns.model_fields_set and getattr(columns, key) not in names:
            found.pop(key, None)
        if key not in found:
            shown = ", ".join(repr(name) for name in names if name != _ANSWER) or "none"
            raise DataError(
                f"{file}: looks like {tool}, but none of its fields ({shown}) is the {key}; import"
                f" it as a field of each text, and name it in [data.columns]: {key} = ..."
            )
    return found["question"], found["context"]
