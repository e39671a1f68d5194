"""One line of predictions.jsonl for each question: the answer beside the right ones, how good it
is, and what a report groups questions by.

The lines hold all that `report` needs, so that it reads neither data nor model; of a missed
question's context they keep the stretches around both answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from runner.data.dataset import Example
from runner.data.windows import Windows
from runner.eval.answers import Answer, Candidate

LISTED = 3  # candidates of a question
AROUND = 90  # characters of context on each side of an answer
LONGEST = 400  # characters of one stretch of context

AnswerRecord = dict[str, Any]


def prediction_records(
    answers: Sequence[Answer],
    examples: Sequence[Example],
    windows: Windows,
    exact_N: np.ndarray,
    f1_N: np.ndarray,
    *,
    unanswerable: bool,
) -> Iterator[AnswerRecord]:
    """Yield one record for each question, in order.

    Args:
        answers, examples: of the same questions.
        windows: theirs.
        exact_N, f1_N: percent of each question.
        unanswerable: SQuAD v2; adds null_difference, in logits.
    """
    count_N, token_N = window_counts(windows, len(examples))
    rows = zip(
        answers, examples, count_N.tolist(), token_N.tolist(),
        exact_N.tolist(), f1_N.tolist(), strict=True,
    )  # fmt: skip
    for answer, example, count, tokens, exact, f1 in rows:
        record: AnswerRecord = {
            "id": answer.id,
            "question": example.question,
            "answer": answer.text,
            "score": round(answer.score, 6),
            "start": answer.start,
            "end": answer.end,
            "answers": list(example.answers),
            "answer_starts": list(example.answer_starts),
            "exact_match": bool(exact),
            "f1": round(f1 / 100, 6),
            "window": answer.window,
            "windows": count,
            "context_tokens": tokens,
            "context_characters": len(example.context),
        }
        if unanswerable:
            record["null_difference"] = round(answer.null_difference, 6)
        record["n_best"] = [listed(candidate) for candidate in answer.n_best[:LISTED]]
        if not exact:
            record["excerpts"] = excerpts(example, answer)
        yield record


def as_lines(records: Iterable[AnswerRecord]) -> str:
    """JSON Lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def listed(candidate: Candidate) -> AnswerRecord:
    """An entry of an n-best list."""
    return {
        "answer": candidate.text,
        "score": round(candidate.score, 6),
        "start": candidate.start,
        "end": candidate.end,
        "window": candidate.window,
    }


def window_counts(windows: Windows, questions: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows and context tokens of each question, int64 both."""
    low_N, high_N = windows.contexts_N2[:, 0], windows.contexts_N2[:, 1]
    first_N, last_N = windows.chars_firsts_N + low_N, windows.chars_firsts_N + high_N
    begin_Q = np.searchsorted(windows.questions_N, np.arange(questions))
    end_Q = np.searchsorted(windows.questions_N, np.arange(questions), side="right")
    # A question's windows run through its context, from the first one's begin to the last one's
    # end.
    return end_Q - begin_Q, last_N[end_Q - 1] - first_N[begin_Q]


def excerpts(example: Example, answer: Answer) -> list[AnswerRecord]:
    """Stretches of the context around the model's and the first right answer, at word boundaries.

    Returns:
        Each stretch's first character in the context, and its text; the context's beginning where
        neither answers anything.
    """
    context = example.context
    places = [(answer.start, answer.end)] if answer.text else []
    if example.answers:
        start = example.answer_starts[0]
        places.append((start, start + len(example.answers[0])))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(places) or [(0, 0)]:
        low, high = _at_words(context, start - AROUND, min(end, start + LONGEST) + AROUND)
        if merged and low <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return [{"start": low, "text": context[low:high]} for low, high in merged]


def _at_words(text: str, low: int, high: int) -> tuple[int, int]:
    # Move inwards to the next blank, at most 20 characters: a text may have none.
    low, high = max(0, low), min(len(text), high)
    if low:
        blank = text.find(" ", low, low + 20)
        low = blank + 1 if blank >= 0 else low
    if high < len(text):
        blank = text.rfind(" ", high - 20, high)
        high = blank if blank > low else high
    return low, high
