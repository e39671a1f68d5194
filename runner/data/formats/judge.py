"""Judges rows: what each says, whether it can be true, and which examples the good ones make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.data.formats.diagnosis import absent, misplaced, no_start, no_text
from runner.data.formats.repair import Repair, Repairer
from runner.data.formats.rows import Row, is_blank, kind, short_value

# is_impossible as JSON, CSV and pandas spell it, in small letters; None is none.
_IMPOSSIBLE = {
    **dict.fromkeys(("true", "1", "1.0"), True),
    **dict.fromkeys(("false", "0", "0.0"), False),
    **dict.fromkeys(("", "none", "nan", "null"), None),
}


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        id: unique within its data set.
        question: the question's text.
        context: the text that holds the answer.
        answers: right answers, verbatim in the context; empty for an unanswerable question.
        answer_starts: character offset of each answer in the context.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    answer_starts: tuple[int, ...]


@dataclass(frozen=True)
class Checked:
    """Examples of the good rows; (place, problem) of the others; what good ones contradict; what
    was mended in them."""

    examples: list[Example] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)


def check_rows(rows: Sequence[Row], unanswerable: bool, repairer: Repairer | None) -> Checked:
    """Judge rows, mending their answers if there is somebody who can."""
    checked = Checked()
    seen: dict[str, str] = {}
    contradictions: dict[tuple[str, str], list[str]] = {}
    # A context is shared by several questions: check its encoding once.
    texts: dict[str, str | None] = {}
    for row in rows:
        answers, why, contradiction = _meant(row)
        why = why or row_problem(row, texts)
        if why is None and not answers and not unanswerable:
            reason = f"{contradiction}; " if contradiction else ""
            why = f"no answer ({reason}set data.unanswerable = true for SQuAD v2 data)"
        if why is None and row.id in seen:
            why = f"id repeated (first at {seen[row.id]})"
        found: list[tuple[str, int]] = []
        repairs: list[Repair] = []
        if why is None:
            answers = [_mended(pair, row, repairer, repairs) for pair in answers]
            found, why = _spans(answers, row.context)
        if why is not None:
            checked.bad.append((row.place, why))
            continue
        checked.repairs.extend(repairs)
        seen[row.id] = row.place
        if contradiction:
            taken = "answered" if found else "without an answer"
            contradictions.setdefault((contradiction, taken), []).append(row.place)
        checked.examples.append(
            Example(
                row.id,
                row.question,
                row.context,
                tuple(t for t, _ in found),
                tuple(s for _, s in found),
            )
        )
    checked.contradictions.extend(
        f"{len(places)} question{'' if len(places) == 1 else 's'} taken as {taken} where"
        f" {contradiction}, first: {places[0]}"
        for (contradiction, taken), places in contradictions.items()
    )
    return checked


def _mended(
    answer: tuple[Any, Any], row: Row, repairer: Repairer | None, repairs: list[Repair]
) -> tuple[Any, Any]:
    """An answer as it is, or as it must have been meant, which `repairs` then holds."""
    text, start = answer
    if repairer is None or not isinstance(text, str):
        return answer
    found = repairer.mend(text, start, row.context)
    if found is None or found[:2] == answer:
        return answer
    repairs.append(Repair(row.place, row.id, text, start, *found))
    return found[:2]


def _meant(row: Row) -> tuple[list[tuple[Any, Any]], str | None, str | None]:
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


def _spans(
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
