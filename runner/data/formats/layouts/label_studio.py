"""Label Studio's exports: JSON (tasks with their annotations), JSON-MIN and CSV (an annotation a
row). The labelling interface names the fields and the label: both are found by what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.data.formats.layouts.spans import Marked, MarkedSpan, marked_rows
from runner.data.formats.rows import RawTable, Reading, number
from runner.data.formats.written import unwritten
from runner.job.schema import Columns

# What Label Studio itself writes beside the fields of a task.
_OWN = {"annotation_id", "annotator", "created_at", "updated_at", "lead_time", "agreement", "id"}


def label_studio_rows(
    file: str, table: RawTable, columns: Columns, *, answers: bool
) -> Reading | None:
    """Rows of an export; None for any other table.

    Raises:
        DataError: if its tasks have no text or no question.
    """
    tasks = [row for row in table.rows if isinstance(row, dict)]
    if any(isinstance(_annotations(row), list) and "data" in row for row in tasks):
        read, name = _task, "Label Studio's JSON"
    elif any(row.keys() >= {"annotation_id", "annotator"} and _row(row).spans for row in tasks):
        read, name = _row, "Label Studio's JSON-MIN"
    else:
        return None
    return marked_rows(file, table, columns, name, read, answers=answers)


def _annotations(task: dict[str, Any]) -> Any:
    return task.get("annotations", task.get("completions"))


def _task(task: dict[str, Any]) -> Marked:
    """A task with all answers of all who annotated it."""
    fields = task.get("data")
    listed = _annotations(task)
    done = [
        a
        for a in (listed if isinstance(listed, list) else [])
        if isinstance(a, dict) and not (a.get("was_cancelled") or a.get("skipped"))
    ]
    results = [r for a in done if isinstance(a.get("result"), list) for r in a["result"]]
    return Marked(
        task.get("id"),
        fields if isinstance(fields, dict) else {},
        [
            span
            for r in results
            if isinstance(r, dict)
            for span in _spans(r.get("value"), r.get("from_name"))
        ],
        None if done else "no annotation that was not skipped",
    )


def _row(row: dict[str, Any]) -> Marked:
    """One annotation: its labels are spans in a field that is called as the interface says."""
    values = {name: unwritten(value) for name, value in row.items()}
    spans = {
        name: found
        for name, value in values.items()
        if isinstance(value, list) and (found := [s for v in value for s in _spans(v, name)])
    }
    fields = {k: v for k, v in row.items() if k not in spans and k not in _OWN}
    return Marked(row.get("id"), fields, [span for found in spans.values() for span in found], None)


def _spans(value: Any, control: Any) -> Iterator[MarkedSpan]:
    """The span that a result's value marks, if it marks one; of HTML its place among the text."""
    if isinstance(value, dict) and value.keys() >= {"start", "end"}:
        place = value.get("globalOffsets")
        place = place if isinstance(place, dict) else value
        labels = value.get("labels", value.get("hypertextlabels"))
        label = ", ".join(map(str, labels)) if isinstance(labels, list) else ""
        ends = number(place.get("start")), number(place.get("end"))
        yield MarkedSpan(*ends, value.get("text"), str(control or ""), label)
