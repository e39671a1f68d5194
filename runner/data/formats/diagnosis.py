"""What is seen where data do not fit, each thing checked before it is told: where an answer stands
instead, how it was counted or written, which tool made a table."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

from runner.data.formats.rows import kind, short_value
from runner.data.formats.written import written_as_text
from runner.utils.text import one_of

_NFC, _NFD = (partial(unicodedata.normalize, form) for form in ("NFC", "NFD"))

# How else a tool may count the characters before an answer.
COUNTS: dict[str, Callable[[str], int]] = {
    "from 1": lambda before: len(before) + 1,
    "without \\r": lambda before: len(before) - before.count("\r"),
    "with \\r\\n line ends": lambda before: len(before) + len(re.findall(r"(?<!\r)\n", before)),
    "in UTF-16 units": lambda before: len(before.encode("utf-16-le")) // 2,
    "in bytes": lambda before: len(before.encode()),
    "in NFC": lambda before: len(_NFC(before)),
    "in NFD": lambda before: len(_NFD(before)),
}
# What an answer may differ in from the text that it was taken from.
_FORMS: dict[str, Callable[[str], str]] = {
    "Unicode forms differ": _NFC,
    "white space differs": lambda text: " ".join(text.split()),
    "case differs": str.casefold,
}
_OCCURRENCES = 20  # places of a text that are looked at, the nearest ones

# Columns by which an export that is not read is known; one, at least, holds tables or lists.
_EXPORTS = (
    ("Label Studio's JSON-MIN", {"annotation_id", "annotator"}),
    ("doccano's lines", {"text", "label"}),
    ("doccano's lines", {"text", "labels"}),
    ("doccano's lines", {"text", "entities"}),
    ("Prodigy's lines", {"text", "spans"}),
    ("DROP", {"passage", "qa_pairs"}),
    ("CoQA", {"story", "questions"}),
    ("Natural Questions", {"question_text", "annotations"}),
    ("HotpotQA", {"context", "supporting_facts"}),
    ("TriviaQA", {"Data", "Domain"}),
    ("QASPER", {"full_text", "qas"}),
    ("NewsQA", {"text", "questions"}),
    ("a chat", {"messages"}),
)


def known_export(names: Iterable[str]) -> str | None:
    """The tool or data set whose files have such columns."""
    return next((tool for tool, keys in _EXPORTS if keys <= set(names)), None)


def misplaced(text: str, start: int, context: str) -> str:
    """What is wrong with a text that does not stand at `start`: by which count it does, or how far
    away; the kind of it first, then what is special to this row in brackets."""
    places = sorted(_occurrences(text, context), key=lambda at: abs(at - start))[:_OCCURRENCES]
    outside = not 0 <= start < len(context)
    found = "" if outside else f", where {short_value(context[start : start + len(text)])} is"
    declared = f"{short_value(text)} declared at {start}{found}"
    for at in places:
        counts = tuple(name for name, count in COUNTS.items() if count(context[:at]) == start)
        if counts:
            seen = f"counted {one_of(counts)}"
            return f"answer text not at answer_start: {seen} ({declared}; stands at {at})"
    if outside:
        return f"answer_start is outside the context ({start}, of {len(context)} characters)"
    if not places:
        return f"{_difference(text, context)}answer text not at answer_start ({declared})"
    shift = places[0] - start
    far = f"{abs(shift)} character{'' if abs(shift) == 1 else 's'}"
    seen = f"stands {far} {'later' if shift > 0 else 'earlier'}"
    return f"answer text not at answer_start: {seen} ({declared}; stands at {places[0]})"


def absent(text: str, context: str) -> str:
    """What is wrong with a text that is nowhere in the context."""
    looks = f", and looks like a {written}" if (written := written_as_text(text)) else ""
    return f"{_difference(text, context)}answer is not in the context{looks} ({short_value(text)})"


def no_start(start: Any) -> str:
    """What is wrong with a start that is no whole number."""
    if isinstance(start, str):
        return f"answer_start is text, not a whole number ({short_value(start)})"
    return f"answer_start is {kind(start)}, not a whole number"


def no_text(text: Any) -> str:
    """What is wrong with an answer that is no text."""
    return f"answer is {kind(text)}, not text"


def nested_names(names: Sequence[str], rows: Sequence[Any]) -> dict[str, str]:
    """Those columns that hold tables or lists, as far as the first rows tell, and which of both."""
    some = [row for row in islice(rows, _OCCURRENCES) if isinstance(row, dict)]
    values = {name: [row[name] for row in some if name in row] for name in names}
    return {
        name: kind(value)
        for name in names
        if (value := next((v for v in values[name] if isinstance(v, dict | list)), None))
        is not None
    }


def _occurrences(text: str, context: str) -> list[int]:
    return [found.start() for found in re.finditer(f"(?={re.escape(text)})", context)]


def _difference(text: str, context: str) -> str:
    """What to say first of a text that is not in the context as it is, but in another form."""
    alike = (name for name, form in _FORMS.items() if form(text) in form(context))
    return f"{found}: " if (found := next(alike, "")) else ""
