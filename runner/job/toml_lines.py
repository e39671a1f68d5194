"""On which line of a TOML file each key stands; tomli parses values but keeps no positions."""

from __future__ import annotations

import re
from collections.abc import Mapping

import tomli

Path = tuple[str | int, ...]

_KEY_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_KEY = rf"{_KEY_PART}(?:\s*\.\s*{_KEY_PART})*"
_HEADER = re.compile(rf"\s*(\[\[|\[)\s*({_KEY})\s*(?:\]\]|\])")
_ASSIGNMENT = re.compile(rf"\s*({_KEY})\s*=")
# What can open or close inside a value: strings of four kinds, comments, brackets.
_TOKEN = re.compile(
    # Up to five quotes end a multi-line string: two of them are still its text.
    r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{}]|\n',
    re.DOTALL,
)
_DEPTH = 16  # parts of a key that get a line; no key of a job is deeper, and paths stay short


def key_lines(text: str) -> dict[Path, int]:
    """Map each key path of a valid TOML document to its line, counted from 1.

    Tables and elements of arrays of tables get the line of their header (`("probe", 1)` is the
    second `[[probe]]`); keys inside an inline table have no line of their own and are found through
    `line_of`.
    """
    lines: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    prefix: Path = ()
    position, line = 0, 1
    while position < len(text):
        end_of_line = text.find("\n", position)
        end_of_line = len(text) if end_of_line < 0 else end_of_line
        current = text[position:end_of_line]
        header = _HEADER.match(current)
        assignment = None if header else _ASSIGNMENT.match(current)
        if header:
            path = _through_arrays(_parts(header[2]), counts)
            if header[1] == "[[":
                counts[path] = counts.get(path, -1) + 1
                lines.setdefault(path, line)
                path = (*path, counts[path])
            prefix = path
            for length in range(1, len(path)):
                lines.setdefault(path[:length], line)
            lines[path] = line  # also where a deeper header above has implied this table
        elif assignment:
            path = prefix
            for part in _parts(assignment[1]):
                path = (*path, part)
                lines.setdefault(path, line)
            end = _end_of_value(text, position + assignment.end())
            line += text.count("\n", position, end)
            position = end
            end_of_line = text.find("\n", position)
            end_of_line = len(text) if end_of_line < 0 else end_of_line
        position = end_of_line + 1
        line += 1
    return lines


def line_of(lines: Mapping[Path, int], path: Path) -> int | None:
    """Return the line of `path`, or of the nearest key around it; None if nothing around it is in
    the file."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None


def _parts(key: str) -> list[str]:
    parts = re.findall(_KEY_PART, key)[:_DEPTH]
    return [next(iter(tomli.loads(f"{part} = 0"))) for part in parts]


def _through_arrays(parts: list[str], counts: dict[Path, int]) -> Path:
    """Spell `[probe.x]` after a `[[probe]]` as ("probe", index, "x"): it belongs to the last
    element."""
    path: Path = ()
    for place, part in enumerate(parts):
        path = (*path, part)
        if path in counts and place < len(parts) - 1:
            path = (*path, counts[path])
    return path


def _end_of_value(text: str, start: int) -> int:
    """Return the position of the newline that ends the value beginning at `start`."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        if token[0] in ("[", "{"):
            depth += 1
        elif token[0] in ("]", "}"):
            depth -= 1
        elif token[0] == "\n" and depth <= 0:
            return token.start()
    return len(text)
