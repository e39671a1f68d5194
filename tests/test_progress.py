"""What is remembered beside weights and optimiser comes back to the bit."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

from runner.job.schema import Stop
from runner.train.state import (
    EarlyStopping,
    Memory,
    Progress,
    Totals,
    random_state,
    restore_random_state,
    seed_everything,
)
from runner.utils.timing import PhaseTimer

CPU = torch.device("cpu")


def draw() -> list[object]:
    """Numbers from every generator of this process."""
    return [
        *(random.random(), random.gauss(0, 1)),
        *(np.random.standard_normal(), np.random.rand()),
        *torch.rand(3).tolist(),
        *torch.nn.functional.dropout(torch.ones(20), 0.5).tolist(),
    ]


def test_every_generator_goes_on_where_it_was():
    seed_everything(7)
    draw()  # an odd number of normal numbers: the generators hold one back
    state = random_state(CPU)
    first = draw()
    seed_everything(8)
    assert draw() != first
    restore_random_state(state, CPU)
    assert draw() == first


def test_the_state_of_generators_is_plain_data(tmp_path):
    path = tmp_path / "state.pt"
    seed_everything(7)
    torch.save(random_state(CPU), path)
    first = draw()
    restore_random_state(torch.load(path, weights_only=True), CPU)
    assert draw() == first


def test_seeding_leads_every_generator():
    seed_everything(2**40)
    first = draw()
    seed_everything(2**40)
    assert draw() == first
    seed_everything(2**40 + 1)
    assert draw() != first


def some_progress() -> Progress:
    progress = Progress(torch.tensor([0.1, 3.0]), steps_per_epoch=20, epoch=3, done=7)
    progress.totals = Totals(0.1 + 0.2, 5.0, 40.0, 4000.0, 4100.0, 1.5)
    progress.mine = Totals(windows=4, tokens=400, slots=410, seconds=0.25)
    return progress


def test_a_memory_comes_back(tmp_path):
    memory = Memory(some_progress(), EarlyStopping(Stop(metric="f1")), PhaseTimer())
    memory.stopper.best, memory.stopper.waited = 1 / 3, 1
    memory.probe_rows.append({"epoch": 0, "answer": "é", "score": 0.1, "expected": None})
    memory.best = "step-000040-scored-a0001"
    path = tmp_path / "own.pt"
    torch.save(memory.progress.own(), path)
    facts = json.loads(json.dumps(memory.facts()))

    other = Memory(Progress(torch.zeros(2), 20), EarlyStopping(Stop(metric="f1")), PhaseTimer())
    other.restore(facts, torch.load(path, weights_only=True))
    assert other.progress.sums_2.equal(memory.progress.sums_2)
    assert other.progress.facts() == memory.progress.facts()
    assert other.progress.mine == memory.progress.mine
    assert vars(other.stopper) == vars(memory.stopper)
    assert other.probe_rows == memory.probe_rows
    assert other.best == memory.best
    assert other.progress.step == 47


def test_a_row_moves_the_sums_into_the_epoch():
    progress = some_progress()
    progress.start_row(Totals(1.0, 1.0, 8.0, 800.0, 820.0, 0.5))
    assert progress.totals == Totals(0.1 + 0.2 + 1.0, 6.0, 48.0, 4800.0, 4920.0, 2.0)
    assert progress.mine == Totals()
    assert progress.sums_2.tolist() == [0.0, 0.0]


def test_the_next_epoch_begins_empty():
    progress = some_progress()
    progress.done, progress.scored = 20, True
    progress.next_epoch()
    assert (progress.epoch, progress.done, progress.scored, progress.step) == (4, 0, False, 60)
    assert progress.totals == progress.mine == Totals()
    assert progress.sums_2.tolist() == [0.0, 0.0]
