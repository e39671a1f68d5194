"""What a run prints: tables and a live bar on a terminal, one plain line every few steps in a batch
log."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from runner.errors import StorageError, printable, printable_lines
from runner.utils.disk import is_full
from runner.utils.files import open_own, storage_errors
from runner.utils.text import duration

LOG_WIDTH = 100
_PATIENCE_S = 1.0  # seconds that a run waits for a terminal to take a line


@contextmanager
def stdout_errors() -> Iterator[None]:
    """Name standard output where it can be written no more: its disk is full, say.

    Raises:
        StorageError: saying why; BrokenPipeError passes, for then its reader has gone.
    """
    try:
        yield
    except OSError as error:
        _silence(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        hint = "; free some space where it goes, or send it elsewhere" if is_full(error) else ""
        raise StorageError(f"standard output: {error.strerror}{hint}") from error


def _silence(stream: TextIO) -> None:
    """Send what follows nowhere: what a stream holds back would fail again when the process
    ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
        try:
            _write_through(self._file.fileno(), text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            self.failure = self.failure or error
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


class _Screen:
    """Standard output, for rich to write into. What it does not take is lost, and what it takes
    late, as a terminal after Ctrl-S, is not waited for: a run neither ends nor stands still for
    what it says."""

    def __init__(self) -> None:
        self._stream = sys.stdout  # rich puts another one in its place meanwhile
        self.encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._waiting: queue.Queue[str | threading.Event] = queue.Queue(maxsize=1000)
        self._writer: threading.Thread | None = None
        self._stalled: threading.Event | None = None
        self.failure: str | None = None

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        self._put(text)
        return len(text)

    def flush(self) -> None:
        """Wait until all is written, but not long; and not again before that has come about."""
        if self._stalled is not None and not self._stalled.is_set():
            return
        written = threading.Event()
        if self._put(written):
            self._stalled = None if written.wait(_PATIENCE_S) else written

    def _put(self, item: str | threading.Event) -> bool:
        if self._stream is None:
            return False
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, daemon=True, name="screen")
            self._writer.start()
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self.failure = self.failure or "it takes nothing"
            return False
        return True

    def _write_all(self) -> None:
        while True:
            item = self._waiting.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            try:
                self._write(item)
            except (OSError, ValueError) as error:
                self.failure = self.failure or getattr(error, "strerror", None) or str(error)

    def _write(self, text: str) -> None:
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):  # a stream without a file
            self._stream.write(text)
            return
        # Past Python's buffer, which would keep what failed and fail again when the process ends.
        _write_through(descriptor, text.encode(self.encoding, "backslashreplace"))


def _write_through(descriptor: int, unwritten: bytes) -> None:
    while unwritten:
        unwritten = unwritten[os.write(descriptor, unwritten) :]


class Reporter:
    """Prints to the terminal and to the run's log on rank 0; on other ranks every method does
    nothing. Of the two, one that cannot be written costs a line in the other."""

    def __init__(self, log: Path | None, *, speaks: bool, verbose: bool = False) -> None:
        # No emoji: `job.toml:100:` would become `job.toml` and a picture.
        self._stdout = _Screen()
        self._screen = Console(
            file=self._stdout,  # type: ignore[arg-type]  # it has what rich asks of one
            quiet=not speaks,
            highlight=False,
            emoji=False,
        )
        self._verbose = verbose
        self._phase: str | None = None  # the one that was said last, if nothing was said since
        self._log: Console | None = None
        self._gaps_reported: set[str] = set()
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

    def line(self, text: str = "", *, detail: bool = False) -> None:
        """Print one line (no markup: texts hold brackets); a detail only where the run is to be
        verbose, but into the log always."""
        text, self._phase = printable_lines(text), None
        if self._verbose or not detail:
            self._screen.print(text, markup=False, soft_wrap=True)
        if self._log:
            self._log_line(text)
            self._report_gaps()

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Name what takes long now: on a terminal as long as it takes, else in a line."""
        if self.live:
            with self._screen.status(Text(text), spinner="line"):
                yield
            return
        if text != self._phase:
            self.line(text)
            self._phase = text
        yield

    def table(self, table: RenderableType, *, rows: int | None = None) -> None:
        """Print a table; with `rows`, only that many of its last lines."""
        self._phase = None
        _print_table(self._screen, table, rows)
        if self._log:
            _print_table(self._log, table, rows)
            self._report_gaps()

    def _log_line(self, text: str) -> None:
        if self._log:
            stamped = f"{time.strftime('%H:%M:%S')} {text}" if text else ""
            self._log.print(stamped, markup=False, soft_wrap=True)

    def _report_gaps(self) -> None:
        """Say once in each of the two that the other one has gaps."""
        if self._file.failure is not None and self._is_new("log"):
            text = f"{self._path}: {self._file.failure.strerror}: not all that is said is in it"
            self._screen.print(text, markup=False, soft_wrap=True)
        if self._stdout.failure is not None and self._is_new("stdout"):
            self._log_line(
                f"standard output: {self._stdout.failure}: not all that is said is in it"
            )

    def _is_new(self, gap: str) -> bool:
        known = gap in self._gaps_reported
        self._gaps_reported.add(gap)
        return not known

    @contextmanager
    def steps(
        self,
        title: str,
        total: int,
        every: int,
        later: Callable[[float], float] = lambda _: 0.0,
    ) -> Iterator[Step]:
        """Follow a phase of `total` steps: a bar on a terminal, else a line after the first and
        every `every` steps.

        Args:
            title: in front of it.
            total: steps of the phase, some of which an earlier start may have done.
            every: steps between two lines.
            later: what comes after the phase, in seconds, told the seconds of a step.
        """
        began, before = time.monotonic(), -1

        def left(done: int) -> str:
            nonlocal before
            before = done - 1 if before < 0 else before
            pace = (time.monotonic() - began) / max(1, done - before)
            return f"{duration(pace * (total - done) + later(pace))} left"

        def is_told(done: int, note: str) -> bool:
            return bool(note) and (done % every == 0 or done in (1, total))

        if not self.live:

            def line(done: int, note: str = "") -> None:
                remains = left(done)
                if is_told(done, note):
                    self.line(f"{title} {done}/{total}  {note}  {remains}")

            yield line
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
        note_column = TextColumn("{task.fields[note]}", markup=False)
        with Progress(*columns, note_column, console=self._screen, transient=True) as bar:
            task = bar.add_task(title, total=total, note="")

            def follow(done: int, note: str = "") -> None:
                bar.update(task, completed=done, note=f"{left(done)}  {note}")
                if self._log and is_told(done, note):
                    self._log_line(f"{title} {done}/{total}  {note}")

            yield follow


def _print_table(console: Console, table: RenderableType, rows: int | None) -> None:
    if rows is None:
        console.print(table)
        return
    lines = ["".join(part.text for part in line) for line in console.render_lines(table, pad=False)]
    for line in [line.rstrip() for line in lines if line.strip()][-rows:]:
        console.print(line, markup=False, soft_wrap=True)


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


def append_log(path: Path, text: str) -> None:
    """Add to a run's log what an end has to say, with the time; what cannot be written is lost."""
    now = time.strftime("%H:%M:%S")
    with suppress(OSError), open_own(path, "a") as file:
        file.write("".join(f"{now} {line}" for line in _lines(text)))


def print_error(text: str) -> None:
    """Write an error sentence to stderr; one that cannot be written is lost, its code is not."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write("".join(_lines(text)))
        sys.stderr.flush()
    except (OSError, ValueError):
        _silence(sys.stderr)


def _lines(text: str) -> list[str]:
    return [f"{printable(line)}\n" for line in text.split("\n")]
