"""A table as a file gives it, rows as every layout gives them, and values as messages name them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from runner.data.formats.written import unwritten, written_as_text

NO_ROW = (None, None, None)  # id, question and context of a row that is none


@dataclass(frozen=True)
class RawTable:
    """What a file holds, not looked at yet.

    Attributes:
        rows: its rows, whatever they are.
        names: its columns, where it names them itself.
        lines: the line of the file that each row begins at, from 1, where it has a line.
    """

    rows: Sequence[Any]
    names: Sequence[str] | None = None
    lines: Sequence[int] | None = None

    def columns(self) -> list[str]:
        """Names of its columns: its own, or those that its rows have."""
        tables = (row for row in self.rows if isinstance(row, dict))
        own = self.names
        return list(dict.fromkeys(k for row in tables for k in row) if own is None else own)

    def places(self, file: str) -> Iterator[str]:
        """How messages name each row of a file."""
        if self.lines is not None:
            return (f"{file}:{line}" for line in self.lines)
        return (f"{file}: row {number}" for number in range(1, len(self.rows) + 1))


@dataclass(frozen=True)
class Row:
    """A raw row and the place to name when it is wrong; `answers` is a sentence where they cannot
    be read, `impossible` what stands at is_impossible."""

    place: str
    id: Any
    question: Any
    context: Any
    answers: list[tuple[Any, Any]] | str
    impossible: Any = None


class Reading(NamedTuple):
    """What a layout made of a table: the format that it took it for, in a few words, and rows."""

    format: str
    rows: list[Row]

    def __str__(self) -> str:
        return f"{self.format}, {len(self.rows):,} question{'' if len(self.rows) == 1 else 's'}"


def without_marker(row: Row, marker: str) -> Row:
    """A row whose answers are none where they are a text that means so, and whose context does not
    end in it, as where annotators could choose it there."""
    answers, context = row.answers, row.context
    if isinstance(answers, list):
        marked = [isinstance(text, str) and text.strip() == marker for text, _ in answers]
        pairs = zip(answers, marked, strict=True)
        answers = [(None, None) if is_marker else answer for answer, is_marker in pairs]
    if isinstance(context, str) and context.rstrip().endswith(marker):
        context = context.rstrip().removesuffix(marker).rstrip()
    return replace(row, answers=answers, context=context)


def paired_answers(value: Any) -> list[tuple[Any, Any]] | str:
    """Accept SQuAD's two spellings: a list of {text, answer_start}, or {text: [...], answer_start:
    [...]}; texts that are all empty need no starts. Also a list of texts alone, or of spans with a
    start and an end, and all of it written as text. A sentence says why it is none of these."""
    value = unwritten(given(value))
    if value is None:
        return []
    if isinstance(value, dict) and "text" in value:
        texts, starts = value["text"], given(value.get("answer_start"))
        texts, starts = (list(v) if isinstance(v, list | tuple) else [v] for v in (texts, starts))
        if starts == [None] or all(map(is_blank, texts)):
            starts = [None] * len(texts)
        if len(texts) != len(starts):
            return f"answers pair no texts with answer_start ({len(texts)} and {len(starts)})"
        return [(given(text), number(start)) for text, start in zip(texts, starts, strict=True)]
    if isinstance(value, list | tuple):
        if all(isinstance(item, dict) and "text" in item for item in value):
            starts = (item.get("answer_start", item.get("start")) for item in value)
            return [(given(i["text"]), number(at)) for i, at in zip(value, starts, strict=True)]
        if all(isinstance(item, str) or is_blank(item) for item in value):
            return [(given(item), None) for item in value]
    if isinstance(value, str) and (written := written_as_text(value)):
        return f"answers are a {written}, but not to be read; write JSON Lines or Parquet instead"
    return f"answers are {kind(value)}, not tables with text and answer_start"


def marked(context: Any, start: Any, end: Any, text: Any = None) -> tuple[Any, Any]:
    """The answer that a tool marked from character `start` up to `end`, in the context's own
    spelling where the tool's `text` differs from it in case, blanks, signs or articles only."""
    if not isinstance(context, str) or type(start) is not int or type(end) is not int:
        return text, start
    there = context[start:end] if 0 <= start < end else ""
    if text is None:
        return there or f"characters {start} to {end}", start
    return (there, start) if _bare(there) == _bare(text) != "" else (text, start)


def _bare(text: Any) -> str:
    words = re.findall(r"[^\W_]+", str(text).casefold().replace("\\n", " "))
    return "".join(word for word in words if word not in ("a", "an", "the"))


def given(value: Any) -> Any:
    """A value; None for NaN, by which pandas says that there is none."""
    return None if isinstance(value, float) and value != value else value


def is_blank(value: Any) -> bool:
    """Whether a value is no text, or one without a visible character."""
    value = given(value)
    return value is None or (isinstance(value, str) and not value.strip())


def number(value: Any) -> Any:
    """A number that is written as text, as in CSV, where it looks like one; of a start and an end,
    (12, 20), the start."""
    value = unwritten(value)
    if isinstance(value, list | tuple) and 1 <= len(value) <= 2:
        return number(value[0])
    if not isinstance(value, str):
        return given(value)
    text = value.strip()  # of more than float() strips
    if pair := re.fullmatch(r"[\[(]\s*([0-9]{1,15})\s*,\s*[0-9]{1,15}\s*[\])]", text):
        return int(pair[1])
    if text.lower() in ("", "nan"):
        return None
    return int(float(text)) if re.fullmatch(r"-?[0-9]{1,15}(\.0*)?", text) else value


def row_id(value: Any, place: int) -> Any:
    """An id, as text where it is a whole number; the row's number in the file, from 1, where it has
    none."""
    if is_blank(value):
        return str(place)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def kind(value: Any) -> str:
    """What a value is, in the words of someone who writes data sets."""
    names: dict[type, str] = {
        dict: "a table",
        list: "a list",
        tuple: "a list",
        str: "text",
        int: "a number",
        float: "a number",
        bool: "true or false",
    }
    if value is None:
        return "nothing"
    return names[type(value)] if type(value) in names else type(value).__name__


def short_value(text: str) -> str:
    """A text in quotes, cut and escaped so that it may be printed."""
    shown = text if len(text) <= 40 else text[:37] + "..."
    return json.dumps(shown, ensure_ascii=not shown.isprintable())


def printable_id(identity: Any) -> str:
    """An id as it may be printed: hostile ones escaped."""
    simple = isinstance(identity, str) and identity.isprintable() and 0 < len(identity) <= 80
    return identity if simple else short_value(str(identity))
