"""Small runs to be interrupted, the places where they are, and all that two runs must share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from runner.checkpoint.store import CheckpointStore
from runner.run.folder import RunDir, checkpoint_place
from runner.run.provenance import is_time
from runner.utils.tables import read_rows

DATA = Path(__file__).resolve().parents[1] / "jobs" / "data"
CONTEXT = "The lantern folds flat; its battery lasts nine hours on the bright setting."
# Six questions, for what comes below it.
SIX = """
name = "tiny"
[data]
train = "{data}/product_qa_train.json[:6]"
validation = "{data}/product_qa_validation.json[:6]"
max_length = 128
stride = 32
[model]
name = "{model}"
"""
_HEAD = """
name = "tiny"
[data]
train = "{data}/product_qa_train.json[:16]"
validation = "{data}/product_qa_validation.json[:8]"
max_length = 96
stride = 24
[model]
name = "{model}"
"""
JOB = (
    _HEAD
    + """freeze = ["embeddings"]
precision = "fp32"
[train]
epochs = 2
batch_size = 8
learning_rate = 1e-2
warmup = 0.3
weight_decay = 0.01
log_every = 3
[score]
batch_size = 8
[[probe]]
question = "How long does the battery last?"
context = "{context}"
answer = "nine hours"
{extra}
"""
)
# The same with as few steps as have all places in them: 6 an epoch, the last a short one, and rows
# of train.csv after the 5th and 6th.
SMALL_JOB = (
    JOB.replace("train.json[:16]", "train.json[:4]")
    .replace("validation.json[:8]", "validation.json[:4]")
    .replace("log_every = 3", "log_every = 5")
)
# Three epochs of 4 steps, the last of each a short one; rows of train.csv after the 3rd and 4th. A
# fault at FAULT, in epoch 2, has the checkpoint after SCORED behind it and no row at its own step.
SCORED, FAULT, STEPS = 4, 6, 12
FAULT_JOB = (
    _HEAD.replace("train.json[:16]", "train.json[:2]").replace("[:8]", "[:1]")
    + """precision = "fp32"
[train]
epochs = 3
batch_size = 6
learning_rate = 1e-2
log_every = 3
"""
)
# What follows the slices in a job that may answer nothing.
MAY_ANSWER_NOTHING = """unanswerable = true
max_length = 100
stride = 16
[score]
max_answer_length = 6
null_threshold = 3.0
[model]
name = "{model}"
"""
# Does something on a rank when it is about to take a step.
AT_STEP = """
import os, signal, sys, time
import torch
import runner.train.trainer
step_taken = runner.train.trainer.take_step
def take_step(engine, step):
    if step == {step} and rank == {rank}:
        {what}
    step_taken(engine, step)
runner.train.trainer.take_step = take_step
"""
# Stops a rank, as SIGUSR2 does, when it has done so many steps; the ranks agree one step later.
STOP = """
import runner.train.trainer, runner.utils.signals
step_taken = runner.train.trainer.take_step
def take_step(engine, step):
    step_taken(engine, step)
    if step == {step} and {rank} in (rank, -1):
        runner.utils.signals.request_stop("SIGUSR2")
runner.train.trainer.take_step = take_step
"""
# Stops every rank in its evaluation after epoch 1.
STOP_SCORING = """
import runner.train.trainer, runner.utils.signals
read = runner.train.trainer.predict_windows
def read_windows(*arguments, **options):
    if options.get("step"):
        runner.utils.signals.request_stop("SIGTERM")
    return read(*arguments, **options)
runner.train.trainer.predict_windows = read_windows
"""
# Stops every rank right after its first evaluation was committed.
STOP_SCORED = """
import runner.checkpoint.manager, runner.utils.signals
save = runner.checkpoint.manager.CheckpointManager.save
def save_and_stop(self, memory, best=None, *, required=False):
    whole = save(self, memory, best, required=required)
    if memory.scored:
        runner.utils.signals.request_stop("SIGUSR1")
    return whole
runner.checkpoint.manager.CheckpointManager.save = save_and_stop
"""
# Dropout from torch's generators, which go on from pass to pass; else it is a function of the place
# in training, and a resumed run would repeat it without any state.
TORCH_DROPOUT = """
import runner.train.plan, runner.model.dropout
runner.train.plan.install_dropout = lambda model, noise: 0
restart = runner.model.dropout.DropoutMasks.reseed
runner.model.dropout.DropoutMasks.reseed = lambda self, *place: None if place else restart(self)
"""
PLACES = ("mid-epoch", "epoch edge", "warm-up", "last step", "scoring", "scored")


def place(name: str, steps: int) -> str:
    """Code that stops a run of `steps` steps in 2 epochs at a place."""
    if name in ("scoring", "scored"):
        return STOP_SCORING if name == "scoring" else STOP_SCORED
    return STOP.format(step=_asked_at(name, steps), rank=0 if name == "mid-epoch" else -1)


def saved_at(name: str, steps: int, ranks: int) -> int:
    """The step of the checkpoint that a run leaves which was stopped there. Several ranks agree one
    step after they were asked; what comes with an evaluation is agreed on at the next step."""
    if name in ("scoring", "scored"):
        return steps // 2 + (ranks if name == "scored" else 0)
    return _asked_at(name, steps) + (ranks > 1)


def _asked_at(name: str, steps: int) -> int:
    by_name = {"mid-epoch": 2 * steps // 7, "epoch edge": steps // 2 - 1, "warm-up": 2}
    return by_name.get(name, steps - 1)


def outcome(folder: Path) -> dict[str, object]:
    """All that two runs must share: the hashes of weights and answers, scores, and every cell of
    the tables that does not tell of time."""
    run = RunDir(folder)
    result = json.loads(run.result.read_text())
    tables = {
        path.name: [{k: v for k, v in row.items() if not is_time(k)} for row in read_rows(path)]
        for path in run.tables
    }
    return {
        "weights": hashlib.sha256((run.model / "model.safetensors").read_bytes()).hexdigest(),
        "predictions": [hashlib.sha256(path.read_bytes()).hexdigest() for path in run.answer_files],
        "metrics": result["metrics"],
        "sets": result.get("sets"),
        "epoch": result["epoch"],
        "step": result["step"],
        **tables,
    }


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def steps_of(folder: Path) -> int:
    """Rows of train.csv that are there already."""
    try:
        return len((folder / "train.csv").read_text().splitlines()) - 1
    except FileNotFoundError:
        return 0


def at_step(step: int, rank: int, what: str) -> str:
    return AT_STEP.format(step=step, rank=rank, what=what)


def intact(folder: Path) -> list[int]:
    """Steps of the run's checkpoints, each of which must be whole."""
    store = CheckpointStore(RunDir(folder).checkpoints, 0)
    names = [path.name for path in store.folder.iterdir() if checkpoint_place(path.name)]
    for name in names:
        manifest = store.manifest(name)
        store.check(manifest, manifest.files)
    return sorted(checkpoint_place(name)[0] for name in names)
