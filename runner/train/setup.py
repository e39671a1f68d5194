"""Loads all that a rank trains with: questions and windows, the model, DeepSpeed's engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from runner.data.dataset import Example
from runner.data.sampler import score_batches
from runner.data.splits import Split, load_splits, probe_examples
from runner.data.windows import Windows, build_windows
from runner.distributed.collectives import all_gather, broadcast, main_first
from runner.distributed.engine import deepspeed_config, start_engine
from runner.distributed.failures import leave_if_asked, stop_if_asked
from runner.distributed.gradient_exchange import SharedMemoryExchange
from runner.distributed.watchdog import Watchdog
from runner.errors import StorageError
from runner.job.schema import BatchLayout, Job, Model, batch_layout
from runner.model.dropout import DropoutMasks
from runner.model.forward import SpanModel, fill_cache
from runner.model.freeze import freeze, optimiser_groups, parameter_table
from runner.model.frozen import FrozenLayers, allocate
from runner.model.load import ModelFiles, choose_precision, load_pretrained, load_tokenizer
from runner.model.loss import SpanLoss, choose_span_loss
from runner.run.folder import RunDir
from runner.train.plan import ExecutionPlan, choose_plan
from runner.train.run_log import announcement
from runner.train.state import seed_everything
from runner.utils.ranks import Rank
from runner.utils.tables import CellValue
from runner.utils.timing import PhaseTimer


@dataclass(frozen=True)
class Session:
    """What a rank trains with.

    Attributes:
        tokenizer: as `load_tokenizer` gives it.
        training, validation: questions and their windows.
        tuning: questions on which the null threshold is tuned; None: it is not.
        probes, probe_windows: the job's probes, spelt as questions.
        layout: how a step's windows are spread over ranks.
        files: where the model came from.
        parameters: rows of the table of trained and frozen parameters, all of them last.
        precision: "bf16", "fp16" or "fp32".
        config: DeepSpeed's configuration.
        total_steps: optimiser steps of all epochs.
        computing: how the run computes.
        span_loss: which implementation of the loss.
        engine: DeepSpeed's, around the model.
        model: the engine and how it is fed.
        kept: lines for the log on frozen layers' outputs that are kept.
    """

    tokenizer: PreTrainedTokenizerBase
    training: Split
    validation: Split
    tuning: Split | None
    probes: Sequence[Example]
    probe_windows: Windows
    layout: BatchLayout
    files: ModelFiles
    parameters: Sequence[dict[str, CellValue]]
    precision: str
    config: dict[str, Any]
    total_steps: int
    computing: ExecutionPlan
    span_loss: SpanLoss
    engine: Any
    model: SpanModel
    kept: Sequence[str]

    def described(self, job: Job) -> Iterator[str]:
        """What is about to happen, line by line."""
        yield from announcement(
            job,
            self.training,
            self.validation,
            self.tuning,
            self.parameters[-1],
            self.precision,
            self.layout,
        )
        yield self.span_loss.described()
        yield from self.computing.described()
        if getattr(self.engine.optimizer, "exchanged_by", "") == SharedMemoryExchange.kind:
            yield "exchange: shared memory (all ranks are on CPUs of one machine)"
        yield from self.kept


def build_session(
    job: Job, run: RunDir, rank: Rank, device: torch.device, clock: PhaseTimer, watch: Watchdog
) -> Session:
    """Load everything on this rank; all ranks call it together.

    Raises:
        RunnerError: of the kind that says what is wrong with data, model or settings.
    """
    layout = batch_layout(job.train, rank.world)

    def between() -> None:
        """Between two blocks of questions, or two batches, of which there may be many."""
        watch.progress_at(watch.place, bounded=False)
        leave_if_asked(run)

    watch.progress_at("reading the data", bounded=False)
    with clock("data"):
        files, tokenizer = main_first(rank, lambda: _files_and_tokenizer(job.model))
        training, validation, tuning = main_first(
            rank, lambda: load_splits(job.data, job.seed, tokenizer, between)
        )
        probes = probe_examples(job.probe)
        probe_windows = build_windows(probes, tokenizer, job.data.max_length, job.data.stride)
        sets = [part.windows for part in (training, validation, tuning) if part is not None]
    stop_if_asked(run)
    watch.progress_at("loading the model", bounded=False)
    with clock("model"):
        model = main_first(rank, lambda: load_pretrained(files, job.seed))
        freeze(model, job.model.freeze)
        parameters = parameter_table(model)
        precision = choose_precision(job.model.precision, device)
        trained = int(str(parameters[-1]["trained"]))
        config = deepspeed_config(job.zero, job.train, layout, precision, trained)
        total_steps = -(-len(training.windows) // job.train.batch_size) * job.train.epochs
        # From here on each rank draws its own dropout.
        seed_everything(job.seed * 1_000_003 + rank.index)
        computing = choose_plan(
            job.model,
            job.zero,
            model,
            device,
            precision,
            longest=max(int(windows.lengths_N.max()) for windows in sets),
            tokens=len(training.windows.tokens_T) * job.train.epochs,
            noise=DropoutMasks(job.seed, rank.index),
        )
        groups = optimiser_groups(model, job.train.weight_decay)
        span_loss = choose_span_loss(job.model.span_loss, model, device, job.zero.stage)
        engine = start_engine(
            model, device, groups, job.train, config, total_steps, computing.optimiser
        )
    stop_if_asked(run)
    span_model = SpanModel.of(engine, tokenizer, device, computing.packing, sets)
    watch.progress_at("computing the frozen layers", bounded=False)
    with clock("frozen"):
        span_model, kept = cache_frozen_layers(
            span_model, computing.trunk, sets, job.score.batch_size, run.path, rank, between
        )
    return Session(
        tokenizer=tokenizer,
        training=training,
        validation=validation,
        tuning=tuning,
        probes=probes,
        probe_windows=probe_windows,
        layout=layout,
        files=files,
        parameters=parameters,
        precision=precision,
        config=config,
        total_steps=total_steps,
        computing=computing,
        span_loss=span_loss,
        engine=engine,
        model=span_model,
        kept=kept,
    )


def _files_and_tokenizer(section: Model) -> tuple[ModelFiles, PreTrainedTokenizerBase]:
    files = ModelFiles.locate(section)
    return files, load_tokenizer(files)


def cache_frozen_layers(
    model: SpanModel,
    trunk: FrozenLayers | None,
    sets: Sequence[Windows],
    batch_size: int,
    folder: Path,
    rank: Rank,
    between: Callable[[], None] = lambda: None,
) -> tuple[SpanModel, list[str]]:
    """Compute the trunk's outputs for whole data sets. Every rank must call this.

    They depend on the weights and on the data sets alone, so that a resumed run, which computes
    them anew, goes on with the same numbers.

    Args:
        model: runs the engine.
        trunk: whose outputs are kept; None keeps nothing.
        sets: training and validation windows.
        batch_size: windows per forward pass.
        folder: where a file may be, should memory not do.
        rank: this one.
        between: called before each of this rank's batches; it may raise.

    Returns:
        A model that begins above the frozen layers with these windows, and lines for the log.

    Raises:
        StorageError: if there is no room. Going on without would be another training: with dropout.
    """
    if trunk is None:
        return model, []
    began = time.monotonic()
    dtype = next(trunk.base.parameters()).dtype
    model = dataclasses.replace(model, frozen=trunk)
    caches = []
    for windows in sets:
        width = trunk.base.config.hidden_size
        size = len(windows.tokens_T) * width * dtype.itemsize / 2**30
        device = model.loader.device
        cache = allocate(windows, width, dtype, device, folder, rank, broadcast, all_gather)
        if cache is None:
            raise StorageError(
                f"model.cache_frozen: {size:.1f} GiB of frozen layers' outputs fit neither into"
                f" free memory nor below {folder}; set it to false, or train on fewer questions"
            )
        mine = score_batches(windows.lengths_N, batch_size, rank.local, rank.local_world)
        fill_cache(model, cache, _asking(mine, between))
        all_gather(None)  # the windows of one rank are read by others
        caches.append((cache, size))
    held = ", ".join(f"{size:.2f} GiB in {cache.place}" for cache, size in caches)
    line = f"outputs of frozen layers: {held}, computed in {time.monotonic() - began:.1f} s"
    return dataclasses.replace(model, hidden_caches=tuple(cache for cache, _ in caches)), [line]


def _asking(batches: Iterable[np.ndarray], between: Callable[[], None]) -> Iterator[np.ndarray]:
    for rows in batches:
        between()
        yield rows
