"""What verbs print, and what their arguments have in common."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from runner.errors import printable_lines
from runner.utils.console import stdout_errors

# Options that several verbs have.
SET_OPTION: dict[str, Any] = {"action": "append", "default": [], "metavar": "A.B=VALUE"}
RUNS_OPTION: dict[str, Any] = {
    "type": Path,
    "default": Path("runs"),
    "help": "folder of all runs (runs)",
}


def write(text: str) -> None:
    """Print a piece of a log: what is in it cannot steer the terminal, but for the progress bars of
    others, which go back to the line's begin."""
    _print("\r".join(map(printable_lines, text.split("\r"))))


def _print(text: str) -> None:
    try:
        with stdout_errors():
            print(text, end="", flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.exit(128 + 13)


def write_data(text: str) -> None:
    """Print what a program reads, such as JSON or a script: in UTF-8, whatever the terminal
    spells."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A lone surrogate is spelt as JSON spells it.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    _print(text)


def write_line(text: str) -> None:
    """Print a line."""
    _print(f"{printable_lines(text)}\n")


def write_table(table: RenderableType) -> None:
    """Print a table, as wide and as coloured as the terminal that it goes to."""
    screen = Console(highlight=False, emoji=False)
    text = io.StringIO()
    Console(
        file=text,
        width=screen.width,
        force_terminal=screen.is_terminal,
        color_system="auto" if screen.is_terminal else None,
        highlight=False,
        emoji=False,
    ).print(table)
    _print(text.getvalue())


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)
