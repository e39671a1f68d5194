"""Reads questions from a file or the hub, cuts the declared slice, and checks every row before a
model loads."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runner.data.formats import file_rows
from runner.data.formats.diagnosis import absent, misplaced, no_start, no_text
from runner.data.formats.hub_split import hub_rows
from runner.data.formats.rows import Row, is_blank, kind, short_value
from runner.errors import DataError
from runner.job.schema import Columns
from runner.job.sources import parse_data, unread_here

# is_impossible as JSON, CSV and pandas spell it, in small letters; None is none.
_IMPOSSIBLE = {
    **dict.fromkeys(("true", "1", "1.0"), True),
    **dict.fromkeys(("false", "0", "0.0"), False),
    **dict.fromkeys(("", "none", "nan", "null"), None),
}


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        id: unique within its data set.
        question: the question's text.
        context: the text that holds the answer.
        answers: right answers, verbatim in the context; empty for an unanswerable question.
        answer_starts: character offset of each answer in the context.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    answer_starts: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """The questions of one declared slice.

    Attributes:
        source: the name as the job gives it.
        examples: in the order of the file.
        sha256: hash of the examples' content, whatever file they came from.
        dropped: one line for each row left out by `on_bad_row = "drop"`.
        revision: the hub's commit, whatever the job calls it; None for a file.
        contradictions: a sentence for each kind of row that says "no answer" and also not.
        read_as: the format that the file was taken for, and how many questions it holds in all.
    """

    source: str
    examples: tuple[Example, ...]
    sha256: str
    dropped: tuple[str, ...]
    revision: str | None = None
    contradictions: tuple[str, ...] = ()
    read_as: str = ""


def load_dataset(
    name: str,
    *,
    columns: Columns,
    unanswerable: bool,
    on_bad_row: Literal["fail", "drop"],
    sample: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load a declared data set: slice first, then sample, both in questions, then check each row
    that is left.

    Args:
        name: data name as in a job file, file paths absolute or relative to the current folder.
        columns: column names of flat files.
        unanswerable: whether a question may have no answer.
        on_bad_row: refuse the data set, or leave the row out.
        sample: number of questions drawn without replacement, kept in file order.
        seed: decides the draw.

    Raises:
        DataError: naming the rows (file:line, row or id) and what is wrong with each kind.
        AssetError: if the data is neither here nor reachable.
    """
    try:
        source = parse_data(name)
    except ValueError as error:
        raise DataError(str(error)) from None
    if problem := unread_here(source, Path.cwd()):
        raise DataError(problem)
    if source.kind == "hub":
        (understood, rows), commit = hub_rows(source, columns)
    else:
        (understood, rows), commit = file_rows(Path(source.location), columns), None
    read_as = f"{understood}, {len(rows):,} question{'' if len(rows) == 1 else 's'}"
    if not rows:
        raise DataError(f"{name}: holds no questions")
    if source.slice is not None:
        start, stop = source.slice.bounds(len(rows))
        if start == stop:
            raise DataError(f"{name}: the slice is empty; the data has {len(rows)} questions")
        rows = rows[start:stop]
    if sample is not None:
        rows = [rows[place] for place in sample_places(len(rows), sample, seed, name)]
    examples, bad, contradictions = _check(rows, unanswerable)
    if bad and on_bad_row == "fail":
        raise DataError(_report(name, bad, len(rows)))
    if not examples:
        raise DataError(
            f"{name}: no row is left after dropping bad ones\n{_report(name, bad, len(rows))}"
        )
    return Dataset(
        name,
        tuple(examples),
        content_sha256(examples),
        tuple(f"{p}: {why}" for p, why in bad),
        commit,
        contradictions,
        read_as,
    )


def without_rows(
    dataset: Dataset, bad: Mapping[int, str], on_bad_row: Literal["fail", "drop"]
) -> Dataset:
    """Leave out examples that have turned out bad, or refuse them: `bad` holds their places, one at
    least, and what is wrong with each.

    Raises:
        DataError: naming them; also if none is left.
    """
    told = [(f"question {dataset.examples[place].id}", why) for place, why in bad.items()]
    report = _report(dataset.source, told, len(dataset.examples))
    if on_bad_row == "fail":
        raise DataError(report)
    examples = tuple(e for place, e in enumerate(dataset.examples) if place not in bad)
    if not examples:
        raise DataError(f"{dataset.source}: no row is left after dropping bad ones\n{report}")
    return replace(
        dataset,
        examples=examples,
        sha256=content_sha256(examples),
        dropped=(*dataset.dropped, *(f"{place}: {why}" for place, why in told)),
    )


def sample_places(total: int, sample: int, seed: int, name: str = "data") -> list[int]:
    """Draw `sample` of `total` positions: the head of numpy's seeded permutation, ascending."""
    if sample > total:
        raise DataError(f"{name}: cannot draw a sample of {sample} from {total} questions")
    return sorted(np.random.default_rng(seed).permutation(total)[:sample].tolist())


def content_sha256(examples: Iterable[Example]) -> str:
    """Hash of ids, questions, contexts and answers, independent of the file format they came in."""
    digest = hashlib.sha256()
    for example in examples:
        row = [
            example.id,
            example.question,
            example.context,
            example.answers,
            example.answer_starts,
        ]
        digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


# --- checking ----------------------------------------------------------------------------------


def _check(
    rows: Sequence[Row], unanswerable: bool
) -> tuple[list[Example], list[tuple[str, str]], tuple[str, ...]]:
    """Examples of the good rows; (place, problem) of the others; what good ones contradict."""
    examples: list[Example] = []
    bad: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    contradictions: dict[tuple[str, str], list[str]] = {}
    # A context is shared by several questions: check its encoding once.
    texts: dict[str, str | None] = {}
    for row in rows:
        answers, why, contradiction = _meant(row)
        why = why or row_problem(row, texts)
        if why is None and not answers and not unanswerable:
            reason = f"{contradiction}; " if contradiction else ""
            why = f"no answer ({reason}set data.unanswerable = true for SQuAD v2 data)"
        if why is None and row.id in seen:
            why = f"id repeated (first at {seen[row.id]})"
        spans: list[tuple[str, int]] = []
        if why is None:
            spans, why = _spans(answers, row.context)
        if why is not None:
            bad.append((row.place, why))
            continue
        seen[row.id] = row.place
        if contradiction:
            taken = "answered" if spans else "without an answer"
            contradictions.setdefault((contradiction, taken), []).append(row.place)
        examples.append(
            Example(
                row.id,
                row.question,
                row.context,
                tuple(t for t, _ in spans),
                tuple(s for _, s in spans),
            )
        )
    told = (
        f"{len(places)} question{'' if len(places) == 1 else 's'} taken as {taken} where"
        f" {contradiction}, first: {places[0]}"
        for (contradiction, taken), places in contradictions.items()
    )
    return examples, bad, tuple(told)


def _meant(row: Row) -> tuple[list[tuple[Any, Any]], str | None, str | None]:
    """The answers that a row means, none where it says in any spelling that there is none; why that
    cannot be told; what contradicts it."""
    spelled = str(row.impossible).strip().lower()
    if spelled not in _IMPOSSIBLE:
        return [], f"is_impossible is {kind(row.impossible)}, not true or false", None
    impossible = _IMPOSSIBLE[spelled]
    listed = row.answers if isinstance(row.answers, list) else []
    # str.find() and many tools say -1 for "not there".
    answers = [(text, start) for text, start in listed if not is_blank(text) and start != -1]
    if impossible:
        return [], None, "is_impossible is true beside an answer" if answers else None
    if isinstance(row.answers, str):
        return [], row.answers, None
    if answers:
        fewer = len(answers) < len(listed)
        return answers, None, "an answer is empty or at -1 beside others" if fewer else None
    if any(not is_blank(text) for text, _ in listed):
        return [], None, "answer_start is -1 beside an answer"
    return [], None, "is_impossible is false without an answer" if impossible is False else None


def row_problem(row: Row, texts: dict[str, str | None]) -> str | None:
    for name, value in (("id", row.id), ("question", row.question), ("context", row.context)):
        if value is None:
            return f"no {name}"
        if not isinstance(value, str):
            return f"{name} is {kind(value)}, not text"
        if value not in texts:
            texts[value] = _text_problem(value)
        if texts[value] is not None:
            return f"{name} {texts[value]}"
    return None


def _text_problem(text: str) -> str | None:
    if not text.strip():
        return "is empty"
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds a lone surrogate (broken encoding)"
    return None


def _spans(
    answers: Sequence[tuple[Any, Any]], context: str
) -> tuple[list[tuple[str, int]], str | None]:
    spans = []
    for text, start in answers:
        if not isinstance(text, str):
            return [], no_text(text)
        if start is None:
            start = context.find(text)
            if start < 0:
                return [], absent(text, context)
            if context.find(text, start + 1) >= 0:
                why = "answer occurs more than once and has no answer_start"
                return [], f"{why} ({short_value(text)})"
        if isinstance(start, float) and start.is_integer():
            start = int(start)
        if not isinstance(start, int) or isinstance(start, bool):
            return [], no_start(start)
        if start < 0 or not context.startswith(text, start):
            return [], misplaced(text, start, context)
        spans.append((text, start))
    return spans, None


def _report(name: str, bad: Sequence[tuple[str, str]], total: int) -> str:
    classes = Counter(why.split(" (")[0] if " (" in why else why for _, why in bad)
    common = "; ".join(f"{count} x {why}" for why, count in classes.most_common(5))
    fix = '; set data.on_bad_row = "drop" to leave them out' if len(bad) < total else ""
    lines = [f"{name}: {len(bad)} of {total} rows refused: {common}{fix}"]
    lines += [f"  {place}: {why}" for place, why in bad[:5]]
    if len(bad) > 5:
        lines.append(f"  and {len(bad) - 5} more")
    return "\n".join(lines)
