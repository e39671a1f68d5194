"""Where `predict` finds questions: a file, or lines of JSON that are still arriving."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runner.data.formats import file_rows, is_flat, source_here
from runner.data.formats.files.json_text import parse_json
from runner.data.formats.files.packed import MAGIC
from runner.data.formats.judge import row_problem
from runner.data.formats.layouts.flat import flat_rows
from runner.data.formats.rows import RawTable, Row
from runner.errors import AssetError, DataError, StorageError
from runner.job.schema import Columns

GROUP = 256  # questions answered together, sorted by length

_TEXT = 4_000_000  # bytes of lines that wait at most, the last of them aside

_READ = 1 << 16


@dataclass(frozen=True)
class Questions:
    """Questions to be asked: what they come from, groups of them, how many if that is known."""

    name: str
    groups: Iterator[list[QuestionRow]]
    total: int | None

    @classmethod
    def find(
        cls,
        source: str | tuple[str, str] | int,
        columns: Columns,
        on_bad_row: Literal["fail", "drop"],
    ) -> Questions:
        """Look whether there are some, before a model is opened.

        Args:
            source: a file or a slice of one; or a question and its context; or the descriptor of a
                stream of JSON lines.
            columns: of flat files.
            on_bad_row: what to do with questions that cannot be asked.

        Raises:
            DataError, AssetError: if a file cannot be read, or holds what is refused.
        """
        if isinstance(source, tuple):
            row = QuestionRow("the question", "1", *source, None)
            return cls(row.place, iter([[row]]), 1)
        if isinstance(source, int):
            return cls("stdin", live_questions(source, "stdin", columns), None)
        good, bad = survey(source, columns)
        if bad and on_bad_row == "fail":
            raise DataError(refused(source, bad))
        return cls(source, file_questions(source, columns), good + len(bad))


def file_questions(name: str, columns: Columns) -> Iterator[list[QuestionRow]]:
    """Yield the questions of a file in groups; of JSON Lines only a group is in memory.

    Args:
        name: a file, or a slice of one: `dev.json[:100]`.
        columns: of flat files.

    Raises:
        DataError, AssetError: if it cannot be read.
    """
    if Path(name).suffix.lower() == ".jsonl" and _holds_rows(Path(name)):
        yield from _grouped_lines(Path(name), columns)
        return
    rows = read_question_rows(name, columns)
    for place in range(0, len(rows), GROUP):
        yield rows[place : place + GROUP]


def survey(name: str, columns: Columns) -> tuple[int, list[tuple[str, str]]]:
    """Count the questions of a file that can be asked, and list (place, problem) of the others."""
    good, bad = 0, []
    for group in file_questions(name, columns):
        for row in group:
            if row.problem is None:
                good += 1
            else:
                bad.append((row.place, row.problem))
    return good, bad


def live_questions(descriptor: int, name: str, columns: Columns) -> Iterator[list[QuestionRow]]:
    """Yield groups of questions from lines of JSON as they arrive.

    A group holds what has arrived while the one before it was answered, so that a person's single
    question is answered at once and a pipe's many are answered together. A thread reads ahead, no
    further than a few groups.

    Args:
        descriptor: of an open pipe, file or terminal.
        name: for messages.
        columns: names in the objects.

    Raises:
        StorageError: if reading fails.
    """
    waiting = _Waiting()
    # Not through sys.stdin: a thread that waits in its lock could not be left at the end.
    threading.Thread(target=_read_lines, args=(descriptor, waiting), daemon=True).start()
    number = count = 0
    while lines := waiting.take():
        group = []
        for line in lines:
            number += 1
            if line.strip():
                count += 1
                group.append(parse_question_row(line, name, number, count, columns))
        if group:
            yield group
    if waiting.error is not None:
        raise StorageError(f"{name}: {waiting.error.strerror or waiting.error}")


class _Waiting:
    """Lines that have arrived and wait for their answers: few enough to keep memory small."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self._lines: list[bytes] = []
        self._size = 0
        self._ended = False
        self._changed = threading.Condition()

    def put(self, line: bytes) -> None:
        """Add a line as soon as there is room."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._lines) < GROUP and self._size < _TEXT)
            self._lines.append(line)
            self._size += len(line)
            self._changed.notify_all()

    def end(self, error: OSError | None) -> None:
        """Say that no more lines come, and why if not because all are here."""
        with self._changed:
            self._ended, self.error = True, error
            self._changed.notify_all()

    def take(self) -> list[bytes]:
        """All lines that wait, as soon as there is one; none once no more come."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._ended)
            taken, self._lines, self._size = self._lines, [], 0
            self._changed.notify_all()
            return taken


def _read_lines(descriptor: int, waiting: _Waiting) -> None:
    pieces: list[bytes] = []  # of a line that has not ended yet
    try:
        while piece := os.read(descriptor, _READ):
            *whole, rest = piece.split(b"\n")
            for line in whole:
                waiting.put(b"".join([*pieces, line]))
                pieces = []
            pieces.append(rest)
    except OSError as error:
        waiting.end(error)
        return
    if any(pieces):
        waiting.put(b"".join(pieces))
    waiting.end(None)


def _holds_rows(path: Path) -> bool:
    """Whether a file's lines are questions, as its name says: not articles, nor one JSON
    document, nor packed."""
    first = b""
    try:
        with path.open("rb") as file:
            first = next((line.strip() for line in file if line.strip()), b"")
        row = json.loads(first)
    except (OSError, ValueError, RecursionError):
        return first not in (b"[", b"{") and not first.startswith(MAGIC)
    return isinstance(row, dict) and not isinstance(row.get("data"), list) and is_flat(row)


def _grouped_lines(path: Path, columns: Columns) -> Iterator[list[QuestionRow]]:
    try:
        with path.open("rb") as file:
            group: list[QuestionRow] = []
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            for count, (number, line) in enumerate(lines, 1):
                group.append(parse_question_row(line, path.name, number, count, columns))
                if len(group) == GROUP:
                    yield group
                    group = []
            if group:
                yield group
    except FileNotFoundError:
        raise AssetError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def refused(name: str, bad: Sequence[tuple[str, str]]) -> str:
    """The sentence for rows that cannot be asked, and the first of them."""
    lines = [
        f"{name}: {len(bad)} question{'' if len(bad) == 1 else 's'} cannot be asked;"
        " --on-bad-row drop leaves such rows out"
    ]
    lines += [f"  {place}: {why}" for place, why in bad[:5]]
    if len(bad) > 5:
        lines.append(f"  and {len(bad) - 5} more")
    return "\n".join(lines)


@dataclass(frozen=True)
class QuestionRow:
    """A question without right answers, and where it stands; `problem` says why it cannot be asked,
    and is None where it can."""

    place: str
    id: str
    question: str
    context: str
    problem: str | None


def read_question_rows(name: str, columns: Columns) -> list[QuestionRow]:
    """Read the questions of a file, or of a slice of it, whatever answers stand beside them.

    Raises:
        DataError, AssetError: if the file cannot be read as a whole; a wrong row has its problem.
    """
    source = source_here(name)
    if source.kind == "hub":
        raise DataError(f"{name}: no file; questions are read from a file or from stdin")
    try:
        rows = file_rows(Path(source.location), columns, answers=False).rows
    except DataError as error:
        raise DataError(_for_command(error)) from None
    if source.slice is not None:
        rows = rows[slice(*source.slice.bounds(len(rows)))]
    texts: dict[str, str | None] = {}
    return [_question_row(row, texts) for row in rows]


def parse_question_row(
    line: bytes, file: str, number: int, count: int, columns: Columns
) -> QuestionRow:
    """Read a question from line `number` of JSON, the `count`th that is not empty; what is wrong
    with it is its problem."""
    place = f"{file}:{number}"
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        table = RawTable([parse_json(text, place)], lines=[number])
        row, *_ = flat_rows(file, table, columns, answers=False, first=count).rows
    except UnicodeDecodeError as error:
        return QuestionRow(place, "", "", "", f"byte 0x{line[error.start]:02x} is not UTF-8")
    except DataError as error:
        why = _for_command(error).removeprefix(f"{place}: ").removeprefix(f"{file}: ")
        return QuestionRow(place, "", "", "", why)
    return _question_row(row, {})


def _for_command(error: DataError) -> str:
    # Who has no job file names columns on the command line.
    return str(error).replace("in [data.columns]", "with --column KEY=NAME")


def _question_row(row: Row, texts: dict[str, str | None]) -> QuestionRow:
    bad = isinstance(row.answers, str) and row.question is None and row.context is None
    why = str(row.answers) if bad else row_problem(row, texts)
    if why is not None:
        return QuestionRow(row.place, "", "", "", why)
    return QuestionRow(row.place, str(row.id), str(row.question), str(row.context), None)
