"""MRQA's layout: a header, then a context with its questions a line; answers are spans that were
detected in the context, from their first character to their last one."""

from __future__ import annotations

from typing import Any

from runner.data.formats.layouts.squad import questions, squad_answers
from runner.data.formats.rows import RawTable, Reading, Row, marked
from runner.job.schema import Columns

_SPANS = "detected_answers"


def mrqa_rows(file: str, table: RawTable, columns: Columns, *, answers: bool) -> Reading | None:
    """Rows of MRQA's lines, or of their flat form on the hub (a question a row); None for any other
    table.

    Raises:
        DataError: if a line has no list of questions.
    """
    if not any(isinstance(row, dict) and _is_mrqa(row) for row in table.rows):
        return None
    rows: list[Row] = []
    for place, line in zip(table.places(file), table.rows, strict=True):
        if isinstance(line, dict) and line.get("header") is not None and line.get("qas") is None:
            continue
        if isinstance(line, dict) and "question" in line:
            line = {"context": line.get("context"), "qas": [line]}
        rows += questions(line, place, len(rows), _detected)
    return Reading("MRQA", rows)


def _is_mrqa(row: dict[str, Any]) -> bool:
    listed = row.get("qas")
    nested = listed if isinstance(listed, list) else []
    return (
        (isinstance(row.get("header"), dict) and row.keys() <= {"header", "context", "qas", "id"})
        or _SPANS in row
        or any(isinstance(qa, dict) and _SPANS in qa for qa in nested)
    )


def _detected(qa: dict[str, Any], context: Any) -> list[tuple[Any, Any]] | str:
    """All places of all answers; those that the context may not hold (`answers`) only where none
    was looked for."""
    if _SPANS not in qa:
        return squad_answers(qa, context)
    found = qa[_SPANS]
    if isinstance(found, dict):  # as the hub has a list of tables
        lists = (found.get("text"), found.get("char_spans"))
        texts, spans = (value if isinstance(value, list) else [] for value in lists)
        found = [{"text": t, "char_spans": s} for t, s in zip(texts, spans, strict=False)]
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        return "detected_answers are not tables with text and char_spans"
    pairs = []
    for item in found:
        spans = _pairs(item.get("char_spans"))
        if not spans:
            return "detected_answers have no char_spans"
        pairs += [_answer(context, start, last, item.get("text")) for start, last in spans]
    return pairs


def _pairs(spans: Any) -> list[tuple[Any, Any]] | None:
    """Starts and ends in their three spellings; None where they are none of these."""
    if isinstance(spans, dict):
        ends = (spans.get("start"), spans.get("end"))
        starts, lasts = (value if isinstance(value, list) else [value] for value in ends)
        return list(zip(starts, lasts, strict=False))
    if not isinstance(spans, list):
        return None
    if all(isinstance(span, dict) for span in spans):
        return [(span.get("start"), span.get("end")) for span in spans]
    if all(isinstance(span, list) and len(span) == 2 for span in spans):
        return [(start, last) for start, last in spans]
    return None


def _answer(context: Any, start: Any, last: Any, text: Any) -> tuple[Any, Any]:
    if type(last) is not int:
        return text, start
    exclusive = isinstance(context, str) and type(start) is int and context[start:last] == text
    return marked(context, start, last if exclusive else last + 1, text)
