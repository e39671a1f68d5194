"""Answers grouped by what makes them hard, and the worst of them with their context."""

from __future__ import annotations

import pytest

from runner.metrics.statistics import bootstrap_interval
from runner.report.error_analysis import (
    ANSWER_WORDS,
    CONTEXT_TOKENS,
    bucket,
    decision_table,
    error_tables,
    marked,
    percent,
    question_word,
    worst,
)
from runner.report.page import PercentCell, Span
from tests.sample_runs import CONTEXT, predictions, record


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Who wrote it?", "who"),
        ("Whose book is it, and what is in it?", "who"),
        ("In which year?", "which"),
        ("WHAT'S that?", "what"),
        ("How many hours?", "how many, how much"),
        ("Of water, how much?", "how many, how much"),
        ("How long does it last?", "how"),
        ("How?", "how"),
        ("Is somewhat flat?", "other"),
        ("Wann war das?", "other"),
        ("", "other"),
    ],
)
def test_question_words(question, word):
    assert question_word(question) == word


@pytest.mark.parametrize(
    ("buckets", "number", "label"),
    [
        (ANSWER_WORDS, 1, "1 word"),
        (ANSWER_WORDS, 4, "3 to 4 words"),
        (ANSWER_WORDS, 5, "5 to 8 words"),
        (ANSWER_WORDS, 9, "more than 8 words"),
        (CONTEXT_TOKENS, 0, "up to 100 tokens"),
        (CONTEXT_TOKENS, 300, "201 to 300 tokens"),
        (CONTEXT_TOKENS, 301, "more than 300 tokens"),
    ],
)
def test_buckets(buckets, number, label):
    assert bucket(number, buckets) == label


def test_every_question_is_in_one_group_of_each_table():
    records = predictions(60, unanswerable=True)
    tables = {table.caption: table.rows for table in error_tables(records, seed=1)}
    assert list(tables) == [
        *("By answerable or not", "By question word", "By right answer's length"),
        *("By context's length", "By windows"),
    ]
    missed = sum(not r["exact_match"] for r in records)
    for rows in tables.values():
        assert sum(row["questions"] for row in rows) == 60
        assert sum(row["missed"] for row in rows) == missed
        whole = sum(row["questions"] * row["F1 %"].value for row in rows) / 60
        assert whole == pytest.approx(100 * sum(r["f1"] for r in records) / 60)
    words = [row["question word"] for row in tables["By question word"]]
    assert words == ["how", "how many, how much", "what", "who", "other"]
    assert [row["windows"] for row in tables["By windows"]] == ["one window", "several windows"]
    lengths = [row["right answer's length"] for row in tables["By right answer's length"]]
    assert lengths == ["2 words", "no answer"]
    contexts = [row["context's length"] for row in tables["By context's length"]]
    assert contexts[0] == "up to 100 tokens"
    assert contexts[-1] == "201 to 300 tokens"


def test_without_unanswerable_questions_there_is_no_table_of_them():
    assert error_tables(predictions(30), 1)[0].caption == "By question word"


def test_intervals_only_where_they_mean_something():
    mixed = [0.0, 100.0] * 6
    assert percent(mixed, 3) == PercentCell(50.0, *bootstrap_interval(mixed, 3))
    assert percent(mixed[:9], 3).low is None  # too few
    assert percent([100.0] * 50, 3) == PercentCell(100.0)  # a bootstrap would call this certain


def test_decisions_of_a_model_that_may_answer_nothing():
    records = [
        record(1, "nine hours", ["nine hours"]),
        record(2, "The lantern", ["nine hours"]),
        record(3, "", ["nine hours"]),
        record(4, "", []),
        record(5, "The lantern", []),
    ]
    rows = decision_table(records).rows
    assert [list(row.values()) for row in rows] == [
        ["has an answer", 3, 1, 1, 1],
        ["has none", 2, 0, 1, 1],
    ]


def test_the_worst_misses_are_the_surest_wrong_ones():
    records = [
        record(1, "nine hours", ["nine hours"]),
        record(2, "hours on", ["nine hours"], score=0.99),
        record(3, "The lantern", ["nine hours"], score=0.2),
        record(4, "The lantern", ["nine hours"], score=0.8, windows=3),
    ]
    found = worst(records, 2)
    assert [miss.id for miss in found] == ["q004", "q003"]
    assert found[0].facts == "F1 0 %, score 0.80, 3 windows"
    assert found[0].answers == {"answered": "The lantern"}
    assert found[0].right == ["nine hours"]
    assert [miss.id for miss in worst(records, 9)] == ["q004", "q003", "q002"]


def spans(answer, right, begin=0, end=None):
    row = record(1, answer, right)
    return marked(row, {"start": begin, "text": CONTEXT[begin:end]})


def test_answers_are_marked_in_their_context():
    assert spans("lasts nine", ["nine hours"]) == [
        Span("The lantern folds flat. Its battery ", ""),
        Span("lasts ", "answer"),
        Span("nine", "both"),
        Span(" hours", "right"),
        Span(" on the bright setting.", ""),
    ]
    assert spans("", ["The lantern"])[0] == Span("The lantern", "right")
    assert spans("The lantern", [])[0] == Span("The lantern", "answer")
    assert spans("", []) == [Span(CONTEXT, "")]


def test_what_is_cut_off_is_shown_as_cut_off():
    place = CONTEXT.find("nine")
    assert spans("nine hours", ["nine hours"], place, place + 10) == [
        Span("… ", ""),
        Span("nine hours", "both"),
        Span(" …", ""),
    ]
    # Marks of answers that lie outside of the stretch do not reach into it.
    assert spans("The lantern", ["nine hours"], place + 4, len(CONTEXT))[1] == Span(
        " hours", "right"
    )


def test_a_grouping_with_one_group_is_no_table():
    record = {
        "question": "What is it?", "answers": ["it"], "context_tokens": 10, "windows": 1,
        "exact_match": 1.0, "f1": 1.0,
    }  # fmt: skip
    other = record | {"question": "Who is it?"}
    assert [table.caption for table in error_tables([record, other], 0)] == ["By question word"]
    assert error_tables([record], 0) == []
