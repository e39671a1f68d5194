"""What verbs print: lines, tables, and the arguments that several verbs share."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator

from rich.console import Console, RenderableType

# What a verb says, piece by piece; its exit code is 0 unless it raises.
Words = Iterator[str]


def _drawn(shown: RenderableType) -> str:
    """A table as text, as wide and as coloured as the terminal that it goes to."""
    screen = Console(highlight=False, emoji=False)
    text = io.StringIO()
    Console(
        file=text,
        width=screen.width,
        force_terminal=screen.is_terminal,
        color_system="auto" if screen.is_terminal else None,
        highlight=False,
        emoji=False,
    ).print(shown)
    return text.getvalue()


def _say(text: str) -> None:
    _write(f"{text}\n")


def _write(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)
