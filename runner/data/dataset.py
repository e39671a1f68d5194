"""Reads questions from a file or the hub, cuts the declared slice, and checks every row before a
model loads."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from runner.data.formats import file_rows
from runner.data.formats.hub_split import hub_rows
from runner.data.formats.rows import Row, kind, short_value
from runner.errors import DataError
from runner.job.schema import Columns
from runner.job.sources import parse_data


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
    """

    source: str
    examples: tuple[Example, ...]
    sha256: str
    dropped: tuple[str, ...]
    revision: str | None = None


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
        DataError: naming the rows (file:row or id) and what is wrong with each kind.
        AssetError: if the data is neither here nor reachable.
    """
    try:
        source = parse_data(name)
    except ValueError as error:
        raise DataError(str(error)) from None
    if source.kind == "hub":
        rows, commit = hub_rows(source, columns)
    else:
        rows, commit = file_rows(Path(source.location), columns), None
    if not rows:
        raise DataError(f"{name}: holds no questions")
    if source.slice is not None:
        start, stop = source.slice.bounds(len(rows))
        if start == stop:
            raise DataError(f"{name}: the slice is empty; the data has {len(rows)} questions")
        rows = rows[start:stop]
    if sample is not None:
        rows = [rows[place] for place in sample_places(len(rows), sample, seed, name)]
    examples, bad = _check(rows, unanswerable)
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


def _check(rows: Sequence[Row], unanswerable: bool) -> tuple[list[Example], list[tuple[str, str]]]:
    examples: list[Example] = []
    bad: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    # A context is shared by several questions: check its encoding once.
    texts: dict[str, str | None] = {}
    for row in rows:
        why = row.answers if isinstance(row.answers, str) else row_problem(row, texts)
        if why is None and not row.answers and not unanswerable:
            why = "no answer (set data.unanswerable = true for SQuAD v2 data)"
        if why is None and row.id in seen:
            why = f"id repeated (first at {seen[row.id]})"
        spans: list[tuple[str, int]] = []
        if why is None:
            spans, why = _spans(row)
        if why is not None:
            bad.append((row.place, why))
            continue
        seen[row.id] = row.place
        examples.append(
            Example(
                row.id,
                row.question,
                row.context,
                tuple(t for t, _ in spans),
                tuple(s for _, s in spans),
            )
        )
    return examples, bad


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


def _spans(row: Row) -> tuple[list[tuple[str, int]], str | None]:
    spans = []
    for text, start in row.answers:
        if not isinstance(text, str):
            return [], f"answer is {kind(text)}, not text"
        if not text.strip():
            return [], "answer is empty"
        if start is None:
            start = row.context.find(text)
            if start < 0:
                why = f"{_other_form(text, row.context)}answer is not in the context"
                return [], f"{why} ({short_value(text)})"
            if row.context.find(text, start + 1) >= 0:
                why = "answer occurs more than once and has no answer_start"
                return [], f"{why} ({short_value(text)})"
        if isinstance(start, float) and start.is_integer():
            start = int(start)
        if not isinstance(start, int) or isinstance(start, bool):
            return [], f"answer_start is {kind(start)}, not a whole number"
        if not 0 <= start < len(row.context):
            size = len(row.context)
            return [], f"answer_start is outside the context ({start}, of {size} characters)"
        found = row.context[start : start + len(text)]
        if found != text:
            form = _other_form(text, row.context[start : start + 4 * len(text)])
            why = f"{form}answer text not at answer_start"
            return (
                [],
                f"{why} ({short_value(text)} declared at {start}, {short_value(found)} found)",
            )
        spans.append((text, start))
    return spans, None


def _other_form(text: str, context: str) -> str:
    """What to say first where the two differ only in how accents are encoded."""
    same = unicodedata.normalize("NFC", text) in unicodedata.normalize("NFC", context)
    return "Unicode forms (NFC, NFD) differ: " if same else ""


def _report(name: str, bad: Sequence[tuple[str, str]], total: int) -> str:
    classes = Counter(why.split(" (")[0] if " (" in why else why for _, why in bad)
    common = "; ".join(f"{count} x {why}" for why, count in classes.most_common(5))
    lines = [
        f'{name}: {len(bad)} of {total} rows refused: {common}; set data.on_bad_row = "drop" to'
        " leave them out"
    ]
    lines += [f"  {place}: {why}" for place, why in bad[:5]]
    if len(bad) > 5:
        lines.append(f"  and {len(bad) - 5} more")
    return "\n".join(lines)
