"""SQuAD's layout: articles with paragraphs, paragraphs with questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from runner.data.formats.rows import (
    NO_ROW,
    RawTable,
    Row,
    given,
    kind,
    paired_answers,
    printable_id,
    row_id,
)
from runner.errors import DataError
from runner.job.schema import Columns


def squad_rows(file: str, table: RawTable, columns: Columns, *, answers: bool) -> list[Row] | None:
    """Rows of a table of articles; None for any other. It has no columns to be named, and right
    answers beside a question do no harm. A question without an id has its number in the file.

    Raises:
        DataError: if an article or a paragraph is not what SQuAD's are.
    """
    if any(isinstance(article, dict) and "paragraphs" in article for article in table.rows):
        return list(_rows(file, table.rows))
    return None


def _rows(file: str, articles: Sequence[Any]) -> Iterator[Row]:
    count = 0
    for a, article in enumerate(articles, 1):
        paragraphs = _member(article, "paragraphs", f"{file}: article {a}")
        for p, paragraph in enumerate(paragraphs, 1):
            place = f"{file}: article {a} paragraph {p}"
            context = paragraph.get("context") if isinstance(paragraph, dict) else None
            for q, qa in enumerate(_member(paragraph, "qas", place), 1):
                count += 1
                if not isinstance(qa, dict):
                    yield Row(f"{place} question {q}", *NO_ROW, f"a question is {kind(qa)}")
                    continue
                identity = row_id(qa.get("id"), count)
                shown = f"{printable_id(identity)} (article {a}, paragraph {p}, question {q})"
                yield Row(
                    place=f"{file}: {shown}",
                    id=identity,
                    question=given(qa.get("question")),
                    context=given(context),
                    answers=paired_answers(qa["answers"]) if "answers" in qa else "no answers",
                    impossible=given(qa.get("is_impossible")),
                )


def _member(value: Any, key: str, place: str) -> list[Any]:
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        raise DataError(f"{place}: expected a table with a list called {key!r}")
    return value[key]
