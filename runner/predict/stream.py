"""Does what `predict` is asked: questions in, a line of JSON for each answer out, as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runner.distributed.failures import explaining_inference_oom
from runner.errors import BadRowsError, DataError
from runner.job.schema import Columns
from runner.predict.predictor import Prediction, Predictor, Question
from runner.predict.questions import QuestionRow, file_questions, live_questions, refused, survey
from runner.utils.console import Step, print_error, progress
from runner.utils.files import storage_errors


@dataclass
class Counts:
    """Questions answered, and (place, problem) of those that were not."""

    answered: int
    bad: list[tuple[str, str]]


def predict_questions(
    load: Callable[[], Predictor],
    source: str | tuple[str, str] | int,
    columns: Columns,
    *,
    on_bad_row: Literal["fail", "drop"],
    output: Path | None,
    say: Callable[[str], None],
) -> Counts:
    """Answer all questions of a source.

    Args:
        load: opens the model.
        source: a file or a slice of one; or a question and its context; or the descriptor of a
            stream of JSON lines.
        columns: of flat files.
        on_bad_row: what to do with questions that cannot be asked.
        output: a file for the answers; None says them.
        say: takes a line.

    Raises:
        RunnerError, UsageError: before anything is answered, but for what a stream holds later on.
    """
    total = None
    if isinstance(source, tuple):
        name, total = "the question", 1
        groups = iter([[QuestionRow(name, "1", *source, None)]])
    elif isinstance(source, int):
        name = "stdin"
        groups = live_questions(source, name, columns)
    else:
        # A look at the whole file comes first: what is wrong in it must not wait for the model.
        name, (good, bad) = source, survey(source, columns)
        if bad and on_bad_row == "fail":
            raise DataError(refused(name, bad))
        groups, total = file_questions(source, columns), good + len(bad)
    predictor = load()
    with (
        lines_to(output) if output else nullcontext(say) as write,
        progress("answering", total) as step,
        explaining_inference_oom(),
    ):
        counts = predict_lines(
            predictor, groups, write, name=name, on_bad_row=on_bad_row, step=step
        )
    if counts.bad:
        print_error(f"{len(counts.bad)} left out, {counts.answered} answered")
    return counts


def predict_lines(
    predictor: Predictor,
    groups: Iterable[list[QuestionRow]],
    write: Callable[[str], None],
    *,
    name: str,
    on_bad_row: Literal["fail", "drop"],
    step: Step,
) -> Counts:
    """Answer groups of questions and write a line for each, in order.

    Args:
        predictor: the model.
        groups: questions that are answered together; a group is in memory at a time.
        write: takes a line without its end.
        name: of the input, for messages.
        on_bad_row: "fail" ends at the first question that cannot be asked, after the answers before
            it; "drop" leaves it out and says so on stderr.
        step: told how many are done.

    Raises:
        DataError: at the first bad question, with on_bad_row = "fail".
    """
    counts = Counts(0, [])
    for group in groups:
        for row, found in _answered(predictor, group):
            if isinstance(found, str):
                counts.bad.append((row.place, found))
                if on_bad_row == "fail":
                    raise DataError(refused(name, counts.bad))
                print_error(f"left out: {row.place}: {found}")
                continue
            write(json.dumps(found.record(), ensure_ascii=False))
            counts.answered += 1
        step(counts.answered + len(counts.bad))
    return counts


def _answered(
    predictor: Predictor, group: list[QuestionRow]
) -> Iterator[tuple[QuestionRow, Prediction | str]]:
    """Each row with its answer, or with what is wrong with it."""
    good = [row for row in group if row.problem is None]
    questions = [Question(row.id, row.question, row.context) for row in good]
    try:
        answers: list[Prediction | str] = list(predictor.answers(questions))
    except BadRowsError as error:
        bad = error.rows
        rest = iter(predictor.answers([q for n, q in enumerate(questions) if n not in bad]))
        answers = [bad[n] if n in bad else next(rest) for n in range(len(questions))]
    found = {row.place: answer for row, answer in zip(good, answers, strict=True)}
    for row in group:
        yield row, found[row.place] if row.problem is None else row.problem


@contextmanager
def lines_to(path: Path) -> Iterator[Callable[[str], None]]:
    """Write lines into a file aside, which takes its name once all are there.

    Raises:
        StorageError: if it cannot be written; what stood there before is untouched.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:

                def write(line: str) -> None:
                    file.write(line + "\n")

                yield write
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
