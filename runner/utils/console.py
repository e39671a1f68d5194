"""What a run prints: tables and a live bar on a terminal, one plain line every few steps in a batch
log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from runner.errors import StorageError, printable, printable_lines
from runner.utils.disk import is_full
from runner.utils.files import open_own, storage_errors
from runner.utils.text import duration

LOG_WIDTH = 100


@contextmanager
def stdout_errors() -> Iterator[None]:
    """Name standard output where it can be written no more: its disk is full, say.

    Raises:
        StorageError: saying why; BrokenPipeError passes, for then its reader has gone.
    """
    try:
        yield
    except OSError as error:
        _silence_stdout()
        if isinstance(error, BrokenPipeError):
            raise
        hint = "; free some space where it goes, or send it elsewhere" if is_full(error) else ""
        raise StorageError(f"standard output: {error.strerror}{hint}") from error


def _silence_stdout() -> None:
    # What is left in its buffer would fail again when the process ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Step(Protocol):
    """Called after each step of a phase; `note` is a few words such as the loss."""

    def __call__(self, done: int, note: str = "") -> None: ...


class _Log:
    """The run's log, for rich to write into. A line that finds no room is lost: a run does not end
    for its log."""

    encoding = "utf-8"

    def __init__(self, path: Path) -> None:
        with storage_errors(path):
            self._file = open_own(path, "a")
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        # Past Python's buffer, which would keep what failed and fail again when the process ends.
        unwritten = text.encode("utf-8", "backslashreplace")
        try:
            while unwritten:
                unwritten = unwritten[os.write(self._file.fileno(), unwritten) :]
        except OSError as error:
            self.failure = self.failure or error
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


class _Screen:
    """Standard output, for rich to write into. Once it cannot be written (its reader has gone, its
    terminal is closed, its disk is full) nothing more is: a run does not end for its lines."""

    def __init__(self) -> None:
        self._file = sys.stdout  # a live bar puts something else in its place that writes here
        self.encoding = self._file.encoding
        self.failure: OSError | None = None

    def isatty(self) -> bool:
        return self.failure is None and self._file.isatty()

    def write(self, text: str) -> int:
        if self.failure is None:
            try:
                self._file.write(text)
                self._file.flush()
            except OSError as error:
                self.failure = error
                _silence_stdout()
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


class Reporter:
    """Prints to the terminal and to the run's log on rank 0; on other ranks every method does
    nothing. A log that cannot be written costs a line on the terminal, a terminal that is gone one
    in the log."""

    def __init__(self, log: Path | None, *, speaks: bool) -> None:
        self._stdout = _Screen()
        # No emoji: `job.toml:100:` would become `job.toml` and a picture.
        self._screen = Console(
            file=self._stdout,  # type: ignore[arg-type]  # it has what rich asks of one
            quiet=not speaks,
            highlight=False,
            emoji=False,
        )
        self._log: Console | None = None
        self._gaps: set[str] = set()
        if speaks and log is not None:
            self._path, self._file = log, _Log(log)
            self._log = Console(
                file=self._file,  # type: ignore[arg-type]  # it has what rich asks of one
                width=LOG_WIDTH,
                highlight=False,
                emoji=False,
                no_color=True,
            )
        self.live = speaks and self._screen.is_terminal

    def line(self, text: str = "") -> None:
        """Print one line (no markup: texts hold brackets)."""
        text = printable_lines(text)
        self._screen.print(text, markup=False, soft_wrap=True)
        if self._log:
            self._log.print(
                f"{time.strftime('%H:%M:%S')} {text}" if text else "", markup=False, soft_wrap=True
            )
            self._report_gaps(self._log)

    def table(self, renderable: RenderableType) -> None:
        """Print a table."""
        self._screen.print(renderable)
        if self._log:
            self._log.print(renderable)
            self._report_gaps(self._log)

    def _report_gaps(self, log: Console) -> None:
        """Print once that the log has gaps, and into the log that the screen has."""
        places = (str(self._path), self._file, self._screen), ("standard output", self._stdout, log)
        for name, file, other in places:
            if file.failure is not None and name not in self._gaps:
                self._gaps.add(name)
                reason = f"{file.failure.strerror}: not all that is said is in it"
                other.print(f"{name}: {reason}", markup=False, soft_wrap=True)

    @contextmanager
    def steps(self, title: str, total: int, every: int) -> Iterator[Step]:
        """Follow a phase of `total` steps: a bar on a terminal, else a line every `every` steps."""
        if self.live:
            bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._screen,
                transient=True,
            )
            with bar:
                task = bar.add_task(title, total=total, note="")

                def follow(done: int, note: str = "") -> None:
                    bar.update(task, completed=done, note=note)
                    if self._log and note and (done % every == 0 or done == total):
                        self._log.print(
                            f"{time.strftime('%H:%M:%S')} {title} {done}/{total}  {note}",
                            markup=False,
                            soft_wrap=True,
                        )

                yield follow
            return
        began = time.monotonic()

        def line(done: int, note: str = "") -> None:
            if note and (done % every == 0 or done == total):
                left = (time.monotonic() - began) / max(1, done) * (total - done)
                self.line(f"{title} {done}/{total}  {note}  {duration(left)} left")

        yield line


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Step]:
    """A bar on stderr, where that is a terminal; elsewhere nothing. Results may go to stdout
    meanwhile, unless that is the same terminal: then there is no bar either.

    Args:
        title: in front of the bar.
        total: how much there is to do; None where nobody knows.
    """
    screen = Console(file=sys.stderr, highlight=False, emoji=False)
    if not screen.is_terminal or sys.stdout.isatty():
        yield lambda done, note="": None
        return
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=20)]
    columns += [MofNCompleteColumn(), TimeRemainingColumn()] if total is not None else []
    bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=screen, transient=True)
    with bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda done, note="": bar.update(task, completed=done, note=note)


def print_error(text: str) -> None:
    """Write an error sentence to stderr."""
    lines = "\n".join(printable(line) for line in text.split("\n"))
    Console(file=sys.stderr, highlight=False, emoji=False).print(
        lines, markup=False, soft_wrap=True
    )
