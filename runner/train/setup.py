"""Builds all that a rank trains with: questions and windows, the model, DeepSpeed's engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from runner.checkpoint.store import CheckpointStore, DamagedError
from runner.data.dataset import Example
from runner.data.sampler import TrainSampler, score_batches
from runner.data.splits import (
    LoadedSets,
    Split,
    joined,
    load_splits,
    probe_examples,
    weighted_sets,
)
from runner.data.windows import Windows, build_windows
from runner.distributed.collectives import all_gather, broadcast, main_first
from runner.distributed.engine import deepspeed_config, start_engine
from runner.distributed.failures import leave_if_asked, stop_if_asked
from runner.distributed.gradient_exchange import SharedMemoryExchange
from runner.distributed.watchdog import Watchdog
from runner.errors import StorageError
from runner.eval.caveats import caveats
from runner.job.schema import Job, Model, batch_layout
from runner.model.dropout import DropoutMasks
from runner.model.forward import SpanModel, fill_cache, pad_token, takes_segment_ids
from runner.model.freeze import freeze, optimiser_groups, parameter_table
from runner.model.frozen import FrozenLayers, allocate
from runner.model.load import (
    ModelFiles,
    check_forward,
    choose_precision,
    load_pretrained,
    load_tokenizer,
    padding_notes,
)
from runner.model.loss import SpanLoss, choose_span_loss
from runner.run.folder import RunDir
from runner.train.plan import ExecutionPlan, choose_plan, compare_packing, was_packed
from runner.train.state import seed_everything
from runner.utils.ranks import Rank
from runner.utils.tables import CellValue
from runner.utils.timing import PhaseTimer


@dataclass(frozen=True)
class Splits:
    """The questions of a run, with their windows.

    Attributes:
        sets: all that the job names.
        training: the training sets as one.
        probes, probe_windows: the job's probes, spelt as questions.
    """

    sets: LoadedSets
    training: Split
    probes: Sequence[Example]
    probe_windows: Windows

    @property
    def validation(self) -> Split:
        """The validation set that decides."""
        return next(iter(self.sets.validation.values()))

    def windows(self) -> list[Windows]:
        """Of all that the model reads."""
        tuning = () if self.sets.tuning is None else (self.sets.tuning,)
        return [s.windows for s in (self.training, *self.sets.validation.values(), *tuning)]

    def longest(self) -> int:
        """Tokens of the longest of these."""
        return max(int(windows.lengths_N.max()) for windows in self.windows())


@dataclass(frozen=True)
class Session:
    """What a rank trains with.

    Attributes:
        job, run, rank, device: of this process.
        splits: questions and windows.
        sampler: deals training windows to steps and passes.
        tokenizer: as `load_tokenizer` gives it.
        files: where the model came from.
        parameters: rows of the table of trained and frozen parameters, all of them last.
        precision: "bf16", "fp16" or "fp32".
        config: DeepSpeed's configuration.
        plan: how the run computes.
        span_loss: which implementation of the loss.
        engine: DeepSpeed's, around the model.
        model: the engine and how it is fed.
        notes: lines for the log: on converted weights, on windows that could not be kept, on frozen
            layers' outputs.
        caveats: what keeps the scores from meaning what they seem to, on rank 0.
    """

    job: Job
    run: RunDir
    rank: Rank
    device: torch.device
    splits: Splits
    sampler: TrainSampler
    tokenizer: PreTrainedTokenizerBase
    files: ModelFiles
    parameters: Sequence[dict[str, CellValue]]
    precision: str
    config: dict[str, Any]
    plan: ExecutionPlan
    span_loss: SpanLoss
    engine: Any
    model: SpanModel
    notes: Sequence[str]
    caveats: Sequence[str]

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all epochs."""
        return self.sampler.steps * self.job.train.epochs

    @property
    def exchanges_by_memory(self) -> bool:
        """Whether ranks exchange gradients through memory that they share."""
        return getattr(self.engine.optimizer, "exchanged_by", "") == SharedMemoryExchange.kind


def build_session(
    job: Job, run: RunDir, rank: Rank, device: torch.device, timer: PhaseTimer, watchdog: Watchdog
) -> Session:
    """Load everything on this rank; all ranks call it together.

    Raises:
        RunnerError: of the kind that says what is wrong with data, model or settings.
    """
    on_block = partial(_on_block, watchdog, run)
    warnings: list[str] = []
    watchdog.progress_at("reading the data", bounded=False)
    with timer("data"):
        files, tokenizer = main_first(rank, lambda: _files_and_tokenizer(job.model))
        splits = _load_data(job, tokenizer, rank, on_block, warnings.append)
        sets = splits.sets
        doubts = caveats(sets.named(), job.score, trained=sets.trained()) if rank.is_main else []
    stop_if_asked(run)
    watchdog.progress_at("loading the model", bounded=False)
    with timer("model"):
        layout = batch_layout(job.train, rank.world)
        lengths_N, weighted = splits.training.windows.lengths_N, weighted_sets(job.data, sets)
        sampler = TrainSampler(lengths_N, job.train, layout, job.seed, rank.index, weighted)
        model = main_first(rank, lambda: load_pretrained(files, job.seed))
        check_forward(model, tokenizer, job.model.name, training=True)
        files.notes.extend(padding_notes(model, tokenizer))
        freeze(model, job.model.freeze)
        parameters = parameter_table(model)
        precision = choose_precision(job.model.precision, device)
        trained = int(str(parameters[-1]["trained"]))
        config = deepspeed_config(job.zero, job.train, layout, precision, trained)
        # From here on each rank draws its own dropout.
        seed_everything(job.seed * 1_000_003 + rank.index)
        plan = _plan(job, run, model, tokenizer, splits, sampler, rank, device, precision)
        span_loss = choose_span_loss(job.model.span_loss, model, device, job.zero.stage)
        groups = optimiser_groups(model, job.train.weight_decay)
        steps = sampler.steps * job.train.epochs
        engine = start_engine(
            model, device, groups, job.train, config, steps, plan.optimiser, job.zero.deepspeed
        )
    stop_if_asked(run)
    watchdog.progress_at("computing the frozen layers", bounded=False)
    with timer("model" if plan.frozen is None else "frozen"):
        windows, size = splits.windows(), job.score.batch_size
        span_model = SpanModel.of(engine, tokenizer, device, plan.packing, windows)
        span_model, notes = cache_frozen_layers(
            span_model, plan.frozen, windows, size, run.path, rank, on_block
        )
    return Session(
        job, run, rank, device, splits, sampler, tokenizer, files, parameters, precision, config,
        plan, span_loss, engine, span_model,
        [*dict.fromkeys([*files.notes, *warnings]), *notes], doubts,
    )  # fmt: skip


def _on_block(watchdog: Watchdog, run: RunDir) -> None:
    """Between two blocks of questions, or two batches, of which there may be many."""
    watchdog.progress_at(watchdog.place, bounded=False)
    leave_if_asked(run)


def _load_data(
    job: Job,
    tokenizer: PreTrainedTokenizerBase,
    rank: Rank,
    on_block: Callable[[], None],
    warn: Callable[[str], None],
) -> Splits:
    sets = main_first(rank, lambda: load_splits(job.data, job.seed, tokenizer, on_block, warn))
    probes = probe_examples(job.probe)
    windows = build_windows(probes, tokenizer, job.data.max_length, job.data.stride)
    return Splits(sets, joined([*sets.training.values()]), probes, windows)


def _plan(
    job: Job,
    run: RunDir,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    sampler: TrainSampler,
    rank: Rank,
    device: torch.device,
    precision: str,
) -> ExecutionPlan:
    def on_main(work: Callable[[], Any]) -> Any:
        """Do it on rank 0, for all: what it finds may hang on the machine or the library."""
        return broadcast(main_first(rank, lambda: work() if rank.is_main else None))

    training = splits.training.windows
    compare = partial(
        compare_packing,
        model,
        training,
        device,
        precision,
        pad_id=pad_token(tokenizer),
        segment_ids=takes_segment_ids(tokenizer),
    )
    return choose_plan(
        job.model,
        job.zero,
        model,
        device,
        precision,
        longest=splits.longest(),
        tokens=len(training.tokens_T) * sampler.windows // len(training) * job.train.epochs,
        dropout=DropoutMasks(job.seed, rank.index),
        recompute=job.train.gradient_checkpointing,
        compare=partial(on_main, compare),
        packed_before=on_main(partial(_packed_before, run)),
    )


def _packed_before(run: RunDir) -> bool | None:
    """How earlier starts of a run have decided, by its newest checkpoint whose manifest is whole;
    None where there is none."""
    store = CheckpointStore(run.checkpoints, 0)
    for name in store.names(1, ()):
        try:
            return was_packed(store.manifest(name).facts["identity"]["computing"])
        except DamagedError:  # whoever loads it says so
            continue
    return None


def _files_and_tokenizer(section: Model) -> tuple[ModelFiles, PreTrainedTokenizerBase]:
    files = ModelFiles.locate(section)
    return files, load_tokenizer(files)


def cache_frozen_layers(
    model: SpanModel,
    frozen: FrozenLayers | None,
    data: Sequence[Windows],
    batch_size: int,
    folder: Path,
    rank: Rank,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[SpanModel, list[str]]:
    """Compute the frozen layers' outputs for whole data sets. Every rank must call this.

    They depend on the weights and on the data sets alone, so that a resumed run, which computes
    them anew, goes on with the same numbers.

    Args:
        model: runs the engine.
        frozen: whose outputs are cached; None caches nothing.
        data: training and validation windows.
        batch_size: windows per forward pass.
        folder: where a file may be, should memory not do.
        rank: this one.
        on_batch: called before each of this rank's batches; it may raise.

    Returns:
        A model that begins above the frozen layers with these windows, and lines for the log.

    Raises:
        StorageError: if there is no room. Going on without would be another training: with dropout.
    """
    if frozen is None:
        return model, []
    began = time.monotonic()
    dtype = next(frozen.base.parameters()).dtype
    model = dataclasses.replace(model, frozen=frozen)
    caches = []
    for windows in data:
        width = frozen.base.config.hidden_size
        size = len(windows.tokens_T) * width * dtype.itemsize / 2**30
        device = model.loader.device
        cache = allocate(windows, width, dtype, device, folder, rank, broadcast, all_gather)
        if cache is None:
            raise StorageError(
                f"model.cache_frozen: {size:.1f} GiB of frozen layers' outputs fit neither into"
                f" free memory nor below {folder}; set it to false, or train on fewer questions"
            )
        mine = score_batches(windows.lengths_N, batch_size, rank.local, rank.local_world)
        fill_cache(model, cache, _telling(mine, on_batch))
        all_gather(None)  # the windows of one rank are read by others
        caches.append((cache, size))
    places = ", ".join(f"{size:.2f} GiB in {cache.place}" for cache, size in caches)
    line = f"outputs of frozen layers: {places}, computed in {time.monotonic() - began:.1f} s"
    return dataclasses.replace(model, hidden_caches=tuple(cache for cache, _ in caches)), [line]


def _telling(batches: Iterable[np.ndarray], on_batch: Callable[[], None]) -> Iterator[np.ndarray]:
    for rows in batches:
        on_batch()
        yield rows
