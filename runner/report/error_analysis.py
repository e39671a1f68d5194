"""Where a model is wrong: its answers grouped by question word, lengths, windows, and whether there
is an answer; and the worst of them with their context."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from runner.metrics.statistics import bootstrap_interval
from runner.report.page import Cell, Miss, PercentCell, Span, Table

MissRecord = Mapping[str, Any]

QUESTION_WORDS = ("what", "who", "which", "when", "where", "why", "how")
_ALIKE = {"whom": "who", "whose": "who"}
OTHER = "other"
NO_ANSWER = "no answer"
FEWEST = 10  # questions with an interval
# (largest number, label), ascending; the last holds the rest.
ANSWER_WORDS = (
    (1, "1 word"),
    (2, "2 words"),
    (4, "3 to 4 words"),
    (8, "5 to 8 words"),
    (None, "more than 8 words"),
)
CONTEXT_TOKENS = (
    (100, "up to 100 tokens"),
    (150, "101 to 150 tokens"),
    (200, "151 to 200 tokens"),
    (300, "201 to 300 tokens"),
    (None, "more than 300 tokens"),
)
WINDOWS = ((1, "one window"), (None, "several windows"))
ANSWERABLE = ("has an answer", "has none")


def question_word(question: str) -> str:
    """The first question word, "how many, how much" apart from other "how"; "other" without one."""
    words = re.findall(r"\w+", question.lower())
    for word, following in pairwise([*words, ""]):
        word = _ALIKE.get(word, word)
        if word == "how" and following in ("many", "much"):
            return "how many, how much"
        if word in QUESTION_WORDS:
            return word
    return OTHER


def bucket(number: int, buckets: Sequence[tuple[int | None, str]]) -> str:
    """The label of the first bucket that a number fits into."""
    return next(label for top, label in buckets if top is None or number <= top)


def error_tables(records: Sequence[MissRecord], seed: int) -> list[Table]:
    """Exact match and F1 of each group of questions, with intervals; where all questions are of one
    group, no table.

    Args:
        records: lines of predictions.jsonl, at least one.
        seed: of the bootstrap.
    """
    by_word = _grouped(records, lambda record: question_word(record["question"]))
    words = sorted(by_word, key=lambda label: (label == OTHER, -len(by_word[label]), label))
    by_answer = _grouped(
        records,
        lambda record: (
            bucket(len(record["answers"][0].split()), ANSWER_WORDS)
            if record["answers"]
            else NO_ANSWER
        ),
    )
    by_context = _grouped(records, lambda record: bucket(record["context_tokens"], CONTEXT_TOKENS))
    by_windows = _grouped(records, lambda record: bucket(record["windows"], WINDOWS))
    by_answerable = _grouped(records, lambda record: ANSWERABLE[not record["answers"]])
    groupings = [
        ("question word", by_word, words),
        ("right answer's length", by_answer, [*_labels(ANSWER_WORDS), NO_ANSWER]),
        ("context's length", by_context, _labels(CONTEXT_TOKENS)),
        ("windows", by_windows, _labels(WINDOWS)),
    ]
    if ANSWERABLE[1] in by_answerable:
        groupings.insert(0, ("answerable or not", by_answerable, list(ANSWERABLE)))
    return [
        Table(
            f"By {name}",
            [_row(name, label, groups[label], seed) for label in labels if label in groups],
        )
        for name, groups, labels in groupings
        if len(groups) > 1  # else it is the score of all
    ]


def _labels(buckets: Sequence[tuple[int | None, str]]) -> list[str]:
    return [label for _, label in buckets]


def _grouped(
    records: Sequence[MissRecord], group_of: Callable[[MissRecord], str]
) -> dict[str, list[MissRecord]]:
    groups: dict[str, list[MissRecord]] = {}
    for record in records:
        groups.setdefault(group_of(record), []).append(record)
    return groups


def _row(name: str, label: str, records: Sequence[MissRecord], seed: int) -> dict[str, Cell]:
    exact_N = 100.0 * np.array([record["exact_match"] for record in records], dtype=np.float64)
    f1_N = 100.0 * np.array([record["f1"] for record in records], dtype=np.float64)
    return {
        name: label,
        "questions": len(records),
        "missed": int((exact_N < 50).sum()),
        "exact match %": percent(exact_N, seed),
        "F1 %": percent(f1_N, seed),
    }


def percent(values: Sequence[float] | np.ndarray, seed: int) -> PercentCell:
    """The mean of percentages and its interval, where there are enough different ones for it: of
    few questions, or of all right ones, the bootstrap knows too little."""
    value_N = np.asarray(values, dtype=np.float64)
    if len(value_N) < FEWEST or value_N.min() == value_N.max():
        return PercentCell(float(value_N.mean()))
    return PercentCell(float(value_N.mean()), *bootstrap_interval(value_N, seed))


def decision_table(records: Sequence[MissRecord]) -> Table:
    """SQuAD v2: how often the model answered, and whether it should have."""
    rows: list[dict[str, Cell]] = []
    for label, answerable in zip(ANSWERABLE, (True, False), strict=True):
        group = [record for record in records if bool(record["answers"]) == answerable]
        empty = sum(not record["answer"] for record in group)
        right = sum(bool(record["exact_match"]) for record in group if record["answer"])
        rows.append(
            {
                "question": label,
                "questions": len(group),
                "answered rightly": right,
                "answered otherwise": len(group) - empty - right,
                "left unanswered": empty,
            }
        )
    return Table("Answered or not", rows)


def worst(records: Sequence[MissRecord], most: int) -> list[Miss]:
    """The misses with the least overlap with a right answer, of these the ones that the model was
    surest of."""
    missed = [record for record in records if not record["exact_match"]]
    missed.sort(key=lambda record: (record["f1"], -record["score"], record["id"]))
    return [miss(record, {"answered": record["answer"]}) for record in missed[:most]]


def miss(record: MissRecord, answers: Mapping[str, str]) -> Miss:
    """A missed question as a page shows it."""
    windows = record["windows"]
    facts = [f"F1 {100 * record['f1']:.0f} %", f"score {record['score']:.2f}"]
    if windows > 1:
        facts.append(f"{windows} windows")
    return Miss(
        question=record["question"],
        id=record["id"],
        answers=answers,
        right=list(dict.fromkeys(record["answers"])),
        facts=", ".join(facts),
        excerpts=[marked(record, excerpt) for excerpt in record["excerpts"]],
    )


def marked(record: MissRecord, excerpt: Mapping[str, Any]) -> list[Span]:
    """Cut a stretch of context where the model's answer and the first right one begin and end."""
    begin, text = excerpt["start"], excerpt["text"]
    places = {"answer": (record["start"], record["end"]) if record["answer"] else (0, 0)}
    places["right"] = (0, 0)
    if record["answers"]:
        start = record["answer_starts"][0]
        places["right"] = (start, start + len(record["answers"][0]))
    cuts = {0, len(text)}
    for place in places.values():
        cuts |= {min(max(end - begin, 0), len(text)) for end in place}
    spans = []
    ends = sorted(cuts)
    for low, high in pairwise(ends):
        inside = [kind for kind, (a, b) in places.items() if a - begin <= low and high <= b - begin]
        kind = "both" if len(inside) == 2 else inside[0] if inside else ""
        spans.append(Span(text[low:high], kind))
    before = [Span("… ", "")] if begin else []
    after = [Span(" …", "")] if begin + len(text) < record["context_characters"] else []
    return [*before, *spans, *after]
