"""`merge_answers` as tests of spans and answers call it."""

from __future__ import annotations

from runner.eval.answers import Answer, MergeSettings, merge_answers


def answers(spans, question_N, *, segments_N2, chars_T2, ids, contexts, **settings) -> list[Answer]:
    how = MergeSettings(**settings)
    return list(merge_answers(spans, question_N, segments_N2[:, 0], chars_T2, ids, contexts, how))
