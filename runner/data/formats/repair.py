"""Mends answers that do not stand where a file says (`data.on_bad_row = "repair"`): moves, counts
and spellings that leave an answer's words as they are, and never one of several readings."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from runner.data.formats.diagnosis import COUNTS
from runner.data.formats.rows import Row, short_value

REACH = 5  # characters that an answer may stand away from where it is declared

Count = Callable[[str], int]


@dataclass(frozen=True)
class Repair:
    """An answer of a file, and what it was taken for.

    Attributes:
        place, id: of its row.
        text, answer_start: as declared; the start may be anything.
        used_text, used_start: verbatim in the context.
        why: what differs, in words.
    """

    place: str
    id: Any
    text: str
    answer_start: Any
    used_text: str
    used_start: int
    why: str

    def __str__(self) -> str:
        declared = "" if self.answer_start is None else f" at {self.answer_start}"
        return (
            f"{self.place}: {short_value(self.text)}{declared} taken as"
            f" {short_value(self.used_text)} at {self.used_start} ({self.why})"
        )


@dataclass(frozen=True)
class _Found:
    """A reading of an answer in a context: where it stands, and whether letter by letter."""

    start: int
    end: int
    verbatim: bool


class Repairer:
    """Mends answers of one file.

    Args:
        rows: all its rows. Where all their offsets are counted in another way than in characters,
            such as in bytes, all are converted.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    @cached_property
    def _count(self) -> tuple[str, Count] | None:
        return _other_count(self._rows)

    def mend(self, text: str, start: Any, context: str) -> tuple[str, int, str] | None:
        """The answer verbatim, its start and what differs; None where that is not clear."""
        if not text.strip():
            return None
        at = _whole_number(start)
        seen = []
        if self._count is not None and at is not None:
            name, count = self._count
            at = _inverse(count, at, context, text)
            seen = [f"counted {name}"] if at != start else []
        if at is not None and context.startswith(text, at):
            return text, at, ", ".join(seen)
        found = _reading(text, at, context)
        if found is None:
            return None
        used = context[found.start : found.end]
        if at is not None and found.start != at:
            far = found.start - at
            characters = f"{abs(far)} character{'' if abs(far) == 1 else 's'}"
            seen.append(f"stands {characters} {'later' if far > 0 else 'earlier'}")
        if used != text:
            seen.append(_difference(text, used))
        return used, found.start, ", ".join(seen) or "its only place"


def _whole_number(start: Any) -> int | None:
    if isinstance(start, float) and start.is_integer():
        return int(start)
    return start if isinstance(start, int) and not isinstance(start, bool) else None


def _reading(text: str, at: int | None, context: str) -> _Found | None:
    """Where an answer stands: near its declared start, or else in the only place where it does."""
    spans = list(_spans(text, context))
    if at is not None:
        close = [span for span in spans if abs(span.start - at) <= REACH]
        close = _whole(close, context) or close
        if close:
            least = min(abs(span.start - at) for span in close)
            return _only([span for span in close if abs(span.start - at) <= 2 * least])
    return _only(_whole(spans, context))


def _only(spans: Sequence[_Found]) -> _Found | None:
    """The only one, or the only one that is verbatim."""
    verbatim = [span for span in spans if span.verbatim]
    chosen = verbatim or spans
    return chosen[0] if len(chosen) == 1 else None


def _whole(spans: Sequence[_Found], context: str) -> list[_Found]:
    """Those that begin and end at the borders of words."""

    def parts_word(at: int) -> bool:
        return 0 < at < len(context) and context[at - 1].isalnum() and context[at].isalnum()

    return [span for span in spans if not parts_word(span.start) and not parts_word(span.end)]


def _spans(text: str, context: str) -> Iterator[_Found]:
    """Every place of an answer's words, whatever their case, the blanks between them and the form
    of their letters."""
    words = text.split()
    if not words:
        return
    forms = (map(re.escape, (word, *_forms(word))) for word in words)
    pattern = r"\s+".join(f"(?:{'|'.join(dict.fromkeys(form))})" for form in forms)
    for match in re.finditer(f"(?=({pattern}))", context, re.IGNORECASE):
        yield _Found(*match.span(1), verbatim=match[1] == text.strip())


def _forms(text: str) -> tuple[str, str]:
    return unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)


def _difference(text: str, used: str) -> str:
    if text.strip() == used:
        return "blanks around it"
    one, other = " ".join(text.split()), " ".join(used.split())
    if one == other:
        return "white space differs"
    return "case differs" if one.casefold() == other.casefold() else "Unicode forms differ"


# --- how a file counts -------------------------------------------------------------------------


def _other_count(rows: Iterable[Row]) -> tuple[str, Count] | None:
    """How all offsets of a file are counted, if they can be in one way only, and not in
    characters."""
    offsets = [
        (text, at, row.context)
        for row in rows
        if isinstance(row.answers, list) and isinstance(row.context, str)
        for text, start in row.answers
        if isinstance(text, str) and text.strip() and text in row.context
        if (at := _whole_number(start)) is not None
    ]
    if all(context.startswith(text, start) for text, start, context in offsets):
        return None
    possible: list[tuple[str, Count]] = []
    readings: set[tuple[int, ...]] = set()
    for name, count in COUNTS.items():
        places = []
        for text, start, context in offsets:
            at = _inverse(count, start, context, text)
            if at is None or not context.startswith(text, at):
                break
            places.append(at)
        else:
            possible.append((name, count))
            readings.add(tuple(places))
    return possible[0] if len(readings) == 1 else None


def _inverse(count: Count, start: int, context: str, text: str) -> int | None:
    """The character that a count says `start` of; of two with one count that where the text
    stands."""
    if context.startswith(text, start) and count(context[:start]) == start:
        return start  # most are, whatever a file counts in
    places = range(len(context) + 1)
    at = bisect_left(places, start, key=lambda at: count(context[:at]))
    same = [n for n in (at, at + 1) if n in places and count(context[:n]) == start]
    return next((n for n in same if context.startswith(text, n)), same[0] if same else None)
