"""Reads questions from a file or the hub, cuts the declared slice, and checks every row before a
model loads."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runner.data.formats import file_rows, source_here
from runner.data.formats.hub_split import hub_rows
from runner.data.formats.judge import Example, check_rows
from runner.data.formats.repair import Repair, Repairer
from runner.data.formats.rows import Reading, Row, without_marker
from runner.errors import DataError
from runner.job.schema import Columns, OnBadRow
from runner.job.sources import DataSource


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
        repairs: what `on_bad_row = "repair"` mended.
        read_as: the format that the file was taken for, and how many questions it holds in all.
    """

    source: str
    examples: tuple[Example, ...]
    sha256: str
    dropped: tuple[str, ...]
    revision: str | None = None
    contradictions: tuple[str, ...] = ()
    repairs: tuple[Repair, ...] = ()
    read_as: str = ""


def load_dataset(
    name: str,
    *,
    columns: Columns,
    unanswerable: bool,
    on_bad_row: OnBadRow,
    no_answer: str | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load a declared data set: slice first, then sample, both in questions, then check each row
    that is left.

    Args:
        name: data name as in a job file, file paths absolute or relative to the current folder.
        columns: column names of flat files.
        unanswerable: whether a question may have no answer.
        on_bad_row: refuse the data set, leave the row out, or mend its answers.
        no_answer: a text that means that there is none.
        sample: number of questions drawn without replacement, kept in file order.
        seed: decides the draw.

    Raises:
        DataError: naming the rows (file:line, row or id) and what is wrong with each kind.
        AssetError: if the data is neither here nor reachable.
    """
    source, reading, commit = _read(name, columns)
    rows = reading.rows
    told: list[str] = []
    if no_answer is not None:
        rows, told = _unmarked(rows, no_answer)
    repairer = None if on_bad_row == "drop" else Repairer(rows)
    if source.slice is not None:
        start, stop = source.slice.bounds(len(rows))
        if start == stop:
            raise DataError(f"{name}: the slice is empty; the data has {len(rows)} questions")
        rows = rows[start:stop]
    if sample is not None:
        rows = [rows[place] for place in sample_places(len(rows), sample, seed, name)]
    checked = check_rows(rows, unanswerable, repairer if on_bad_row == "repair" else None)
    examples, bad = checked.examples, checked.bad
    if bad and repairer is not None:
        left = bad if on_bad_row == "repair" else check_rows(rows, unanswerable, repairer).bad
        raise DataError(_report(name, bad, len(rows), mendable=len(bad) - len(left)))
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
        (*told, *checked.contradictions),
        tuple(checked.repairs),
        str(reading),
    )


def _read(name: str, columns: Columns) -> tuple[DataSource, Reading, str | None]:
    """What a name points to, all its rows, and the hub's commit."""
    source = source_here(name)
    if source.kind == "hub":
        reading, commit = hub_rows(source, columns)
    else:
        reading, commit = file_rows(Path(source.location), columns), None
    if not reading.rows:
        raise DataError(f"{name}: holds no questions")
    return source, reading, commit


def without_rows(dataset: Dataset, bad: Mapping[int, str], on_bad_row: OnBadRow) -> Dataset:
    """Leave out examples that have turned out bad, or refuse them: `bad` holds their places, one at
    least, and what is wrong with each.

    Raises:
        DataError: naming them; also if none is left.
    """
    told = [(f"question {dataset.examples[place].id}", why) for place, why in bad.items()]
    report = _report(dataset.source, told, len(dataset.examples))
    if on_bad_row != "drop":
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


def _unmarked(rows: Sequence[Row], marker: str) -> tuple[list[Row], list[str]]:
    """Rows without the text that means that there is no answer, and a sentence on what it did."""
    found = [without_marker(row, marker) for row in rows]
    pairs = list(zip(rows, found, strict=True))
    marked = sum(new.answers != old.answers for old, new in pairs)
    cut = len({old.context for old, new in pairs if new.context != old.context})
    told = [
        f"{marked:,} of {len(rows):,} questions are answered {marker}: taken as without an answer"
    ]
    if cut:
        told.append(f"{cut:,} context(s) end in {marker}, which is cut off")
    return found, told


def _report(name: str, bad: Sequence[tuple[str, str]], total: int, *, mendable: int = 0) -> str:
    classes = Counter(why.split(" (")[0] if " (" in why else why for _, why in bad)
    common = "; ".join(f"{count} x {why}" for why, count in classes.most_common(5))
    fix = '; set data.on_bad_row = "drop" to leave them out' if len(bad) < total else ""
    if mendable:
        fix = f'; data.on_bad_row = "repair" would mend {mendable} of them, "drop" leaves out all'
    lines = [f"{name}: {len(bad)} of {total} rows refused: {common}{fix}"]
    lines += [f"  {place}: {why}" for place, why in bad[:5]]
    if len(bad) > 5:
        lines.append(f"  and {len(bad) - 5} more")
    return "\n".join(lines)
