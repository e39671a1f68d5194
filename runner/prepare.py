"""Gets a job's questions and windows ready: read, checked, tokenised; for the run and for `check
--data`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from runner.dataset import Dataset, Example, load_dataset
from runner.errors import JobError
from runner.feature_cache import cached_windows
from runner.features import Windows
from runner.job import Data, Probe


@dataclass(frozen=True)
class Questions:
    """A data set and its windows; `cached` tells whether the windows were there already."""

    dataset: Dataset
    windows: Windows
    cached: bool


def load_questions(
    section: Data, seed: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Questions, Questions]:
    """Return training and validation questions.

    Both data sets are read and checked before either is tokenised: what is wrong in the second must
        not wait.

    Raises:
        JobError: if a window is longer than the model's positions reach; else as `load_dataset` and
            `build_windows`.
    """
    slices = ((section.train, section.sample), (section.validation, section.validation_sample))
    datasets = [
        load_dataset(
            name,
            columns=section.columns,
            unanswerable=section.unanswerable,
            on_bad_row=section.on_bad_row,
            sample=sample,
            seed=seed,
        )
        for name, sample in slices
    ]
    train, validation = (
        Questions(
            dataset,
            *cached_windows(
                dataset.examples, dataset.sha256, tokenizer, section.max_length, section.stride
            ),
        )
        for dataset in datasets
    )
    for part in (train, validation):
        longest = int(part.windows.lengths_N.max())
        if longest > tokenizer.model_max_length:
            raise JobError(
                [
                    f"data.max_length: {section.max_length} gives windows of {longest} tokens"
                    f" ({part.dataset.source}); this model takes {tokenizer.model_max_length}"
                ]
            )
    return train, validation


def probe_examples(probes: Sequence[Probe]) -> list[Example]:
    """Spell probes as questions; one whose right answer is not verbatim in its context is asked
    without a label."""
    examples = []
    for number, probe in enumerate(probes, 1):
        start = probe.context.find(probe.answer) if probe.answer else -1
        answers = ((probe.answer,), (start,)) if probe.answer and start >= 0 else ((), ())
        examples.append(Example(f"probe-{number}", probe.question, probe.context, *answers))
    return examples
