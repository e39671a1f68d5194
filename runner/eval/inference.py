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
from runner.eval.answers import Answer, BestSpans, answers, join, search
from runner.job.schema import Score
from runner.model.forward import Read, Reader, token_accuracy
from runner.utils.console import Step
from runner.utils.ranks import Rank

BLOCK_WINDOWS = 32_768  # windows whose candidates are in memory together
# Devices whose memory is tried before training. On a CPU a rehearsal would cost seconds, where
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


@torch.no_grad()
def predict_windows(
    reader: Reader,
    windows: Windows,
    examples: Sequence[Example],
    score: Score,
    rank: Rank,
    *,
    unanswerable: bool,
    keep: int | None = None,
    step: Step | None = None,
) -> Predictions | None:
    """Run the model over all windows and find each question's answer.

    Every rank must call this; only rank 0 gets the result. Candidate spans are kept for a block of
    windows at a time, so that memory grows with the answers alone.

    Args:
        reader: the model and how to feed it.
        windows, examples: a data set.
        score: n-best, answer length, null threshold, windows per batch.
        rank: this process's.
        unanswerable: whether "" may be an answer.
        keep: the most candidates that an answer lists; None lists all of the n-best.
        step: told of each batch.
    """
    began = time.monotonic()
    was_training = reader.model.training
    reader.model.eval()
    totals_4 = torch.zeros(4, dtype=torch.float64)  # loss, then start, end, span
    found: list[Answer] = []
    done = 0
    for rows in _blocks(windows.questions_N):
        parts: list[tuple[np.ndarray, BestSpans]] = []
        block_4 = torch.zeros(4, dtype=torch.float64, device=reader.device)
        batches = score_batches(windows.lengths_N[rows], score.batch_size, rank.index, rank.world)
        for batch, read in _read_ahead(reader, windows, rows.start, batches):
            if read.counted:
                block_4 += _right(read)
                spans = _candidates(read, windows, rows.start + batch, score)
                # Kept in main memory, candidates only: the device holds few batches at a time.
                parts.append((batch, spans.cpu()))
            done += 1
            if step is not None:
                step(done)
        mine = block_4.cpu(), parts
        everything = gather_to_main(mine) if rank.world > 1 else [mine]
        if everything is None:
            continue
        totals_4 += sum(totals for totals, _ in everything)
        first, last = windows.questions_N[rows][[0, -1]]
        found += answers(
            _in_order([part for _, parts in everything for part in parts]),
            question_N=windows.questions_N[rows] - first,
            # The context's token at position p of window n has its characters in row
            # chars_firsts_N[n] + p.
            segments_N2=np.stack([windows.chars_firsts_N[rows], windows.lengths_N[rows]], axis=1),
            chars_T2=windows.chars_C2,
            ids=[e.id for e in examples[first : last + 1]],
            contexts=[e.context for e in examples[first : last + 1]],
            n_best=score.n_best,
            null_threshold=score.null_threshold if unanswerable else None,
            mode=score.mode,
            keep=keep,
        )
    reader.model.train(was_training)
    if not rank.is_main:
        return None
    loss, *right_3 = (totals_4 / max(1, len(windows))).tolist()
    return Predictions(
        loss=loss,
        start_accuracy=100 * right_3[0],
        end_accuracy=100 * right_3[1],
        span_accuracy=100 * right_3[2],
        answers=tuple(found),
        seconds=time.monotonic() - began,
    )


def batch_count(windows: Windows, batch_size: int) -> int:
    """How many batches `read_windows` reads in a process alone."""
    blocks = _blocks(windows.questions_N)
    return sum(-(-(rows.stop - rows.start) // batch_size) for rows in blocks)


@torch.no_grad()
def dry_run(reader: Reader, windows: Windows, score: Score) -> None:
    """Read the batch that needs the most memory and search it, for nothing: what does not fit fails
    before training, not after its first epoch. On a CPU nothing is tried. Every rank must call
    this."""
    batches = score_batches(windows.lengths_N, score.batch_size, 0, 1)
    if not batches or reader.device.type not in DRY_RUN_DEVICES:
        return
    was_training = reader.model.training
    reader.model.eval()
    read = reader.read(windows, batches[0])
    _right(read)
    _candidates(read, windows, batches[0], score)
    reader.model.train(was_training)


def _read_ahead(
    reader: Reader, windows: Windows, first: int, batches: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, Read]]:
    """Read batch after batch of the windows from `first` on. The next one is assembled and sent
    while the device is at work on this one: the search for its spans waits for the device."""
    upcoming = reader.prepare(windows, first + batches[0]) if batches else None
    for number, batch in enumerate(batches, 1):
        if upcoming is None:
            raise AssertionError("each batch is prepared before the one ahead of it is given")
        read = reader.run(upcoming)
        left = batches[number : number + 1]
        upcoming = reader.prepare(windows, first + left[0]) if left else None
        yield batch, read


def _candidates(read: Read, windows: Windows, rows: np.ndarray, score: Score) -> BestSpans:
    """The best spans of a batch, on its device."""
    return search(
        read.logits_T2,
        read.segments_B2,
        torch.from_numpy(windows.contexts_N2[rows]),
        n_best=score.n_best,
        max_answer_length=score.max_answer_length,
        mode=score.mode,
        cls_N=torch.from_numpy(windows.cls_N[rows]),
    )


def _blocks(questions_N: np.ndarray) -> Iterator[slice]:
    """Cut windows into blocks that hold whole questions, at most `BLOCK` windows each where no
    question has more."""
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


def _right(read: Read) -> Tensor:
    """Sums over a batch: loss in nats, windows whose start, end, both are right; float64 [4]."""
    loss = reference_span_loss(read.logits_T2, read.segments_B2, read.starts_B, read.ends_B)
    right_3 = token_accuracy(read)
    return torch.cat([loss[None] * read.counted, right_3]).double()


def _in_order(parts: Sequence[tuple[np.ndarray, BestSpans]]) -> BestSpans:
    """Put the ranks' batches back into the windows' order."""
    place_N = torch.from_numpy(np.concatenate([rows for rows, _ in parts])).argsort()
    return join([spans for _, spans in parts])[place_N]
