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
from runner.errors import BadRowsError, DataError, printable
from runner.predict.predictor import Prediction, Predictor, Question
from runner.predict.questions import QuestionRow, Questions, refused
from runner.utils.console import Step, print_error, progress
from runner.utils.files import storage_errors


@dataclass
class Counts:
    """Questions answered, and (place, problem) of those that were not."""

    answered: int
    bad: list[tuple[str, str]]


def predict_questions(
    load: Callable[[], Predictor],
    questions: Questions,
    *,
    on_bad_row: Literal["fail", "drop"],
    output: Path | None,
    say: Callable[[str], None],
    spell: Callable[[Prediction], str] | None = None,
) -> Counts:
    """Answer all questions of a source.

    Args:
        load: opens the model.
        questions: the source.
        on_bad_row: what to do with questions that cannot be asked.
        output: a file for the answers; None says them.
        say: takes a line.
        spell: makes a line of an answer; None: JSON.

    Raises:
        RunnerError, UsageError: before anything is answered, but for what a stream holds later on.
    """
    predictor = load()
    with (
        lines_to(output) if output else nullcontext(say) as write,
        progress("answering", questions.total) as step,
        explaining_inference_oom(),
    ):
        counts = predict_lines(
            predictor,
            questions.groups,
            write,
            name=questions.name,
            on_bad_row=on_bad_row,
            step=step,
            spell=spell or as_json,
        )
    if counts.bad:
        print_error(f"{len(counts.bad)} left out, {counts.answered} answered")
    return counts


def as_json(found: Prediction) -> str:
    """An answer for programs: all that is known of it, in a line."""
    return json.dumps(found.record(), ensure_ascii=False)


def in_words(found: Prediction) -> str:
    """An answer for people: `washable linen (0.93)`."""
    return f"{printable(found.answer) or 'no answer'} ({found.score:.2f})"


def predict_lines(
    predictor: Predictor,
    groups: Iterable[list[QuestionRow]],
    write: Callable[[str], None],
    *,
    name: str,
    on_bad_row: Literal["fail", "drop"],
    step: Step,
    spell: Callable[[Prediction], str] = as_json,
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
        spell: makes a line of an answer.

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
            write(spell(found))
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
