"""Reads questions from a file or the hub, cuts the declared slice, and checks every row before a
model loads."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runner.errors import AssetError, DataError
from runner.hub import snapshot
from runner.job import Columns
from runner.sources import DataSource, parse_data

_NOTHING = (None, None, None)  # id, question and context of a row that is none


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


@dataclass(frozen=True)
class _Row:
    """A raw row and the place to name when it is wrong; `answers` is a sentence where they cannot
    be read."""

    place: str
    id: Any
    question: Any
    context: Any
    answers: list[tuple[Any, Any]] | str


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
        rows, commit = _hub_rows(source, columns)
    else:
        rows, commit = _file_rows(Path(source.location), columns), None
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


@dataclass(frozen=True)
class Asked:
    """A question without right answers, and where it stands; `problem` says why it cannot be asked,
    and is None where it can."""

    place: str
    id: str
    question: str
    context: str
    problem: str | None


def read_asked(name: str, columns: Columns) -> list[Asked]:
    """Read the questions of a file, or of a slice of it, whatever answers stand beside them.

    Raises:
        DataError, AssetError: if the file cannot be read as a whole; a wrong row has its problem.
    """
    try:
        source = parse_data(name)
    except ValueError as error:
        raise DataError(str(error)) from None
    if source.kind == "hub":
        raise DataError(f"{name}: no file; questions are read from a file or from stdin")
    try:
        rows = _file_rows(Path(source.location), columns, answers=False)
    except DataError as error:
        raise DataError(_for_command(error)) from None
    if source.slice is not None:
        rows = rows[slice(*source.slice.bounds(len(rows)))]
    texts: dict[str, str | None] = {}
    return [_asked(row, str(number), texts) for number, row in enumerate(rows, 1)]


def parse_asked(line: bytes, file: str, number: int, columns: Columns) -> Asked:
    """Read a question from a line of JSON; what is wrong with it is its problem."""
    place = f"{file}:{number}"
    try:
        table = [_parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"), place)]
        row, *_ = _flat_rows(file, table, None, columns, answers=False, first=number)
    except UnicodeDecodeError as error:
        return Asked(place, "", "", "", f"byte 0x{line[error.start]:02x} is not UTF-8")
    except DataError as error:
        why = _for_command(error).removeprefix(f"{place}: ").removeprefix(f"{file}: ")
        return Asked(place, "", "", "", why)
    return _asked(row, str(number), {})


def _for_command(error: DataError) -> str:
    # Who has no job file names columns on the command line.
    return str(error).replace("in [data.columns]", "with --column KEY=NAME")


def _asked(row: _Row, number: str, texts: dict[str, str | None]) -> Asked:
    row = row if row.id is not None else dataclasses.replace(row, id=number)
    bad = isinstance(row.answers, str) and row.question is None and row.context is None
    why = str(row.answers) if bad else _problem(row, texts)
    if why is not None:
        return Asked(row.place, number, "", "", why)
    return Asked(row.place, str(row.id), str(row.question), str(row.context), None)


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


# --- reading -----------------------------------------------------------------------------------


def _file_rows(path: Path, columns: Columns, *, answers: bool = True) -> list[_Row]:
    raw = _read(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, raw, columns, answers=answers)
    text = _decode(path, raw)
    if suffix == ".csv":
        csv.field_size_limit(2**31 - 1)
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            names = list(reader.fieldnames or ())
            return _flat_rows(path.name, list(reader), names, columns, answers=answers)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.reader.line_num}: not valid CSV: {error}") from None
    if suffix == ".jsonl":
        table = [
            _parse_json(line, f"{path}:{n}")
            for n, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
        return _flat_rows(path.name, table, None, columns, answers=answers)
    parsed = _parse_json(text, str(path))
    if isinstance(parsed, dict) and isinstance(parsed.get("data"), list):
        parsed = parsed["data"]
    if not isinstance(parsed, list):
        raise DataError(
            f"{path}: expected SQuAD's {{'data': [...]}} or a list of rows, found {_kind(parsed)}"
        )
    if any(isinstance(article, dict) and "paragraphs" in article for article in parsed):
        return list(_squad_rows(path.name, parsed))
    return _flat_rows(path.name, parsed, None, columns, answers=answers)


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is not a file")
        return path.read_bytes()
    except FileNotFoundError:
        raise AssetError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from None


def _parquet_rows(path: Path, raw: bytes, columns: Columns, *, answers: bool) -> list[_Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not valid Parquet: {_first_line(error)}") from None
    return _flat_rows(path.name, rows, table.column_names, columns, answers=answers)


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; convert the file to UTF-8"
        ) from None


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = place if error.lineno == 1 and ":" in place else f"{place}:{error.lineno}"
        raise DataError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise DataError(f"{place}: JSON is nested too deeply to be a data set") from None
    except ValueError:
        raise DataError(f"{place}: holds a number of thousands of digits") from None


def _squad_rows(file: str, articles: Sequence[Any]) -> Iterator[_Row]:
    for a, article in enumerate(articles, 1):
        for p, paragraph in enumerate(
            _member(article, "paragraphs", list, f"{file}: article {a}"), 1
        ):
            place = f"{file}: article {a} paragraph {p}"
            context = paragraph.get("context") if isinstance(paragraph, dict) else None
            for q, qa in enumerate(_member(paragraph, "qas", list, place), 1):
                if not isinstance(qa, dict):
                    yield _Row(f"{place} question {q}", *_NOTHING, f"a question is {_kind(qa)}")
                    continue
                identity = _identity(qa.get("id"))
                yield _Row(
                    place=f"{file}: {_plain(identity)} (article {a}, paragraph {p}, question {q})",
                    id=identity,
                    question=qa.get("question"),
                    context=context,
                    answers=_answers(qa["answers"]) if "answers" in qa else "no answers",
                )


def _flat_rows(
    file: str,
    table: Sequence[Any],
    names: Sequence[str] | None,
    columns: Columns,
    *,
    answers: bool = True,
    first: int = 1,
) -> list[_Row]:
    if not table:
        return []
    if names is None:
        names = list(dict.fromkeys(key for row in table if isinstance(row, dict) for key in row))
    if not names:
        raise DataError(f"{file}: expected rows with named columns, found {_kind(table[0])}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{file}: {len(twice)} column names appear twice, {twice[0]!r} first")
    answer = columns.answer or ("answer" if "answers" not in names and "answer" in names else None)
    start = columns.answer_start or ("answer_start" if "answer_start" in names else None)
    wanted = [columns.question, columns.context, columns.id]
    if answers:
        wanted += [answer or "answers", columns.answer_start]
    missing = [name for name in wanted if name is not None and name not in names]
    if missing:
        raise DataError(
            f"{file}: no column {missing[0]!r}; the columns are {', '.join(map(repr, names))}; "
            "name them in [data.columns]"
        )
    identity = columns.id or ("id" if "id" in names else None)
    rows = []
    for number, row in enumerate(table, first):
        place = f"{file}:{number}"
        if not isinstance(row, dict) or None in row:
            what = "more fields than columns" if isinstance(row, dict) else f"a row is {_kind(row)}"
            rows.append(_Row(place, *_NOTHING, what))
            continue
        if not answers:
            right = []
        elif (answer or "answers") not in row:
            right = f"no {answer or 'answers'}"
        elif answer is None:
            right = _answers(row["answers"])
        elif row[answer] in (None, ""):
            right = []
        else:
            right = [(row[answer], _number(row.get(start)) if start else None)]
        key = _identity(row.get(identity)) if identity else str(number)
        rows.append(_Row(place, key, row.get(columns.question), row.get(columns.context), right))
    return rows


def _hub_rows(source: DataSource, columns: Columns) -> tuple[list[_Row], str]:
    """Rows of a hub data set's split, and the commit that they are from.

    The repository is fetched first and read as a folder: `datasets` by itself, when it cannot reach
    the hub, takes whatever revision its cache holds and says so in a log line only.
    """
    import datasets

    found = snapshot("dataset", source.location, source.revision)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(str(found.folder), source.config, split=source.split)
    except Exception as error:
        # Whatever it is, datasets could not make rows of the repository.
        why = _first_line(error.__cause__ or error).replace(f"{found.folder}", source.location)
        raise DataError(f"{source.text}: datasets cannot read it: {why}") from None
    if not isinstance(table, datasets.Dataset):
        raise DataError(f"{source.text}: names no single split")
    return _flat_rows(source.text, table.to_list(), table.column_names, columns), found.commit


def _answers(value: Any) -> list[tuple[Any, Any]] | str:
    """Accept SQuAD's two spellings: a list of {text, answer_start}, or {text: [...], answer_start:
    [...]}. A sentence says why it is neither."""
    if value is None:
        return []
    if isinstance(value, dict) and "text" in value:
        texts, starts = value["text"], value.get("answer_start")
        texts, starts = (v if isinstance(v, list) else [v] for v in (texts, starts))
        if starts == [None]:
            starts = [None] * len(texts)
        if len(texts) != len(starts):
            return f"answers pair no texts with answer_start ({len(texts)} and {len(starts)})"
        return list(zip(texts, starts, strict=True))
    if isinstance(value, list) and all(isinstance(i, dict) and "text" in i for i in value):
        return [(item["text"], item.get("answer_start")) for item in value]
    return f"answers are {_kind(value)}, not tables with text and answer_start"


def _member(value: Any, key: str, kind: type, place: str) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get(key), kind):
        raise DataError(f"{place}: expected a table with a list called {key!r}")
    return value[key]


def _identity(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _number(value: Any) -> Any:
    """CSV has no numbers: read what looks like one."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    return int(float(value)) if re.fullmatch(r"\s*-?[0-9]{1,15}(\.0*)?\s*", value) else value


# --- checking ----------------------------------------------------------------------------------


def _check(rows: Sequence[_Row], unanswerable: bool) -> tuple[list[Example], list[tuple[str, str]]]:
    examples: list[Example] = []
    bad: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    # A context is shared by several questions: check its encoding once.
    texts: dict[str, str | None] = {}
    for row in rows:
        why = row.answers if isinstance(row.answers, str) else _problem(row, texts)
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


def _problem(row: _Row, texts: dict[str, str | None]) -> str | None:
    for name, value in (("id", row.id), ("question", row.question), ("context", row.context)):
        if value is None:
            return f"no {name}"
        if not isinstance(value, str):
            return f"{name} is {_kind(value)}, not text"
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


def _spans(row: _Row) -> tuple[list[tuple[str, int]], str | None]:
    spans = []
    for text, start in row.answers:
        if not isinstance(text, str):
            return [], f"answer is {_kind(text)}, not text"
        if not text.strip():
            return [], "answer is empty"
        if start is None:
            start = row.context.find(text)
            if start < 0:
                why = f"{_other_form(text, row.context)}answer is not in the context"
                return [], f"{why} ({_short(text)})"
            if row.context.find(text, start + 1) >= 0:
                why = "answer occurs more than once and has no answer_start"
                return [], f"{why} ({_short(text)})"
        if isinstance(start, float) and start.is_integer():
            start = int(start)
        if not isinstance(start, int) or isinstance(start, bool):
            return [], f"answer_start is {_kind(start)}, not a whole number"
        if not 0 <= start < len(row.context):
            size = len(row.context)
            return [], f"answer_start is outside the context ({start}, of {size} characters)"
        found = row.context[start : start + len(text)]
        if found != text:
            form = _other_form(text, row.context[start : start + 4 * len(text)])
            why = f"{form}answer text not at answer_start"
            return [], f"{why} ({_short(text)} declared at {start}, {_short(found)} found)"
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


def _kind(value: Any) -> str:
    names: dict[type, str] = {
        dict: "a table",
        list: "a list",
        str: "text",
        int: "a number",
        float: "a number",
        bool: "true or false",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _short(text: str) -> str:
    shown = text if len(text) <= 40 else text[:37] + "..."
    return json.dumps(shown, ensure_ascii=not shown.isprintable())


def _plain(identity: Any) -> str:
    """An id as it may be printed: hostile ones escaped."""
    simple = isinstance(identity, str) and identity.isprintable() and 0 < len(identity) <= 80
    return identity if simple else _short(str(identity))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
