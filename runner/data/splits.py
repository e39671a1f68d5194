"""Gets a job's questions and windows ready: read, checked, tokenised; for the run and for `check
--data`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from runner.data.dataset import Dataset, Example, load_dataset, without_rows
from runner.data.window_cache import cached_windows
from runner.data.windows import Windows
from runner.errors import BadRowsError, DataError, JobError
from runner.job.schema import Data, Probe


@dataclass(frozen=True)
class Split:
    """A data set and its windows; `cached` tells whether the windows were there already."""

    dataset: Dataset
    windows: Windows
    cached: bool


def load_splits(
    section: Data,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    on_block: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda line: None,
) -> tuple[Split, Split, Split | None]:
    """Return training and validation questions, and those on which a null threshold is tuned.

    All data sets are read and checked before one is tokenised: what is wrong in the last must not
    wait. `on_block` is called before each block of questions that is tokenised, and may raise;
    `warn` is told why windows cannot be kept.

    Raises:
        JobError: if a window is longer than the model's positions reach; else as `load_dataset` and
            `build_windows`.
        DataError: if a question that is scored would also be tuned on.
    """
    slices = [(section.train, section.sample), (section.validation, section.validation_sample)]
    if section.tuning is not None:
        slices.append((section.tuning, None))
    datasets = [
        load_dataset(
            name,
            columns=section.columns,
            unanswerable=section.unanswerable,
            on_bad_row=section.on_bad_row,
            no_answer=section.no_answer,
            sample=sample,
            seed=seed,
        )
        for name, sample in slices
    ]
    if section.tuning is not None:
        refuse_shared_questions(datasets[2], datasets[1])
    parts = [_split(dataset, section, tokenizer, on_block, warn) for dataset in datasets]
    for part in parts:
        longest = int(part.windows.lengths_N.max())
        if longest > tokenizer.model_max_length:
            raise JobError(
                [
                    f"data.max_length: {section.max_length} gives windows of {longest} tokens"
                    f" ({part.dataset.source}); this model takes {tokenizer.model_max_length}"
                ]
            )
    return parts[0], parts[1], parts[2] if len(parts) > 2 else None


def _split(
    dataset: Dataset,
    section: Data,
    tokenizer: PreTrainedTokenizerBase,
    on_block: Callable[[], None],
    warn: Callable[[str], None],
) -> Split:
    size = section.max_length, section.stride
    while True:
        examples, content = dataset.examples, dataset.sha256
        try:
            found = cached_windows(examples, content, tokenizer, *size, on_block, warn)
            return Split(dataset, *found)
        except BadRowsError as error:
            dataset = without_rows(dataset, error.rows, section.on_bad_row)


def refuse_shared_questions(tuning: Dataset, validation: Dataset) -> None:
    """Hold tuning and reported questions apart, by their texts: ids say nothing across files.

    Raises:
        DataError: naming the first question that is in both.
    """
    scored = {(e.question.strip(), e.context): e.id for e in validation.examples}
    shared = [e for e in tuning.examples if (e.question.strip(), e.context) in scored]
    if shared:
        first = shared[0]
        raise DataError(
            f"data.tuning: {len(shared)} of its {len(tuning.examples)} questions are also in"
            f" data.validation, such as {first.id} (there"
            f" {scored[first.question.strip(), first.context]}); a threshold tuned on the questions"
            " that are reported would report too much: take another slice"
        )


def probe_examples(probes: Sequence[Probe]) -> list[Example]:
    """Spell probes as questions; one whose right answer is not verbatim in its context is asked
    without a label."""
    examples = []
    for number, probe in enumerate(probes, 1):
        start = probe.context.find(probe.answer) if probe.answer else -1
        answers = ((probe.answer,), (start,)) if probe.answer and start >= 0 else ((), ())
        examples.append(Example(f"probe-{number}", probe.question, probe.context, *answers))
    return examples
