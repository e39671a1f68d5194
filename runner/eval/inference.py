"""Runs a model over windows, shared over the ranks, and turns its logits into answers on rank 0.

Legend: N windows of the data set, B windows of a batch, L longest of them, K candidate spans, T
    rows of logits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from span_kernels import reference_span_loss
from torch import Tensor

from runner.data.dataset import Example
from runner.data.sampler import score_batches
from runner.data.windows import Windows
from runner.distributed.collectives import gather_to_main
from runner.eval.answers import Answer, BestSpans, MergeSettings, join, merge_answers, search
from runner.job.schema import Score
from runner.model.forward import SpanLogits, SpanModel
from runner.utils.console import Step
from runner.utils.ranks import Rank

BLOCK_WINDOWS = 32_768  # windows whose candidates are in memory together
# Devices whose memory is tried before training. On a CPU a dry run would cost seconds, where
# scoring, which keeps no activations, has more room than a step.
DRY_RUN_DEVICES = ("cuda",)


@dataclass(frozen=True)
class Predictions:
    """What a model says about a set of windows.

    Attributes:
        loss: mean span loss in nats over all windows (a window without the answer points at [CLS]).
        start_accuracy, end_accuracy, span_accuracy: percent of windows whose likeliest start, end,
            both are right.
        answers: one for each question, in order.
        seconds: wall time.
    """

    loss: float
    start_accuracy: float
    end_accuracy: float
    span_accuracy: float
    answers: tuple[Answer, ...]
    seconds: float


def predict_windows(
    model: SpanModel,
    windows: Windows,
    examples: Sequence[Example],
    score: Score,
    rank: Rank,
    *,
    unanswerable: bool,
    n_listed: int | None = None,
    step: Step | None = None,
) -> Predictions | None:
    """Run the model over all windows and find each question's answer.

    Every rank must call this; only rank 0 gets the result. Candidate spans are in memory for a
    block of windows at a time, so that memory grows with the answers alone.

    Args:
        model: the model and how to feed it.
        windows, examples: a data set.
        score: n-best, answer length, null threshold, windows per batch.
        rank: this process's.
        unanswerable: whether "" may be an answer.
        n_listed: the most candidates that an answer lists; None lists all of the n-best.
        step: called with the number of batches done.
    """
    began = time.monotonic()
    threshold = score.null_threshold if unanswerable else None
    settings = MergeSettings(score.n_best, threshold, score.mode, n_listed)
    totals_4 = torch.zeros(4, dtype=torch.float64)  # loss, then start, end, span
    found: list[Answer] = []
    done = 0
    with model.evaluating():
        for rows in _blocks(windows.questions_N):
            parts: list[tuple[np.ndarray, BestSpans]] = []
            block_4 = torch.zeros(4, dtype=torch.float64, device=model.loader.device)
            lengths_N = windows.lengths_N[rows]
            batches = score_batches(lengths_N, score.batch_size, rank.index, rank.world)
            for batch, logits in _read_ahead(model, windows, rows.start, batches):
                if logits.batch.counted:
                    block_4 += _sums(logits)
                    # In main memory, candidates only: the device holds few batches at a time.
                    parts.append((batch, _best_spans(logits, windows, score).cpu()))
                done += 1
                if step is not None:
                    step(done)
            mine = block_4.cpu(), parts
            everything = gather_to_main(mine) if rank.world > 1 else [mine]
            if everything is not None:
                totals_4 += sum(totals for totals, _ in everything)
                spans = _in_order([part for _, parts in everything for part in parts])
                found += _block_answers(spans, windows, rows, examples, settings)
    if not rank.is_main:
        return None
    loss, start, end, span = (totals_4 / max(1, len(windows))).tolist()
    return Predictions(
        loss, 100 * start, 100 * end, 100 * span, tuple(found), time.monotonic() - began
    )


def _block_answers(
    spans: BestSpans,
    windows: Windows,
    rows: slice,
    examples: Sequence[Example],
    settings: MergeSettings,
) -> Iterator[Answer]:
    first, last = windows.questions_N[rows][[0, -1]]
    questions = examples[first : last + 1]
    return merge_answers(
        spans,
        windows.questions_N[rows] - first,
        windows.chars_firsts_N[rows],
        windows.chars_C2,
        [example.id for example in questions],
        [example.context for example in questions],
        settings,
    )


def batch_count(windows: Windows, batch_size: int) -> int:
    """How many batches `predict_windows` runs in a process alone."""
    blocks = _blocks(windows.questions_N)
    return sum(-(-(rows.stop - rows.start) // batch_size) for rows in blocks)


def dry_run(model: SpanModel, windows: Windows, score: Score) -> None:
    """Run the batch that needs the most memory and search it, for nothing: what does not fit fails
    before training, not after its first epoch. On a CPU nothing is tried. Every rank must call
    this."""
    batches = score_batches(windows.lengths_N, score.batch_size, 0, 1)
    if not batches or model.loader.device.type not in DRY_RUN_DEVICES:
        return
    with model.evaluating():
        logits = model(model.batch(windows, batches[0]))
        _sums(logits)
        _best_spans(logits, windows, score)


def _read_ahead(
    model: SpanModel, windows: Windows, first: int, batches: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, SpanLogits]]:
    """Run the model over batch after batch of the windows from `first` on."""
    # The next batch is assembled and sent while the device is at work on this one: the search for
    # its spans waits for the device.
    upcoming = model.batch(windows, first + batches[0]) if batches else None
    for number, batch in enumerate(batches, 1):
        if upcoming is None:
            raise AssertionError("each batch is prepared before the one ahead of it is given")
        logits = model(upcoming)
        left = batches[number : number + 1]
        upcoming = model.batch(windows, first + left[0]) if left else None
        yield batch, logits


def _best_spans(logits: SpanLogits, windows: Windows, score: Score) -> BestSpans:
    """The best spans of a batch, on its device."""
    rows_B = logits.batch.rows_B
    return search(
        logits.logits_T2,
        logits.batch.segments_B2,
        torch.from_numpy(windows.contexts_N2[rows_B]),
        n_best=score.n_best,
        max_answer_length=score.max_answer_length,
        mode=score.mode,
        cls_N=torch.from_numpy(windows.cls_N[rows_B]),
    )


def _blocks(questions_N: np.ndarray) -> Iterator[slice]:
    """Cut windows into blocks of whole questions, of `BLOCK_WINDOWS` where questions allow it."""
    first = 0
    while first < len(questions_N):
        last = min(first + BLOCK_WINDOWS, len(questions_N))
        if last < len(questions_N):
            begin = int(np.searchsorted(questions_N, questions_N[last]))
            last = (
                begin
                if begin > first
                else int(np.searchsorted(questions_N, questions_N[last], side="right"))
            )
        yield slice(first, last)
        first = last


def _sums(logits: SpanLogits) -> Tensor:
    """Over a batch: loss in nats, windows whose start, end, both are right; float64 [4]."""
    batch = logits.batch
    loss = reference_span_loss(logits.logits_T2, batch.segments_B2, batch.starts_B, batch.ends_B)
    return torch.cat([loss[None] * batch.counted, logits.accuracy()]).double()


def _in_order(parts: Sequence[tuple[np.ndarray, BestSpans]]) -> BestSpans:
    """Put the ranks' batches back into the windows' order."""
    place_N = torch.from_numpy(np.concatenate([rows for rows, _ in parts])).argsort()
    return join([spans for _, spans in parts])[place_N]
