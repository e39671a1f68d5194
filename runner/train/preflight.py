"""What `check --data` tells before a GPU is spent: windows as the model will see them, cut answers,
padding, parameters, steps and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from runner.data.sampler import TrainSampler
from runner.data.splits import Split, joined, load_splits, read_as_lines, weighted_sets
from runner.data.windows import Windows
from runner.distributed.engine import learning_rate_factor
from runner.eval.caveats import caveats
from runner.job.schema import Job, batch_layout
from runner.model.freeze import freeze, parameter_table
from runner.model.load import ModelFiles, check_forward, load_outline, load_tokenizer
from runner.model.structure import recomputable_layers
from runner.utils.tables import CellValue

Rows = list[dict[str, CellValue]]

SHOWN = 3  # windows that are shown
AROUND = 12  # tokens of the context shown before and after the answer


def check_data(job: Job, ranks: int) -> Iterator[str | Rows]:
    """Yield the report, its lines and the rows of its tables; of the weights only names and shapes
    are read, and nothing is trained.

    Raises:
        RunnerError: of the kind that the run itself would end with.
    """
    layout = batch_layout(job.train, ranks)
    files = ModelFiles.locate(job.model)
    model, tokenizer = load_outline(files), load_tokenizer(files)
    check_forward(model, tokenizer, job.model.name, training=True)
    freeze(model, job.model.freeze)
    if job.train.gradient_checkpointing:
        recomputable_layers(model)
    warnings: list[str] = []
    sets = load_splits(job.data, job.seed, tokenizer, warn=warnings.append)
    parts = sets.named()
    yield f"{job.name}: {job.model.name} on {job.data.described(job.data.trained)}"
    yield from [
        *dict.fromkeys([*files.notes, *warnings]),
        *caveats(parts, job.score, trained=sets.trained()),
    ]
    yield from read_as_lines(parts)
    weighted = weighted_sets(job.data, sets)
    seen = dict(zip(sets.trained(), (one.count for one in weighted), strict=False))
    mended = any(part.dataset.repairs for part in parts.values())
    yield [_data_row(name, part, seen, mended=mended) for name, part in parts.items()]
    for name, part in parts.items():
        contradictions, dropped = part.dataset.contradictions, part.dataset.dropped
        repairs = part.dataset.repairs
        if contradictions or dropped or repairs:
            yield ""
        yield from (f"{name}: {sentence}" for sentence in contradictions)
        yield from (f"dropped: {line}" for line in dropped[:5])
        if len(dropped) > 5:
            yield f"dropped: and {len(dropped) - 5} more"
        yield from (f"mended: {repair}" for repair in repairs[:5])
        if len(repairs) > 5:
            yield f"mended: and {len(repairs) - 5} more"

    training = joined([*sets.training.values()])
    lengths_N = training.windows.lengths_N
    sampler = TrainSampler(lengths_N, job.train, layout, job.seed, 0, weighted)
    yield ""
    yield _lengths(lengths_N, job.data.max_length)
    yield f"as the model sees {SHOWN} of them, the answer between >> and <<:"
    yield from _examples(training.windows, tokenizer)
    yield ""
    yield from _epochs(job, sampler)
    rows = parameter_table(model)
    yield [dict(row) for row in rows]
    total, trained = int(str(rows[-1]["parameters"])), int(str(rows[-1]["trained"]))
    yield (
        "memory for weights, gradients and AdamW's state:"
        f" {_states(total, trained, job.zero.stage, ranks) / 2**30:.2f} GiB a rank in fp32 with"
        f" ZeRO-{job.zero.stage}; activations come on top"
    )


def _epochs(job: Job, sampler: TrainSampler) -> Iterator[str]:
    """Padding and steps."""
    batches, layout = sampler.epoch(1), sampler.layout
    lengths = [sampler.lengths_N[rows] for rows in batches]
    padded = sum(int(some.max()) * len(some) for some in lengths)
    whole = job.data.max_length * sampler.windows
    tokens = sum(int(some.sum()) for some in lengths)
    yield (
        f"padding: {100 * (1 - tokens / padded):.1f} % of the tokens computed "
        f"({100 * (1 - tokens / whole):.1f} % if every window were padded to {job.data.max_length})"
    )
    steps = len(batches) * job.train.epochs
    factor = learning_rate_factor(job.train, steps)
    peak = next((step for step in range(steps) if factor(step) >= 1), 0)
    yield (
        f"steps: {len(batches)} an epoch, {steps} in all; {job.train.batch_size} windows each ="
        f" {layout.world} rank(s) x {layout.micro_batch_size} x {layout.micro_batches};"
        f" learning rate at its peak from step {peak}"
    )


def _lengths(lengths_N: np.ndarray, most: int) -> str:
    half, nine = (int(np.quantile(lengths_N, share)) for share in (0.5, 0.9))
    full = int((lengths_N == most).sum())
    return (
        f"lengths: windows of train have {lengths_N.min()} to {lengths_N.max()} tokens, half of"
        f" them at most {half}, nine of ten at most {nine}; {full} have all {most}"
        " (data.max_length)"
    )


def _examples(windows: Windows, tokenizer: Any) -> Iterator[str]:
    """Windows from the begin, the middle and the end of the data, those with an answer first: their
    tokens, of a long context those around the answer."""
    answered = np.flatnonzero(windows.answered_N)
    some = answered if len(answered) >= SHOWN else np.arange(len(windows))
    for n in dict.fromkeys(some[np.linspace(0, len(some) - 1, SHOWN).astype(int)].tolist()):
        ids = windows.tokens_T[windows.firsts_N1[n] : windows.firsts_N1[n + 1]]
        tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
        start, end = int(windows.starts_N[n]), int(windows.ends_N[n]) + 1
        low, high = map(int, windows.contexts_N2[n])
        if not windows.answered_N[n]:
            start = end = low
        left, right = max(low, start - AROUND), min(high, end + AROUND)
        before = [*tokens[:low], *["..."] * (left > low), *tokens[left:start]]
        answer = [">>", *tokens[start:end], "<<"] if end > start else []
        after = [*tokens[end:right], *["..."] * (right < high), *tokens[high:]]
        yield f"  {len(tokens)} tokens: {' '.join([*before, *answer, *after])}"


def _data_row(
    name: str, part: Split, seen: Mapping[str, int], *, mended: bool
) -> dict[str, CellValue]:
    """What there is of a set; where sets have weights, how many windows an epoch sees of each;
    where any answer was mended, how many were in each."""
    windows = part.windows
    return {
        "slice": name,
        "questions": len(part.dataset.examples),
        "dropped": len(part.dataset.dropped),
        **({"mended": len(part.dataset.repairs)} if mended else {}),
        "windows": len(windows),
        **({"seen": seen.get(name)} if seen else {}),
        "mean tokens": float(windows.lengths_N.mean()),
        "longest": int(windows.lengths_N.max()),
        "answers in no window": _cut_answers(part, windows),
    }


def _cut_answers(part: Split, windows: Windows) -> int:
    """Questions with an answer that no window holds whole: longer than the stride, or than a
    window."""
    found_Q = np.zeros(len(part.dataset.examples), dtype=bool)
    found_Q[windows.questions_N[windows.answered_N]] = True
    has_Q = np.array([bool(example.answers) for example in part.dataset.examples])
    return int((has_Q & ~found_Q).sum())


def _states(total: int, trained: int, stage: int, ranks: int) -> float:
    """Bytes of fp32 weights, gradients and two moments on one rank, by what the ZeRO stage shares
    out."""
    weights = 4 * total / (ranks if stage >= 3 else 1)
    gradients = 4 * trained / (ranks if stage >= 2 else 1)
    # ZeRO 1 to 3 keep a second copy of the trained weights beside AdamW's two moments.
    optimiser = (12 if stage else 8) * trained / (ranks if stage >= 1 else 1)
    return weights + gradients + optimiser
