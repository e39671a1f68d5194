"""doccano's lines: a text, the spans that were labelled in it, and beside it the columns that were
imported with it, the question among them."""

from __future__ import annotations

from typing import Any

from runner.data.formats.layouts.spans import Marked, MarkedSpan, marked_rows
from runner.data.formats.rows import RawTable, Reading, is_blank
from runner.data.formats.written import unwritten
from runner.job.schema import Columns

_LABELS = ("label", "labels", "entities", "annotations")  # of several versions and kinds of project
_COMMENTS = ("Comments", "comments")
_OWN = {*_LABELS, *_COMMENTS, "relations", "cats", "meta", "metadata", "id"}


def doccano_rows(file: str, table: RawTable, columns: Columns, *, answers: bool) -> Reading | None:
    """Rows of an export; None for any other table, and where a column of answers is named.

    Raises:
        DataError: if there is no question.
    """
    rows = [row for row in table.rows if isinstance(row, dict)]
    if any(columns.answer in row for row in rows) or not any(map(_is_doccano, rows)):
        return None
    labelled = columns.model_copy(update={"context": "text"})  # which is what labels are in
    return marked_rows(file, table, labelled, "doccano's lines", _line, answers=answers)


def _is_doccano(row: dict[str, Any]) -> bool:
    return isinstance(row.get("text"), str) and any(map(_span, _labels(row)))


def _labels(row: dict[str, Any]) -> list[Any]:
    found = next((row[name] for name in _LABELS if isinstance(row.get(name), list)), [])
    return list(found)


def _line(row: dict[str, Any]) -> Marked:
    fields = {name: value for name, value in row.items() if name not in _OWN}
    for name in ("meta", "metadata"):
        further = unwritten(row.get(name))
        fields = (further if isinstance(further, dict) else {}) | fields
    for name in _COMMENTS:
        comments = row.get(name)
        if isinstance(comments, list) and len(comments) == 1:
            fields.setdefault("comment", comments[0])
    spans = [_span(item) or MarkedSpan(None, None, item, "", "") for item in _labels(row)]
    labelled = any(isinstance(row.get(name), list) for name in _LABELS)
    return Marked(row.get("id"), fields, spans, None if labelled else "no labels")


def _span(label: Any) -> MarkedSpan | None:
    """What a label marks; None where that is nothing."""
    if isinstance(label, list) and len(label) == 3 and not is_blank(label[2]):
        return MarkedSpan(label[0], label[1], None, "", str(label[2]))
    if isinstance(label, dict) and label.keys() >= {"start_offset", "end_offset"}:
        places = label["start_offset"], label["end_offset"]
        return MarkedSpan(*places, None, "", str(label.get("label", "")))
    return None
