"""Gets a job's questions and windows ready: read, checked, tokenised; for the run and for `check
--data`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from runner.data.dataset import Dataset, Example, content_sha256, load_dataset, without_rows
from runner.data.sampler import WeightedSet
from runner.data.window_cache import cached_windows
from runner.data.windows import Windows, continued
from runner.errors import BadRowsError, DataError, JobError
from runner.job.schema import Data, Probe, QuestionSet
from runner.job.sources import parse_share


@dataclass(frozen=True)
class Split:
    """A data set and its windows; `cached` tells whether the windows were there already."""

    dataset: Dataset
    windows: Windows
    cached: bool


@dataclass(frozen=True)
class LoadedSets:
    """The questions that a job names.

    Attributes:
        training: each training set by its name, in the job's order.
        validation: each validation set likewise; the first one decides.
        tuning: what the null threshold is tuned on; None: it is not.
    """

    training: Mapping[str, Split]
    validation: Mapping[str, Split]
    tuning: Split | None

    def named(self) -> dict[str, Split]:
        """All of them by what [data] calls them: "train", of several "train NAME"."""
        return {
            **{name: self.training[own] for own, name in _called("train", self.training)},
            **{name: self.validation[own] for own, name in _called("validation", self.validation)},
            **({} if self.tuning is None else {"tuning": self.tuning}),
        }

    def trained(self) -> list[str]:
        """Those names of `named` that are trained on."""
        return [name for _, name in _called("train", self.training)]


def _called(key: str, sets: Collection[str]) -> list[tuple[str, str]]:
    return [(own, f"{key} {own}" if len(sets) > 1 else key) for own in sets]


def load_splits(
    section: Data,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    on_block: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda line: None,
) -> LoadedSets:
    """Return training and validation questions, and those on which a null threshold is tuned.

    All data sets are read and checked before one is tokenised: what is wrong in the last must not
    wait. `on_block` is called before each block of questions that is tokenised, and may raise;
    `warn` is told why windows cannot be kept.

    Raises:
        JobError: if a window is longer than the model's positions reach; else as `load_dataset` and
            `build_windows`.
        DataError: if a question that is scored would also be tuned on; if no share of the training
            questions can be held out.
    """

    def load(one: QuestionSet) -> Dataset:
        return load_dataset(
            one.source,
            columns=one.columns or section.columns,
            unanswerable=section.unanswerable,
            on_bad_row=section.on_bad_row,
            no_answer=section.no_answer,
            sample=one.sample,
            seed=seed,
        )

    training = with_unique_ids({str(one.name): load(one) for one in section.trained})
    validation: dict[str, Dataset] = {}
    for one in section.scored:
        if (share := parse_share(one.source)) is None:
            validation[str(one.name)] = load(one)
        else:
            training, validation[str(one.name)] = hold_out(training, share, one.source, seed)
    tuning = None if section.tuning is None else load(QuestionSet(source=section.tuning))
    if tuning is not None:
        for name, key in _called("data.validation", validation):
            refuse_shared_questions(tuning, validation[name], key)
    trained, scored = (
        {name: _split(one, section, tokenizer, on_block, warn) for name, one in sets.items()}
        for sets in (training, validation)
    )
    tuned = None if tuning is None else _split(tuning, section, tokenizer, on_block, warn)
    found = LoadedSets(trained, scored, tuned)
    for part in found.named().values():
        longest = int(part.windows.lengths_N.max())
        if longest > tokenizer.model_max_length:
            raise JobError(
                [
                    f"data.max_length: {section.max_length} gives windows of {longest} tokens"
                    f" ({part.dataset.source}); this model takes {tokenizer.model_max_length}, by"
                    " max_position_embeddings in its config.json"
                ]
            )
    return found


def with_unique_ids(sets: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The same sets; ids that several have begin with the set's name. Hashes stay those of the
    files' content."""
    count = Counter(example.id for dataset in sets.values() for example in dataset.examples)

    def renamed(name: str, dataset: Dataset) -> Dataset:
        if all(count[example.id] == 1 for example in dataset.examples):
            return dataset
        examples = (
            replace(e, id=f"{name}:{e.id}") if count[e.id] > 1 else e for e in dataset.examples
        )
        return replace(dataset, examples=tuple(examples))

    return {name: renamed(name, dataset) for name, dataset in sets.items()}


def hold_out(
    training: Mapping[str, Dataset], share: float, called: str, seed: int
) -> tuple[dict[str, Dataset], Dataset]:
    """Take a share of each training set's questions out of it, by whole contexts: a context that is
    in several sets goes to one side in all of them.

    Args:
        training: the training sets, whose ids are unique.
        share: of the questions, between 0 and 1.
        called: what the job calls it, such as "10%".
        seed: decides which contexts.

    Returns:
        What is left of each set, and what was taken out, as one set.

    Raises:
        DataError: if nothing is left of a set.
    """
    held: set[str] = set()
    for dataset in training.values():
        questions = Counter(_context(example) for example in dataset.examples)
        missing = share * len(dataset.examples)
        for context in sorted(questions, key=lambda text: _drawn(text, seed)):
            if missing <= 0:
                break
            held.add(context)
            missing -= questions[context]
    left = {
        name: [e for e in dataset.examples if _context(e) not in held]
        for name, dataset in training.items()
    }
    for name, examples in left.items():
        if not examples:
            raise DataError(
                f"data.validation: {called} of {training[name].source} cannot be held out: too few"
                " texts for all questions about one to be on one side; name validation questions"
            )
    out = [e for part in training.values() for e in part.examples if _context(e) in held]
    source = f"{called} of {' + '.join(dataset.source for dataset in training.values())}"
    return {
        name: replace(training[name], examples=tuple(some), sha256=content_sha256(some))
        for name, some in left.items()
    }, Dataset(source, tuple(out), content_sha256(out), ())


def _context(example: Example) -> str:
    return " ".join(example.context.split())


def _drawn(context: str, seed: int) -> bytes:
    """Where a context stands in the order in which they are drawn."""
    return hashlib.sha256(f"{seed} {context}".encode()).digest()


def weighted_sets(section: Data, sets: LoadedSets) -> list[WeightedSet]:
    """The training sets as a sampler deals them; none where all weigh alike, once an epoch."""
    if all(one.weight == 1 for one in section.trained):
        return []
    found, first = [], 0
    for one, split in zip(section.trained, sets.training.values(), strict=True):
        found.append(WeightedSet(first, split.windows.questions_N, one.weight))
        first += len(split.windows)
    return found


def joined(parts: Sequence[Split]) -> Split:
    """Several sets as one, their questions and windows end to end."""
    if len(parts) == 1:
        return parts[0]
    arrays: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(Windows)}
    questions = tokens = characters = 0
    for number, part in enumerate(parts):
        moved = replace(
            part.windows,
            firsts_N1=part.windows.firsts_N1 + tokens,
            questions_N=(part.windows.questions_N + questions).astype(np.int32),
            chars_firsts_N=part.windows.chars_firsts_N + characters,
        )
        for name, found in arrays.items():
            found.append(continued(moved, name, first=number == 0))
        questions += len(part.dataset.examples)
        tokens += len(moved.tokens_T)
        characters += len(moved.chars_C2)
    windows = Windows(**{name: np.concatenate(found) for name, found in arrays.items()})
    examples = tuple(e for part in parts for e in part.dataset.examples)
    source = " + ".join(part.dataset.source for part in parts)
    digest = hashlib.sha256("".join(part.dataset.sha256 for part in parts).encode())
    dataset = Dataset(source, examples, digest.hexdigest(), ())
    return Split(dataset, windows, cached=all(part.cached for part in parts))


def read_as_lines(parts: Mapping[str, Split]) -> list[str]:
    """The format that each file was taken for; nothing of a set that is a share of another."""
    found = ((name, part.dataset.read_as) for name, part in parts.items())
    return [f"{name}: read as {words}" for name, words in found if words]


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


def refuse_shared_questions(tuning: Dataset, validation: Dataset, key: str) -> None:
    """Hold tuning and reported questions apart, by their texts: ids say nothing across files.

    Raises:
        DataError: naming the first question that is in both; `key` is what the job calls the
            validation set.
    """
    scored = {(e.question.strip(), e.context): e.id for e in validation.examples}
    shared = [e for e in tuning.examples if (e.question.strip(), e.context) in scored]
    if shared:
        first = shared[0]
        raise DataError(
            f"data.tuning: {len(shared)} of its {len(tuning.examples)} questions are also in"
            f" {key}, such as {first.id} (there"
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
