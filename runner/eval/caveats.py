"""What keeps scores from meaning what they seem to mean: ceilings and leaks, a sentence each."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from runner.data.dataset import Example
from runner.data.formats.rows import printable_id, short_value
from runner.data.splits import Split
from runner.data.tokenize import overlapping_tokens
from runner.data.windows import Windows
from runner.job.schema import Score
from runner.metrics.normalise import foreign_answers

OFTEN = 0.05  # share of the questions above which one answer is told of


def caveats(
    parts: Mapping[str, Split],
    score: Score,
    *,
    option: Callable[[str], str] = "score.{}".format,
    trained: Collection[str] = ("train",),
) -> list[str]:
    """Look through data sets for answers that cannot be given, one that is given often, and
    questions that are trained on and scored.

    Args:
        parts: the data sets by what they are for.
        score: the job's section.
        option: how the user sets a key of it.
        trained: those of `parts` that are trained on: their labels are the first answers.
    """
    lines: list[str] = []
    for name, part in parts.items():
        found = (
            _too_long(
                part,
                score.max_answer_length,
                option("max_answer_length"),
                is_trained=name in trained,
            ),
            _often(part.dataset.examples),
        )
        lines += [f"{name}: {line}" for line in found if line]
    for name in [name for name in parts if name not in trained]:
        answers = (text for e in parts[name].dataset.examples for text in e.answers)
        if line := foreign_answers(answers, score.language, option("language")):
            lines.append(f"{name}: {line}")
        for other in trained:
            if other in parts:
                shared = _shared(parts[name].dataset.examples, parts[other].dataset.examples, other)
                lines += [f"{name}: {line}" for line in shared]
    return lines


def answer_lengths(examples: Sequence[Example], windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that each right answer overlaps, without blanks around it.

    Returns:
        Positions of the answers' questions, ascending, and their lengths in tokens, int64 both.
    """
    # A question's windows run through its context: the first one's first token is the context's.
    first_Q = np.searchsorted(windows.questions_N, np.arange(len(examples)))
    low_Q = windows.chars_firsts_N[first_Q] + windows.contexts_N2[first_Q, 0]
    contexts = np.unique(low_Q)
    context_C = np.searchsorted(contexts, np.arange(len(windows.chars_C2)), side="right")
    spans = [
        (place, start, start + len(text))
        for place, example in enumerate(examples)
        for text, start in zip(example.answers, example.answer_starts, strict=True)
    ]
    spans_A3 = np.array(spans, dtype=np.int64).reshape(-1, 3)
    question_A = spans_A3[:, 0]
    context_A = np.searchsorted(contexts, low_Q[question_A], side="right")
    first_A, last_A = overlapping_tokens(windows.chars_C2, context_C, context_A, spans_A3[:, 1:])
    return question_A, last_A - first_A + 1


def _too_long(part: Split, limit: int, key: str, *, is_trained: bool) -> str | None:
    examples = part.dataset.examples
    question_A, length_A = answer_lengths(examples, part.windows)
    asked, first_A = np.unique(question_A, return_index=True)
    if not len(asked):
        return None
    # A label is the first answer; of right answers one that can be given will do.
    length_Q = length_A[first_A] if is_trained else np.minimum.reduceat(length_A, first_A)
    long_Q = length_Q[length_Q > limit]
    if not len(long_Q):
        return None
    share = 100 * len(long_Q) / len(examples)
    counted = f"{len(long_Q):,} of {len(examples):,} questions ({share:.1f} %)"
    limits = f"longer than {key}, {limit} tokens (up to {long_Q.max()})"
    if is_trained:
        return f"{counted} are trained on an answer {limits}, which is never given; raise it"
    return (
        f"{counted} have only right answers {limits}: exact match can hardly pass"
        f" {100 - share:.1f} %; raise it"
    )


def _often(examples: Sequence[Example]) -> str | None:
    counts: Counter[str] = Counter()
    for example in examples:
        counts.update({" ".join(text.lower().split()) for text in example.answers})
    text, count = counts.most_common(1)[0] if counts else ("", 0)
    if count < 2 or count <= OFTEN * len(examples):
        return None
    return (
        f"{short_value(text)} is a right answer of {count:,} of {len(examples):,} questions"
        f" ({100 * count / len(examples):.1f} %): always to give it is right as often"
    )


def _shared(scored: Sequence[Example], trained: Sequence[Example], name: str) -> list[str]:
    """Which scored questions, or their contexts, are trained on; by their texts, for ids say
    nothing across files, and without looking at case, blanks and Unicode forms."""
    folded = {e.context: "" for e in (*scored, *trained)}
    folded |= {context: _folded(context) for context in folded}
    scored_keys = [(_folded(e.question), folded[e.context]) for e in scored]
    trained_keys = {(_folded(e.question), folded[e.context]) for e in trained}
    trained_contexts = {context for _, context in trained_keys}
    same = [e for e, key in zip(scored, scored_keys, strict=True) if key in trained_keys]
    lines = []
    if same and set(scored_keys) == trained_keys:
        lines.append(f"its {len(scored):,} questions are those of {name}: {_BY_HEART}")
    elif same:
        lines.append(
            f"{len(same):,} of {len(scored):,} questions are also in {name}, such as"
            f" {printable_id(same[0].id)}: {_BY_HEART}"
        )
    beside = [c for q, c in scored_keys if c in trained_contexts and (q, c) not in trained_keys]
    if beside:
        contexts = f"{len(set(beside)):,} context(s)"
        lines.append(
            f"{len(beside):,} of {len(scored):,} questions are about {contexts} of which {name}"
            " asks others: scores on contexts that are new may be lower"
        )
    return lines


_BY_HEART = "their scores tell how well they were learnt by heart; take others"


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
