"""From spans to answers: n-best lists over a question's windows, and the null answer of SQuAD v2.

Shape suffixes: T tokens of all windows, N windows, Q questions, K n-best of a window, C candidate
answers of all questions, 2 a pair [start, end) or (offset, length). The search itself is in
`span_search`; its public names are here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runner.eval.span_search import NEVER, BestSpans, Mode, join, search
from runner.utils.processes import collector_paused

__all__ = [
    "Answer",
    "BestSpans",
    "Candidate",
    "MergeSettings",
    "Mode",
    "decide",
    "join",
    "merge_answers",
    "search",
]

_QUESTIONS = 4096  # merged at once: enough for numpy, little enough for memory


@dataclass(frozen=True, slots=True)
class Candidate:
    """One possible answer: context[start:end], its probability among the n-best, its logit score.

    `score` is the probability; `window` counts the question's windows from 0. The null answer has
    text "" and stands at [0, 0).
    """

    text: str
    score: float
    logit: float
    start: int
    end: int
    window: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a question: text, probability (`score`), characters [start, end) and window.

    null_score is the least start + end logit at [CLS] over the question's windows, null_window
    where it stands. null_difference, null_score minus the best span's logit score, is what a null
    threshold is compared with. null_probability is the null answer's share of the n-best, 0.0 where
    no empty answer is allowed. n_best is sorted, best first. Without any span: score 0.0, window
    -1, the best span's logit counts as 0.0.
    """

    id: str
    text: str
    score: float
    start: int
    end: int
    window: int
    null_score: float
    null_probability: float
    null_difference: float
    null_window: int
    n_best: tuple[Candidate, ...]

    @property
    def span(self) -> Candidate | None:
        """The best candidate with text, whether or not the null answer won; None without any."""
        return next((candidate for candidate in self.n_best if candidate.text), None)


# What stands for the best span where there is none.
_NOTHING: dict[Mode, Candidate] = {
    "exact": Candidate("", 0.0, 0.0, 0, 0, -1),
    "run_qa": Candidate("empty", 0.0, 0.0, 0, 0, -1),
}


def decide(answer: Answer, null_threshold: float, mode: Mode = "exact") -> Answer:
    """The same answer under another null threshold, as `merge_answers` with it would give.

    Args:
        answer: made by `merge_answers` with some null threshold.
        null_threshold: "" is the answer where null_difference exceeds it.
        mode: as the answer was made.
    """
    if answer.null_difference > null_threshold:
        chosen = "", answer.null_probability, 0, 0, answer.null_window
    else:
        best = answer.span or _NOTHING[mode]
        chosen = best.text, best.score, best.start, best.end, best.window
    text, score, start, end, window = chosen
    return replace(answer, text=text, score=score, start=start, end=end, window=window)


@dataclass(frozen=True)
class MergeSettings:
    """How spans become answers.

    Attributes:
        n_best: the most spans in a question's list.
        null_threshold: None never answers "" where a span exists (SQuAD v1); else "" is the answer
            where null_difference > null_threshold (SQuAD v2, run_qa's rule).
        mode: as the spans were searched.
        n_listed: the most candidates that an answer lists, at least 1; None lists all of the
            n_best. Probabilities stay those over all. The best span is always listed.
    """

    n_best: int = 20
    null_threshold: float | None = None
    mode: Mode = "exact"
    n_listed: int | None = None


def merge_answers(
    spans: BestSpans,
    question_N: np.ndarray,
    offset_N: np.ndarray,
    chars_T2: np.ndarray,
    ids: Sequence[str],
    contexts: Sequence[str],
    settings: MergeSettings,
) -> Iterator[Answer]:
    """Merge the windows of each question into one answer and its n-best list, one question after
    the other: a few thousand are in memory at a time.

    The same characters found in several windows count once, with their best score. The list holds
    the `n_best` best spans and, where empty answers are allowed, the null answer at its place;
    probabilities are the softmax over the list. Equal logit scores go to the lowest start, the
    lowest end, the first window. In mode "run_qa" they go to the first window, then as in `search`:
    that gives the texts of `postprocess_qa_predictions` in Hugging Face's
    question-answering/utils_qa.py (for n_best >= 2), with its "empty" where there is no candidate.
    Mode "exact" answers "" there, and never with a token that stands for no characters.

    Args:
        spans: what `search` found, on any device.
        question_N: integer index into `ids` of each window's question, ascending.
        offset_N: integer; the characters of the token at position p of window n are in row
            offset_N[n] + p of chars_T2.
        chars_T2: integer [start, end) of each token in its context's characters.
        ids, contexts: one string per question.
        settings: as said there.

    Yields:
        One Answer per question, in the order of `ids`.

    Raises:
        ValueError: question_N is not ascending, a question has no window, lengths do not agree.
    """
    num, spans = len(ids), spans.cpu()
    question_N, offset_N = np.asarray(question_N), np.asarray(offset_N)
    if not len(question_N) == len(offset_N) == len(spans.score_NK) or len(contexts) != num:
        raise ValueError("the arrays hold different numbers of windows or of questions")
    if settings.n_best < 1 or (settings.n_listed is not None and settings.n_listed < 1):
        raise ValueError("n_best and n_listed, the spans to keep per question, must be at least 1")
    steps = np.diff(question_N.astype(np.int64), prepend=-1, append=num)
    if steps[0] != 1 or steps[-1] != 1 or not np.isin(steps, (0, 1)).all():
        raise ValueError("question_N must be ascending and name every question at least once")
    for first in range(0, num, _QUESTIONS):
        last = min(first + _QUESTIONS, num)
        low, high = np.searchsorted(question_N, [first, last])
        yield from _merge_some(
            spans[low:high],
            question_N[low:high] - first,
            offset_N[low:high],
            np.asarray(chars_T2),
            ids[first:last],
            contexts[first:last],
            settings,
        )


@collector_paused()
def _merge_some(
    spans: BestSpans,
    question_N: np.ndarray,
    offset_N: np.ndarray,
    chars_T2: np.ndarray,
    ids: Sequence[str],
    contexts: Sequence[str],
    settings: MergeSettings,
) -> list[Answer]:
    """`merge_answers` of a few questions, all of it checked."""
    num = len(ids)
    found_Q, question_C, logit_C, *places = _ranked(
        spans, question_N, offset_N, chars_T2, num, settings
    )
    start_C, end_C, window_C = places
    first_Q = np.searchsorted(question_N, np.arange(num))
    null_N = spans.null_score_N.numpy()
    null_Q = np.minimum.reduceat(null_N, first_Q)
    least_N = np.flatnonzero(null_N == null_Q[question_N])
    null_window_Q = least_N[np.searchsorted(question_N[least_N], np.arange(num))] - first_Q
    above_null_Q = np.bincount(question_C[logit_C >= null_Q[question_C]], minlength=num)
    may_be_empty = settings.null_threshold is not None
    share_C, null_share_Q = _softmax(
        logit_C, question_C, null_Q if may_be_empty else np.full(num, NEVER)
    )
    columns = question_C, share_C, logit_C, start_C, end_C, window_C - first_Q[question_C]
    if settings.n_listed is not None and settings.mode == "exact":
        # The best has text: no later one is needed.
        listed_C = _place_in_group(question_C) < settings.n_listed
        columns = tuple(column_C[listed_C] for column_C in columns)
    question_C, *columns = columns

    rows = zip(*(column_C.tolist() for column_C in (question_C, *columns[2:4])), strict=True)
    texts = [contexts[question][start:end] for question, start, end in rows]
    candidates = list(map(Candidate, texts, *(column_C.tolist() for column_C in columns)))
    bounds = np.searchsorted(question_C, np.arange(num + 1)).tolist()
    several = (np.minimum(found_Q, settings.n_best) > 1).tolist()
    null_columns = null_Q, null_share_Q, null_window_Q, above_null_Q
    nulls = zip(*(column.tolist() for column in null_columns), strict=True)
    return [
        _answer(id, tuple(candidates[low:high]), null, many, settings)
        for id, low, high, null, many in zip(
            ids, bounds[:-1], bounds[1:], nulls, several, strict=True
        )
    ]


def _ranked(
    spans: BestSpans,
    question_N: np.ndarray,
    offset_N: np.ndarray,
    chars_T2: np.ndarray,
    num: int,
    settings: MergeSettings,
) -> tuple[np.ndarray, ...]:
    """Spans found, by question; then question, logit, start, end, window of the n_best best."""
    score_NK = spans.score_NK.numpy()
    window_C, rank_C = np.nonzero(score_NK > NEVER)
    logit_C, question_C = score_NK[window_C, rank_C], question_N[window_C]
    offset_C = offset_N[window_C]
    start_C = chars_T2[offset_C + spans.start_NK.numpy()[window_C, rank_C], 0]
    end_C = chars_T2[offset_C + spans.end_NK.numpy()[window_C, rank_C], 1]
    end_C = np.maximum(start_C, end_C)  # tokens without characters only: nothing, not less
    found_Q = np.bincount(question_C, minlength=num)
    if settings.mode == "exact":
        order_C = np.lexsort((window_C, end_C, start_C, -logit_C, question_C))
        order_C = order_C[(end_C > start_C)[order_C]]
    else:
        order_C = np.lexsort((-logit_C, question_C))  # stable
    order_C = order_C[_is_first(question_C[order_C], start_C[order_C], end_C[order_C])]
    order_C = order_C[_place_in_group(question_C[order_C]) < settings.n_best]
    columns = question_C, logit_C, start_C, end_C, window_C
    return found_Q, *(column_C[order_C] for column_C in columns)


def _answer(
    id: str,
    listed: tuple[Candidate, ...],
    null: tuple[float, float, int, int],
    many: bool,
    settings: MergeSettings,
) -> Answer:
    """The answer out of a question's candidates; `many`: more than one span was found."""
    null_score, null_share, null_window, above = null  # above: candidates that are not below it
    nothing = _NOTHING[settings.mode]
    best = next((candidate for candidate in listed if candidate.text), nothing)
    span, null_difference = best, null_score - best.logit
    if settings.null_threshold is not None:
        empty = Candidate("", null_share, null_score, 0, 0, null_window)
        if above <= len(listed):
            listed = (*listed[:above], empty, *listed[above:])
        best = empty if null_difference > settings.null_threshold else best
    elif listed and many:
        # run_qa does answer with a token without characters, unless it is the only candidate.
        best = listed[0]
    most = settings.n_listed
    if most is not None and len(listed) > most:
        listed = listed[:most] if span in (nothing, *listed[:most]) else (*listed[:most], span)
    chosen = best.text, best.score, best.start, best.end, best.window
    return Answer(id, *chosen, null_score, null_share, null_difference, null_window, listed)


def _is_first(*keys_C: np.ndarray) -> np.ndarray:
    # Whether a row is the first, in the given order, of all rows with these keys.
    order_C = np.lexsort(keys_C)  # stable
    repeats_C = np.zeros(len(order_C), dtype=bool)
    if len(order_C):
        same = [key_C[order_C][1:] == key_C[order_C][:-1] for key_C in keys_C]
        repeats_C[order_C[1:]] = np.logical_and.reduce(same)
    return ~repeats_C


def _place_in_group(group_C: np.ndarray) -> np.ndarray:
    # 0, 1, 2, ... within each run of equal values of an ascending array.
    return np.arange(len(group_C)) - np.searchsorted(group_C, group_C)


def _softmax(
    logit_C: np.ndarray, question_C: np.ndarray, null_Q: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    # Probabilities, float64, over each question's spans and its null answer (-inf: not allowed).
    null_Q = null_Q.astype(np.float64)
    top_Q = null_Q.copy()
    np.maximum.at(top_Q, question_C, logit_C)
    top_Q[np.isneginf(top_Q)] = 0.0
    share_C = np.exp(logit_C.astype(np.float64) - top_Q[question_C])
    null_share_Q = np.exp(null_Q - top_Q)
    sum_Q = null_share_Q + np.bincount(question_C, weights=share_C, minlength=len(null_Q))
    sum_Q[sum_Q == 0.0] = 1.0  # no span and no null answer
    return share_C / sum_Q[question_C], null_share_Q / sum_Q
