"""Tables and lists in files of mere text, as JSON, Python, numpy and pandas write them; nothing of
what stands there is run."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

_LONGEST = 1_000_000  # characters that are looked at
_PIECE = re.compile(
    r"""(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
    r"|(?P<number>[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)"
    r"|(?P<name>[A-Za-z_][\w.]*)"
    r"|(?P<opens>[\[({])|(?P<closes>[\])}])|(?P<sign>[:,=])"
    r"|(?P<blank>\s+)",
    re.DOTALL,
)
_NAMES = {
    **dict.fromkeys(("None", "null", "nan", "NaN"), "None"),
    **dict.fromkeys(("True", "true"), "True"),
    **dict.fromkeys(("False", "false"), "False"),
}
# numpy's own spelling of a list, and of single values.
_CALLS = re.compile(r"(?:np\.|numpy\.)?(?:array|str_|bool_?|u?int\d+|float\d+)")


def written_as_text(text: str) -> str | None:
    """What a text is that a table or a list became in a file without such values."""
    bare = text.strip()
    for what, begins, end in (("table", "{", "}"), ("list", ("[", "array("), ("]", ")"))):
        if bare.startswith(begins) and bare.endswith(end):
            return f"{what} written as text, as to_csv does"
    return None


def unwritten(value: Any) -> Any:
    """The table or list that a text stands for; any other value as it is."""
    if not isinstance(value, str) or not written_as_text(value) or len(value) > _LONGEST:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an escape that Python does not know
            return ast.literal_eval(_as_python(value))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _as_python(text: str) -> str:
    """A literal of what numpy writes: without array(..., dtype=...), commas between its items.

    Raises:
        ValueError: where there is anything else than brackets, texts, numbers and such names.
    """
    pieces: list[str] = []
    ended = skipped = False  # whether a value came just before; whether a dtype is being left out
    at, text = 0, text.strip()
    while at < len(text):
        found = _PIECE.match(text, at)
        if found is None:
            raise ValueError("neither a table nor a list")
        at, group, piece = found.end(), found.lastgroup, found[0]
        if group == "blank" or piece == "=":
            continue
        if skipped:  # what follows dtype=
            skipped = False
            continue
        if piece == "dtype":
            skipped = True
            pieces.pop()  # the comma before it
            continue
        if group == "name" and _CALLS.fullmatch(piece) and text.startswith("(", at):
            piece, group = "", "opens"
        elif group == "name":
            piece = _NAMES.get(piece, "?")
        if ended and group not in ("sign", "closes"):
            pieces.append(",")
        pieces.append(piece)
        ended = group not in ("sign", "opens")
    return "".join(pieces)
