"""SQuAD's layout: articles with paragraphs, paragraphs with questions; or paragraphs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from runner.data.formats.rows import (
    NO_ROW,
    RawTable,
    Reading,
    Row,
    given,
    is_blank,
    kind,
    paired_answers,
    printable_id,
    row_id,
)
from runner.errors import DataError
from runner.job.schema import Columns

Answers = list[tuple[Any, Any]] | str


def squad_rows(file: str, table: RawTable, columns: Columns, *, answers: bool) -> Reading | None:
    """Rows of a table of articles; None for any other. It has no columns to be named, and right
    answers beside a question do no harm. A question without an id has its number in the file.

    Raises:
        DataError: if an article or a paragraph is not what SQuAD's are.
    """
    articles = [article for row in table.rows for article in _articles(row)]
    if any(isinstance(article, dict) and "paragraphs" in article for article in articles):
        return Reading("SQuAD's articles", list(_rows(file, articles)))
    return None


def paragraph_rows(
    file: str, table: RawTable, columns: Columns, *, answers: bool
) -> Reading | None:
    """Rows of a table of paragraphs, as simpletransformers has it; None for any other.

    Raises:
        DataError: if one is not what SQuAD's are.
    """
    if not any(isinstance(row, dict) and row.keys() >= {"context", "qas"} for row in table.rows):
        return None
    rows: list[Row] = []
    for place, paragraph in zip(table.places(file), table.rows, strict=True):
        rows += questions(paragraph, place, len(rows), squad_answers)
    return Reading("SQuAD's paragraphs without articles (simpletransformers)", rows)


def questions(
    paragraph: Any, place: str, before: int, read_answers: Callable[[dict[str, Any], Any], Answers]
) -> Iterator[Row]:
    """Rows of a paragraph that stands at `place`, after so many others of the file.

    Raises:
        DataError: if it is none.
    """
    yield from _questions(paragraph, f"{place}: ", place, before, read_answers, "question")


def squad_answers(qa: dict[str, Any], context: Any) -> Answers:
    return paired_answers(qa["answers"]) if "answers" in qa else "no answers"


def _articles(row: Any) -> list[Any]:
    """An article, or all of a whole file, which is one row where datasets has read it."""
    whole = row.get("data") if isinstance(row, dict) else None
    return whole if isinstance(whole, list) else [row]


def _rows(file: str, articles: Sequence[Any]) -> Iterator[Row]:
    count = 0
    for a, article in enumerate(articles, 1):
        paragraphs = _member(article, "paragraphs", f"{file}: article {a}")
        for p, paragraph in enumerate(paragraphs, 1):
            place = f"{file}: article {a} paragraph {p}"
            where = f"article {a}, paragraph {p}, question"
            for row in _questions(paragraph, f"{file}: ", place, count, squad_answers, where):
                count += 1
                yield row


def _questions(
    paragraph: Any,
    file: str,
    place: str,
    count: int,
    read_answers: Callable[[dict[str, Any], Any], Answers],
    where: str,
) -> Iterator[Row]:
    context = given(paragraph.get("context")) if isinstance(paragraph, dict) else None
    for q, qa in enumerate(_member(paragraph, "qas", place), 1):
        if not isinstance(qa, dict):
            yield Row(f"{place} question {q}", *NO_ROW, f"a question is {kind(qa)}")
            continue
        own = qa.get("id")
        identity = row_id(qa.get("qid") if is_blank(own) else own, count + q)
        yield Row(
            place=f"{file}{printable_id(identity)} ({where} {q})",
            id=identity,
            question=given(qa.get("question")),
            context=context,
            answers=read_answers(qa, context),
            impossible=given(qa.get("is_impossible")),
        )


def _member(value: Any, key: str, place: str) -> list[Any]:
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        raise DataError(f"{place}: expected a table with a list called {key!r}")
    return value[key]
