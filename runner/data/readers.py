"""Reads the rows of a file or of a hub data set, whatever its format, without judging them: what
cannot be read of a row is said in it."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.data.hub import snapshot
from runner.errors import AssetError, DataError
from runner.job.schema import Columns
from runner.job.sources import DataSource

_EXPANSION = 100  # times that a Parquet file may grow when it is read, beyond 256 MiB
_BATCH = 64  # rows of a Parquet file that are looked at before more are read
_NOTHING = (None, None, None)  # id, question and context of a row that is none


@dataclass(frozen=True)
class Row:
    """A raw row and the place to name when it is wrong; `answers` is a sentence where they cannot
    be read."""

    place: str
    id: Any
    question: Any
    context: Any
    answers: list[tuple[Any, Any]] | str


def file_rows(path: Path, columns: Columns, *, answers: bool = True) -> list[Row]:
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
            return flat_rows(path.name, list(reader), names, columns, answers=answers)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.reader.line_num}: not valid CSV: {error}") from None
    if suffix == ".jsonl":
        table = [
            parse_json(line, f"{path}:{n}")
            for n, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
        return flat_rows(path.name, table, None, columns, answers=answers)
    parsed = parse_json(text, str(path))
    if isinstance(parsed, dict) and isinstance(parsed.get("data"), list):
        parsed = parsed["data"]
    if not isinstance(parsed, list):
        raise DataError(
            f"{path}: expected SQuAD's {{'data': [...]}} or a list of rows, found {kind(parsed)}"
        )
    if any(isinstance(article, dict) and "paragraphs" in article for article in parsed):
        return list(_squad_rows(path.name, parsed))
    return flat_rows(path.name, parsed, None, columns, answers=answers)


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


def _parquet_rows(path: Path, raw: bytes, columns: Columns, *, answers: bool) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    # A few megabytes can stand for any number of equal texts.
    limit = _EXPANSION * len(raw) + 2**28
    rows: list[Any] = []
    size = 0
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw))
        names = file.schema_arrow.names
        for batch in file.iter_batches(batch_size=_BATCH):
            part = batch.to_pylist()
            size += sum(len(text) for row in part for text in row.values() if type(text) is str)
            if size > limit:
                raise DataError(f"{path}: its {len(raw):,} bytes hold more than {limit:,} of text")
            rows += part
    except (pyarrow.ArrowException, MemoryError, OSError, ValueError) as error:
        raise DataError(f"{path}: not valid Parquet: {_first_line(error)}") from None
    return flat_rows(path.name, rows, names, columns, answers=answers)


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; convert the file to UTF-8"
        ) from None


def parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = place if error.lineno == 1 and ":" in place else f"{place}:{error.lineno}"
        raise DataError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise DataError(f"{place}: JSON is nested too deeply to be a data set") from None
    except ValueError:
        raise DataError(f"{place}: holds a number of thousands of digits") from None


def _squad_rows(file: str, articles: Sequence[Any]) -> Iterator[Row]:
    for a, article in enumerate(articles, 1):
        for p, paragraph in enumerate(
            _member(article, "paragraphs", list, f"{file}: article {a}"), 1
        ):
            place = f"{file}: article {a} paragraph {p}"
            context = paragraph.get("context") if isinstance(paragraph, dict) else None
            for q, qa in enumerate(_member(paragraph, "qas", list, place), 1):
                if not isinstance(qa, dict):
                    yield Row(f"{place} question {q}", *_NOTHING, f"a question is {kind(qa)}")
                    continue
                identity = _identity(qa.get("id"))
                yield Row(
                    place=f"{file}: {printable_id(identity)} (article {a}, paragraph {p}, question {q})",
                    id=identity,
                    question=qa.get("question"),
                    context=context,
                    answers=_answers(qa["answers"]) if "answers" in qa else "no answers",
                )


def flat_rows(
    file: str,
    table: Sequence[Any],
    names: Sequence[str] | None,
    columns: Columns,
    *,
    answers: bool = True,
    first: int = 1,
) -> list[Row]:
    if not table:
        return []
    if names is None:
        names = list(dict.fromkeys(key for row in table if isinstance(row, dict) for key in row))
    if not names:
        raise DataError(f"{file}: expected rows with named columns, found {kind(table[0])}")
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
            what = "more fields than columns" if isinstance(row, dict) else f"a row is {kind(row)}"
            rows.append(Row(place, *_NOTHING, what))
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
        rows.append(Row(place, key, row.get(columns.question), row.get(columns.context), right))
    return rows


def hub_rows(source: DataSource, columns: Columns) -> tuple[list[Row], str]:
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
    return flat_rows(source.text, table.to_list(), table.column_names, columns), found.commit


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
    return f"answers are {kind(value)}, not tables with text and answer_start"


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


def kind(value: Any) -> str:
    names: dict[type, str] = {
        dict: "a table",
        list: "a list",
        str: "text",
        int: "a number",
        float: "a number",
        bool: "true or false",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def short_value(text: str) -> str:
    shown = text if len(text) <= 40 else text[:37] + "..."
    return json.dumps(shown, ensure_ascii=not shown.isprintable())


def printable_id(identity: Any) -> str:
    """An id as it may be printed: hostile ones escaped."""
    simple = isinstance(identity, str) and identity.isprintable() and 0 < len(identity) <= 80
    return identity if simple else short_value(str(identity))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
