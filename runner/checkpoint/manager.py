"""What a run's checkpoint holds, saving it, and going on from one to the bit.

A checkpoint holds DeepSpeed's shards, `rank-0000.pt` of each rank (generators of random numbers,
sums since the last row of train.csv), the tables as they were, and, at the best evaluation so far,
`best/` with the exported model. Its manifest says where training stood and what it belongs to.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError

from runner.checkpoint import commit
from runner.checkpoint.best import BestEvaluation, load_best
from runner.checkpoint.deepspeed_io import StoreCheckpointEngine, load_tensors
from runner.checkpoint.files import Writer
from runner.checkpoint.store import CheckpointStore, DamagedError, Manifest, Stage
from runner.distributed.collectives import all_gather
from runner.errors import DataError, StorageError
from runner.job.load import first_difference
from runner.job.schema import Job
from runner.run.folder import RunDir, checkpoint_name
from runner.run.lease import Lease
from runner.utils.disk import room
from runner.utils.files import is_there, storage_errors
from runner.utils.ranks import Rank

BEST = "best"  # the folder that the best evaluation so far leaves in its checkpoint

TRIES = 3  # checkpoints in a row that may fail before training ends

# How to say that what a checkpoint belongs to is another than now's.
_IDENTITY = {
    "world": "was made by {} ranks, this start has {}; start it with as many",
    "zero_stage": "was made with ZeRO stage {}, this start has {}",
    "layout": "was made with {} micro-batches a step, this start has {}",
    "precision": "was made in {}, this start computes in {}",
    "computing": "was computed with {}; this start computes with {}",
    "train": "was trained on other questions: the content of data.train has changed, or a weight",
    "validation": "was scored on other questions: the content of data.validation has changed",
    "tuning": "was tuned on other questions: the content of data.tuning has changed",
    "labels": "was trained on labels by another rule: an answer was {}, now it is {}; go on with"
    " the version that made it",
    "windows": "was trained on other windows: the tokenizer or its library has changed",
    "model": "began with other weights: the files of model.name have changed",
    "job": "belongs to another job: {}",
}

# What checkpoints from before a key was noted have there.
_BEFORE = {
    "labels": "the tokens up to the first that ends at or after its last character",
    "job": None,
}

# Names in a job that may change with the place where its files are: what they hold is compared.
_BY_CONTENT = {
    *(("data", part) for part in ("train", "validation", "tuning")),
    *(("model", key) for key in ("name", "revision")),
}

_READ = ("train", "validation", "tuning", "windows", "model")  # of these, what each rank reads


class RunState(Protocol):
    """What a run remembers beside weights and optimiser, as far as its checkpoints know it."""

    best: str | None
    scored: bool

    @property
    def step(self) -> int:
        """Optimiser steps that are done."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is alike on every rank, as JSON; its key "best" is `best`."""
        ...

    def rank_state_dict(self) -> dict[str, Any]:
        """What is this rank's own: tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Take back what the two gave."""
        ...


class CheckpointManager:
    """The checkpoints of a run, as one rank of a start sees them.

    Args:
        run: the run folder.
        number: of the start.
        lease: on the run folder, on rank 0.
        rank: this one.
        engine: DeepSpeed's; from now on it saves through us.
        identity: what a checkpoint must share with this start, by the keys of `_IDENTITY`.
        warn: takes a line for the user, on rank 0.
    """

    def __init__(
        self,
        run: RunDir,
        number: int,
        lease: Lease | None,
        rank: Rank,
        engine: Any,
        identity: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._run, self._number, self._lease, self._rank = run, number, lease, rank
        self._engine, self._identity, self._warn = engine, identity, warn
        self._fence = lease.verify if lease else lambda: None
        self._store = CheckpointStore(run.checkpoints, rank.index, fence=self._fence)
        self._ranks = commit.Ranks(rank.index, all_gather)
        self._shards = StoreCheckpointEngine(self._store)
        engine.checkpoint_engine = self._shards
        self._saved: tuple[int, bool] | None = None  # step and scored of the newest one
        self._failed = 0

    # --- saving

    def save(
        self,
        state: RunState,
        best: Callable[[Stage], None] | None = None,
        *,
        required: bool = False,
    ) -> bool:
        """Commit a checkpoint and remove those that are no longer needed. Every rank must call
        this.

        Args:
            state: what to save beside weights and optimiser.
            best: on every rank if this is the best evaluation so far: writes `best/` on rank 0.
            required: whether training cannot go on without this one.

        Returns:
            Whether all is saved now.

        Raises:
            StorageError: if it cannot be written, and is required or the third in a row; else only
                a warning is given, and the checkpoints before it stay.
        """
        if self._saved == (state.step, state.scored):
            return True
        name = checkpoint_name(state.step, self._number, scored=state.scored)
        before, state.best = state.best, name if best else state.best
        facts = {"memory": state.state_dict(), "step": state.step, "identity": self._identity}
        try:
            commit.agree(self._ranks, self._shards.prepare)
            write = partial(self._write, state, best)
            commit.save(self._store, self._ranks, name, write, facts)
        except StorageError as error:
            state.best = before
            self._failed += 1
            free, advice = self._if_full(str(error))
            text = f"{error}{free}; checkpoints from before are untouched"
            if required or self._failed >= TRIES:
                raise StorageError(f"{text}; {advice}start the same command again") from None
            self._warn(f"no checkpoint after step {state.step}: {text}; training goes on")
            return False
        self._saved, self._failed = (state.step, state.scored), 0
        self._rotate(state.step, state.best)
        return True

    def _write(self, state: RunState, best: Callable[[Stage], None] | None, stage: Stage) -> None:
        self._shards.write(self._engine, stage)
        mine = state.rank_state_dict()
        stage.put(_rank_file(self._rank.index), lambda file: torch.save(mine, file))  # type: ignore[arg-type]
        if not self._rank.is_main:
            return
        for table in self._run.tables:
            if is_there(table):
                stage.put(f"tables/{table.name}", partial(_copy, table.read_bytes()))
        if best is not None:
            best(stage)
            stage.adopt(BEST)

    def _rotate(self, step: int, best: str | None) -> None:
        if self._lease is None:
            return
        self._lease.step = step
        try:
            commit.rotate(self._store, self._lease, best, _best_of)
        except OSError as error:
            self._warn(f"old checkpoints stay: {error.filename}: {error.strerror}")
        except (DataError, StorageError) as error:
            self._warn(f"old checkpoints stay: {error}")

    def _if_full(self, failures: str) -> tuple[str, str]:
        """What is free in the run folder, and the advice to free some, if it is there that a rank
        found no room."""
        if str(self._run.checkpoints) not in failures:
            return "", ""
        if os.strerror(errno.ENOSPC) in failures:
            return f"; {room(self._run.path, unit='')}", "free some space and "
        return "", "free some space and " if os.strerror(errno.EDQUOT) in failures else ""

    # --- loading

    def load(self, state: RunState, *, needs_best: bool) -> Manifest | None:
        """Go on from the newest checkpoint that is whole: weights, optimiser, schedule, tables,
        state. Every rank must call this.

        Args:
            state: is given what was saved.
            needs_best: whether the best evaluation so far must be at hand too.

        Returns:
            The checkpoint; None if there is none, and training begins at the first step.

        Raises:
            DataError: if there are checkpoints that cannot be used, saying why.
            StorageError: if they cannot be read now; none is touched.
        """
        mine = {key: self._identity[key] for key in _READ}
        if any(theirs != mine for theirs in self._ranks.all_gather(mine)):
            raise DataError(
                f"{self._run.path}: the ranks have read different data or weights: the files"
                " changed while they were read; start the same command again"
            )
        names = commit.adopt_checkpoints(self._store, self._ranks, self._lease)
        examine = partial(self._examine, needs_best)
        manifest = commit.newest(self._store, self._ranks, names, examine, self._warn)
        if manifest is None:
            self._begin_tables(None)
            self._note_resumed_step(0)
            return None
        self._shards.read(self._engine, manifest)
        rank_state = load_tensors(self._store.folder / manifest.name / _rank_file(self._rank.index))
        if len(set(self._ranks.all_gather(self._digest(manifest)))) > 1:
            raise DataError(f"{manifest.name}: the ranks have loaded different states of it")
        self._begin_tables(manifest)
        step = manifest.facts["step"]
        self._note_resumed_step(step)
        self._rotate(step, _best_of(manifest))  # an earlier start may have been cut short before
        # Last of all: the generators of random numbers are in it.
        state.load_state_dict(manifest.facts["memory"], rank_state)
        self._saved = (state.step, state.scored)
        return manifest

    def load_best(self, state: RunState) -> BestEvaluation | None:
        """The best evaluation so far, read back (rank 0); None if there is none, or if it is
        damaged and the next evaluation takes its place anyway."""
        try:
            return load_best(self.best_folder(state)) if state.best else None
        except DataError:
            return None

    def best_folder(self, state: RunState) -> Path:
        """`best/` of the best evaluation so far (rank 0)."""
        return self._store.folder / (state.best or "") / BEST

    def _examine(self, needs_best: bool, manifest: Manifest) -> None:
        """Hold a checkpoint against this start; raises DataError for what no other one will have
        either, DamagedError for what one before it may have whole."""
        written = _BEFORE | manifest.facts["identity"]
        if set(written) != set(self._identity):
            raise DataError(
                f"{self._run.path}: checkpoint {manifest.name} was made by another version of"
                " spantune, which noted other things; go on with that one, or begin anew with"
                " --restart"
            )
        for key, sentence in _IDENTITY.items():
            then, now = written[key], self._identity[key]
            if key == "job":
                then, now = _job_difference(then, now), None
            if then != now:
                raise DataError(
                    f"{self._run.path}: checkpoint {manifest.name} {sentence.format(then, now)},"
                    " or begin anew with --restart"
                )
        best = _best_of(manifest)
        if self._rank.is_main and best not in (None, manifest.name):
            try:
                holder = self._store.manifest(best)
                self._store.check(holder, [f for f in holder.files if f.startswith(f"{BEST}/")])
            except DamagedError as error:
                if needs_best:
                    raise DataError(
                        f"{error}; it holds the best weights so far, which [stop] needs; --restart"
                        " begins anew"
                    ) from None

    def _digest(self, manifest: Manifest) -> str:
        """What must be alike on all ranks after loading."""
        digest = hashlib.sha256(manifest.name.encode())
        for name, entry in manifest.files.items():
            digest.update(f"{name} {entry.sha256}".encode())
        if not any(hasattr(p, "ds_tensor") for p in self._engine.module.parameters()):
            for tensor in self._engine.module.state_dict().values():
                digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _begin_tables(self, manifest: Manifest | None) -> None:
        """Let the tables be as they were at the checkpoint; rows that came after it come again."""
        if self._lease is None:
            return
        for table in self._run.tables:
            name = f"tables/{table.name}"
            with storage_errors(table):
                if manifest is not None and name in manifest.files:
                    aside = table.with_name(f".{table.name}.tmp")
                    shutil.copyfile(self._store.folder / manifest.name / name, aside)
                    self._fence()
                    aside.replace(table)
                else:
                    self._fence()
                    table.unlink(missing_ok=True)

    def _note_resumed_step(self, step: int) -> None:
        if self._lease is not None:
            self._lease.note_resumed_step(step)


def _copy(content: bytes, file: Writer) -> None:
    file.write(content)


def _job_difference(then: Any, now: Any) -> str | None:
    """What differs between two dumps of jobs; a key that the older lacks has its default there."""
    try:
        return first_difference(Job.model_validate(then), Job.model_validate(now), _BY_CONTENT)
    except ValidationError:
        return "another version of spantune wrote it"


def _best_of(manifest: Manifest) -> str | None:
    """The checkpoint that held the best weights when this one was made."""
    return manifest.facts["memory"]["best"]


def _rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.pt"
