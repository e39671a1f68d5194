"""Judges rows: what each says, and whether it can be true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runner.data.formats.diagnosis import absent, misplaced, no_start, no_text
from runner.data.formats.rows import Row, is_blank, kind, short_value

# is_impossible as JSON, CSV and pandas spell it, in small letters; None is none.
_IMPOSSIBLE = {
    **dict.fromkeys(("true", "1", "1.0"), True),
    **dict.fromkeys(("false", "0", "0.0"), False),
    **dict.fromkeys(("", "none", "nan", "null"), None),
}


def meant(row: Row) -> tuple[list[tuple[Any, Any]], str | None, str | None]:
    """The answers that a row means, none where it says in any spelling that there is none; why that
    cannot be told; what contradicts it."""
    spelled = str(row.impossible).strip().lower()
    if spelled not in _IMPOSSIBLE:
        return [], f"is_impossible is {kind(row.impossible)}, not true or false", None
    impossible = _IMPOSSIBLE[spelled]
    listed = row.answers if isinstance(row.answers, list) else []
    # str.find() and many tools say -1 for "not there".
    answers = [(text, start) for text, start in listed if not is_blank(text) and start != -1]
    if impossible:
        return [], None, "is_impossible is true beside an answer" if answers else None
    if isinstance(row.answers, str):
        return [], row.answers, None
    if answers:
        fewer = len(answers) < len(listed)
        return answers, None, "an answer is empty or at -1 beside others" if fewer else None
    if any(not is_blank(text) for text, _ in listed):
        return [], None, "answer_start is -1 beside an answer"
    return [], None, "is_impossible is false without an answer" if impossible is False else None


def row_problem(row: Row, texts: dict[str, str | None]) -> str | None:
    for name, value in (("id", row.id), ("question", row.question), ("context", row.context)):
        if value is None:
            return f"no {name}"
        if not isinstance(value, str):
            return f"{name} is {kind(value)}, not text"
        if value not in texts:
            texts[value] = _text_problem(value)
        if texts[value] is not None:
            return f"{name} {texts[value]}"
    return None


def _text_problem(text: str) -> str | None:
    if not text.strip():
        return "is empty"
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds a lone surrogate (broken encoding)"
    return None


def spans(
    answers: Sequence[tuple[Any, Any]], context: str
) -> tuple[list[tuple[str, int]], str | None]:
    spans = []
    for text, start in answers:
        if not isinstance(text, str):
            return [], no_text(text)
        if start is None:
            start = context.find(text)
            if start < 0:
                return [], absent(text, context)
            if context.find(text, start + 1) >= 0:
                why = "answer occurs more than once and has no answer_start"
                return [], f"{why} ({short_value(text)})"
        if isinstance(start, float) and start.is_integer():
            start = int(start)
        if not isinstance(start, int) or isinstance(start, bool):
            return [], no_start(start)
        if start < 0 or not context.startswith(text, start):
            return [], misplaced(text, start, context)
        spans.append((text, start))
    return spans, None
