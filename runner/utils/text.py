"""Small spellings: cut texts, choices, durations, what an exception says."""

from __future__ import annotations

import math

from pydantic import ValidationError


def shorten(text: str, length: int = 60) -> str:
    """Cut a text that has more characters than `length`."""
    return text if len(text) <= length else text[: length - 3] + "..."


def divisors(number: int) -> list[int]:
    """All whole numbers that divide `number`, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def one_of(values: list[int] | tuple[str, ...]) -> str:
    """Spell a choice: `1, 2 or 4`."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, in one line: where it stands, and what it is."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the table'}: {first['msg']}"


def duration(seconds: float) -> str:
    """Spell seconds as a person would: 48 s, 7 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def megabytes(size: int) -> str:
    """Spell a size in bytes: `773 MB`, below one `0.4 MB`."""
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e6:.1f} MB"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; its kind, if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
