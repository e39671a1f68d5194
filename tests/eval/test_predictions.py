"""Lines of predictions.jsonl: what a report needs, in bounds, whatever the texts are."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.dataset import Example
from runner.data.windows import build_windows
from runner.eval.answers import Answer, Candidate
from runner.eval.predictions import (
    AROUND,
    LISTED,
    LONGEST,
    as_lines,
    excerpts,
    prediction_records,
    window_counts,
)
from runner.job.schema import Model
from runner.model.load import ModelFiles, load_tokenizer

CONTEXT = "The lantern folds flat; its battery lasts nine hours on the bright setting. "


def answer(text: str, start: int, identity: str = "a") -> Answer:
    end = start + len(text)
    found = Candidate(text, 0.5, 1.0, start, end, 0)
    return Answer(identity, text, 0.5, start, end, 0, 0.0, 0.25, -1.0, 0, (found,) * 5)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(ModelFiles.locate(Model(name=str(tiny("bert")))))


def test_windows_and_context_tokens_are_counted_by_question(tokenizer):
    examples = [
        Example(str(n), "How long?" * (1 + n % 2), CONTEXT * length, (), ())
        for n, length in enumerate((1, 4, 1, 2))
    ]
    examples.append(Example("shared", "Who?", CONTEXT * 4, (), ()))
    windows = build_windows(examples, tokenizer, 100, 16)
    count_N, token_N = window_counts(windows, len(examples))
    alone = [
        len(tokenizer(example.context, add_special_tokens=False)["input_ids"])
        for example in examples
    ]
    assert token_N.tolist() == alone
    assert count_N.tolist() == np.bincount(windows.questions_N).tolist()
    assert count_N[1] > count_N[0]


def test_a_line_holds_what_a_report_needs(tokenizer):
    start = CONTEXT.find("nine hours")
    examples = [
        Example("right", "How long?", CONTEXT, ("nine hours", "nine"), (start, start)),
        Example("wrong", "How long?", CONTEXT, ("nine hours",), (start,)),
    ]
    windows = build_windows(examples, tokenizer, 130, 16)
    answers = [answer("nine hours", start, "right"), answer("lantern", 4, "wrong")]
    lines = as_lines(
        prediction_records(
            answers, examples, windows, np.array([100.0, 0.0]), np.array([100.0, 0.0]),
            unanswerable=False,
        )
    )  # fmt: skip
    right, wrong = map(json.loads, lines.splitlines())
    assert (right["exact_match"], right["f1"], right["answers"]) == (
        True,
        1.0,
        ["nine hours", "nine"],
    )
    assert len(right["n_best"]) == LISTED
    assert "excerpts" not in right
    assert "null_difference" not in right
    assert (wrong["exact_match"], wrong["f1"]) == (False, 0.0)
    assert wrong["excerpts"] == [{"start": 0, "text": CONTEXT}]
    assert wrong["context_characters"] == len(CONTEXT)
    with_null = prediction_records(
        answers, examples, windows, np.zeros(2), np.zeros(2), unanswerable=True
    )
    assert [record["null_difference"] for record in with_null] == [-1.0, -1.0]


@given(
    words=st.lists(
        st.sampled_from(["a", "river", "x" * 30, "café", "\n"]), min_size=1, max_size=300
    ),
    places=st.tuples(*[st.floats(0, 1)] * 4),
    answered=st.booleans(),
    has_answer=st.booleans(),
)
def test_excerpts_show_both_answers_and_stay_short(words, places, answered, has_answer):
    context = " ".join(words)
    first, second, third, fourth = (round(share * len(context)) for share in places)
    start, end = sorted((first, second))
    gold = context[min(third, len(context) - 1) :][: max(1, fourth)]
    golds = ((gold,), (min(third, len(context) - 1),)) if has_answer else ((), ())
    example = Example("a", "q", context, *golds)
    found = excerpts(example, answer(context[start:end] if answered else "", start))
    assert 1 <= len(found) <= 2
    shown = set()
    for stretch in found:
        low, text = stretch["start"], stretch["text"]
        assert context[low : low + len(text)] == text
        shown |= set(range(low, low + len(text)))
    assert sum(len(stretch["text"]) for stretch in found) <= 2 * (LONGEST + 2 * AROUND)
    for wanted, begin in ((context[start:end] if answered else "", start), (
        gold if has_answer else "", golds[1][0] if has_answer else 0,
    )):  # fmt: skip
        assert set(range(begin, begin + min(len(wanted), LONGEST))) <= shown


def test_where_nothing_was_answered_the_context_begins():
    example = Example("a", "q", CONTEXT * 5, (), ())
    (only,) = excerpts(example, answer("", 0))
    assert only["start"] == 0
    assert CONTEXT.startswith(only["text"][:60])
