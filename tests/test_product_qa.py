"""Every row of the shipped questions: answers stand where they say, nothing is there twice, nothing
is in both files, and the counts are those that the README and the changelog tell."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
COUNTS = {"train": (128, 890), "validation": (40, 279)}  # products, questions


class Row(NamedTuple):
    split: str
    title: str
    context: str
    qa: dict[str, Any]


def rows_of(split: str) -> list[Row]:
    text = (ROOT / "jobs" / "data" / f"product_qa_{split}.json").read_text(encoding="utf-8")
    return [
        Row(split, article["title"], paragraph["context"], qa)
        for article in json.loads(text)["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]


ROWS = [row for split in COUNTS for row in rows_of(split)]
CONTEXTS = {row.title: row.context for row in ROWS}


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def triples(text: str) -> set[tuple[str, ...]]:
    words = plain(text).split()
    return set(zip(words, words[1:], words[2:], strict=False))


@pytest.mark.parametrize("split", COUNTS)
def test_there_are_as_many_as_is_told(split):
    mine = [row for row in ROWS if row.split == split]
    assert (len({row.title for row in mine}), len(mine)) == COUNTS[split]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{COUNTS[split][1]} questions" in readme
    changelog = (ROOT / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "1,169 questions about 168 products" in changelog


def test_every_answer_is_the_text_at_its_place():
    for row in ROWS:
        assert row.qa["answers"], row.qa["id"]
        for answer in row.qa["answers"]:
            start, text = answer["answer_start"], answer["text"]
            assert text == text.strip() != "", row.qa["id"]
            assert row.context[start : start + len(text)] == text, row.qa["id"]
            # Whole words: an answer that cuts one could never be found by tokens.
            around = row.context[:start][-1:] + "|" + row.context[start + len(text) :][:1]
            first, last = text[0].isalnum(), text[-1].isalnum()
            assert not (first and around[0].isalnum()), row.qa["id"]
            assert not (last and around[-1].isalnum()), row.qa["id"]


def test_every_id_and_title_is_there_once():
    ids = Counter(row.qa["id"] for row in ROWS)
    assert [name for name, count in ids.items() if count > 1] == []
    assert len({(row.title, row.context) for row in ROWS}) == len(CONTEXTS) == 168
    assert len({plain(title) for title in CONTEXTS}) == 168


def test_no_product_is_in_both_files():
    train, validation = (
        {plain(text) for row in ROWS if row.split == split for text in (row.title, row.context)}
        for split in COUNTS
    )
    assert not train & validation


def test_contexts_have_45_to_150_words_and_no_blanks_too_many():
    for title, context in CONTEXTS.items():
        assert 45 <= len(context.split()) <= 150, title
        assert context == " ".join(context.split()), title


def test_every_question_is_a_sentence_of_its_own():
    for row in ROWS:
        question = row.qa["question"]
        assert question == " ".join(question.split()), row.qa["id"]
        assert question.endswith("?"), row.qa["id"]
    asked = Counter((row.title, plain(row.qa["question"])) for row in ROWS)
    assert [key for key, count in asked.items() if count > 1] == []


def test_no_two_contexts_are_nearly_the_same():
    """By the share of three words in a row that both have."""
    found = {title: triples(context) for title, context in CONTEXTS.items()}
    for (one, mine), (other, theirs) in combinations(found.items(), 2):
        shared = len(mine & theirs) / min(len(mine), len(theirs))
        assert shared < 0.2, f"{one} and {other} share {shared:.0%}"
