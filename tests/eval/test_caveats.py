"""Ceilings and leaks are told with how many questions they concern, and only where they are."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from runner.data.dataset import Dataset, Example
from runner.data.splits import Split
from runner.data.windows import build_windows
from runner.eval.caveats import answer_lengths, caveats
from runner.job.schema import Score

WORDS = ["river", "folds", "battery", "before", "beech"]  # each one token of the tiny vocabulary


def context(words: int, name: str = "") -> str:
    return " ".join([*(WORDS[n % 5] for n in range(words)), name]).strip()


def ask(name: str, answers: list[tuple[int, int]], words: int = 40, question: str = "how long?"):
    """A question about its own context, whose answers are words [from, to) of it."""
    text = f"{name} {context(words)}"
    found = [" ".join(text.split()[low:high]) for low, high in answers]
    starts = [len(" ".join(text.split()[:low])) + bool(low) for low, _ in answers]
    return Example(name, question, text, tuple(found), tuple(starts))


@pytest.fixture
def split(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny("bert"))

    def make(*examples: Example, max_length: int = 64, stride: int = 16) -> Split:
        windows = build_windows(examples, tokenizer, max_length, stride)
        return Split(Dataset("d.json", examples, "0", ()), windows, cached=False)

    return make


def clean(*names: str) -> list[Example]:
    return [ask(name, [(n + 1, n + 3)]) for n, name in enumerate(names)]


def test_clean_data_has_no_line(split):
    assert (
        caveats(
            {"train": split(*clean(*"abc")), "validation": split(*clean(*"def"))},
            Score(),
        )
        == []
    )
    assert caveats({"data": split(Example("a", "who?", "nobody", (), ()))}, Score()) == []


@pytest.mark.parametrize("max_length", [64, 24])  # in one window, in several
def test_an_answers_tokens_are_counted_in_its_context_without_blanks(split, max_length):
    examples = [ask("a", [(1, 8), (2, 3)]), ask("b", []), ask("c", [(30, 41)])]
    text = examples[0].context
    padded = Example("d", "how?", text, (f"{text[len('a') : 9]}",), (1,))
    assert padded.answers[0].startswith(" ")
    part = split(*examples, padded, max_length=max_length, stride=4)
    question_A, length_A = answer_lengths(part.dataset.examples, part.windows)
    assert (question_A.tolist(), length_A.tolist()) == ([0, 0, 2, 3], [7, 1, 11, 2])


def test_answers_that_are_too_long_to_be_given(split):
    labels = [ask("a", [(1, 12)]), ask("b", [(4, 6), (1, 13)]), *clean(*"cd")]
    scored = [ask("e", [(1, 12), (4, 6)]), ask("f", [(2, 15), (2, 13)]), *clean(*"gh")]
    parts = {"train": split(*labels), "validation": split(*scored)}
    assert caveats(parts, Score(max_answer_length=11)) == []
    assert caveats(parts, Score(max_answer_length=10)) == [
        "train: 1 of 4 questions (25.0 %) are trained on an answer longer than"
        " score.max_answer_length, 10 tokens (up to 11), which is never given; raise it",
        "validation: 1 of 4 questions (25.0 %) have only right answers longer than"
        " score.max_answer_length, 10 tokens (up to 11): exact match can hardly pass 75.0 %;"
        " raise it",
    ]


def test_one_text_that_is_often_the_answer(split):
    many = [ask(str(n), [(1 + n % 30, 2 + n % 30 + n % 7)]) for n in range(60)]
    texts = [ask(f"y{n}", [(1, 3)]) for n in range(4)]
    same = [Example(e.id, e.question, e.context.replace("river folds", "River  FOLDS"),
                    ("River  FOLDS",), e.answer_starts) for e in texts]  # fmt: skip
    alone = [e for e in many if e.answers[0] != "river folds"]
    counts = np.unique([e.answers[0] for e in alone], return_counts=True)[1]
    assert counts.max() <= 3
    (line,) = caveats({"data": split(*alone[:50], *texts[:2], *same[:1])}, Score())
    assert line == (
        'data: "river folds" is a right answer of 3 of 53 questions (5.7 %): always to give it is'
        " right as often"
    )
    assert caveats({"data": split(*alone[:57], *texts[:1], *same[:1])}, Score()) == []


def test_questions_and_contexts_that_are_trained_on_and_scored(split):
    train = clean("A", "b", "c")
    respelt = Example("z", " How  LONG?", train[0].context.lower() + "\n", (), ())
    other = Example("y", "who?", train[1].context, (), ())
    again = Example("x", "when?", train[1].context, (), ())
    parts = {"train": split(*train), "validation": split(*clean("e"), respelt, other, again)}
    assert caveats(parts, Score()) == [
        "validation: 1 of 4 questions are also in train, such as z: their scores tell how well they"
        " were learnt by heart; take others",
        "validation: 2 of 4 questions are about 1 context(s) of which train asks others: scores"
        " on contexts that are new may be lower",
    ]
    parts = {"train": split(*train), "validation": split(*clean("e")), "tuning": split(*train)}
    assert caveats(parts, Score()) == [
        "tuning: its 3 questions are those of train: their scores tell how well they were learnt by"
        " heart; take others"
    ]


def asked_in_chinese(*answers: str) -> list[Example]:
    context = "东京塔在东京。 It is 333 m high, made of steel."
    return [
        Example(str(n), "什么?", f"{n} {context}", (text,), (context.index(text) + len(f"{n} "),))
        for n, text in enumerate(answers)
    ]


def test_answers_that_english_rules_do_not_part_are_told(split):
    mostly, half = ("东京塔", "东京", "333", "东"), ("东京塔", "东京", "steel", "It")
    sentence = (
        "right answers hold no Latin letter, and are scored by the rules for English; set"
        " score.language, perhaps to zh"
    )
    found = caveats({"validation": split(*asked_in_chinese(*mostly))}, Score())
    assert [line for line in found if "Latin" in line] == [f"validation: 3 of 4 {sentence}"]
    for parts, score in (
        ({"validation": split(*asked_in_chinese(*half))}, Score()),
        ({"validation": split(*asked_in_chinese(*mostly))}, Score(language="zh")),
        ({"train": split(*asked_in_chinese(*mostly))}, Score()),
        ({"validation": split(*asked_in_chinese("333", "3", "33", "333 m"))}, Score()),
    ):
        assert not [line for line in caveats(parts, score) if "Latin" in line]
