"""A table as a file gives it, a row as every layout gives it, and values as messages name them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NO_ROW = (None, None, None)  # id, question and context of a row that is none


@dataclass(frozen=True)
class RawTable:
    """What a file holds, not looked at yet; `names` are its columns where it names them itself."""

    rows: Sequence[Any]
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Row:
    """A raw row and the place to name when it is wrong; `answers` is a sentence where they cannot
    be read."""

    place: str
    id: Any
    question: Any
    context: Any
    answers: list[tuple[Any, Any]] | str


def paired_answers(value: Any) -> list[tuple[Any, Any]] | str:
    """Accept SQuAD's two spellings: a list of {text, answer_start}, or {text: [...], answer_start:
    [...]}. A sentence says why it is neither."""
    if value is None:
        return []
    if isinstance(value, dict) and "text" in value:
        texts, starts = value["text"], value.get("answer_start")
        texts, starts = (v if isinstance(v, list) else [v] for v in (texts, starts))
        if starts == [None]:
            starts = [None] * len(texts)
        if len(texts) != len(starts):
            return f"answers pair no texts with answer_start ({len(texts)} and {len(starts)})"
        return list(zip(texts, starts, strict=True))
    if isinstance(value, list) and all(isinstance(i, dict) and "text" in i for i in value):
        return [(item["text"], item.get("answer_start")) for item in value]
    return f"answers are {kind(value)}, not tables with text and answer_start"


def id_text(value: Any) -> Any:
    """An id that is a whole number, as text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def kind(value: Any) -> str:
    """What a value is, in the words of someone who writes data sets."""
    names: dict[type, str] = {
        dict: "a table",
        list: "a list",
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
