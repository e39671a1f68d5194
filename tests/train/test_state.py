"""What is remembered beside weights and optimiser comes back to the bit."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from runner.job.schema import Stop
from runner.train.state import (
    EarlyStopping,
    Totals,
    TrainState,
    compute_strictly,
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


def test_strict_computing_fills_no_memory_that_is_written_next(monkeypatch):
    """On a GPU each would be a kernel more."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # what is set here ends with the test
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        compute_strictly()
        assert torch.are_deterministic_algorithms_enabled()
        with torch.profiler.profile() as seen:
            torch.empty(8)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [event.name for event in seen.events()] == ["aten::empty"]


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


def new_state() -> TrainState:
    return TrainState(CPU, 20, EarlyStopping(Stop(metric="f1")), PhaseTimer())


def some_state() -> TrainState:
    state = new_state()
    state.epoch, state.done = 3, 7
    state.sums_2 = torch.tensor([0.1, 3.0])
    state.totals = Totals(0.1 + 0.2, 5.0, 40.0, 4000.0, 4100.0, 1.5)
    state.since_row = Totals(windows=4, tokens=400, slots=410, seconds=0.25)
    return state


def test_the_state_of_training_comes_back(tmp_path):
    state = some_state()
    state.early_stopping.best, state.early_stopping.waited = 1 / 3, 1
    state.probe_rows.append({"epoch": 0, "answer": "é", "score": 0.1, "expected": None})
    state.best = "step-000040-scored-a0001"
    path = tmp_path / "rank.pt"
    torch.save(state.rank_state_dict(), path)
    written = json.loads(json.dumps(state.state_dict()))
    first = draw()

    other = new_state()
    other.load_state_dict(written, torch.load(path, weights_only=True))
    assert draw() == first  # the generators of random numbers too
    assert other.sums_2.equal(state.sums_2)
    assert other.state_dict()["progress"] == state.state_dict()["progress"]
    assert other.since_row == state.since_row
    assert vars(other.early_stopping) == vars(state.early_stopping)
    assert other.probe_rows == state.probe_rows
    assert other.best == state.best
    assert other.step == 47


def test_the_keys_of_a_checkpoint_stay():
    """A new name for one would refuse every open run."""
    state = some_state()
    assert list(state.state_dict()) == ["progress", "stopper", "seconds", "probe_rows", "best"]
    assert list(state.state_dict()["progress"]) == ["epoch", "done", "scored", "over", "totals"]
    assert list(state.rank_state_dict()) == ["random", "progress"]
    assert list(state.rank_state_dict()["progress"]) == ["mine", "sums_2"]


def test_a_row_moves_the_sums_into_the_epoch(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    state = some_state()
    row = state.reduce()
    assert row == Totals(pytest.approx(0.1), 3.0, 4.0, 400.0, 410.0, 0.25)
    whole = Totals(0.1 + 0.2 + row.loss, 8.0, 44.0, 4400.0, 4510.0, 1.75)
    assert state.totals == whole
    assert state.since_row == Totals()
    assert state.sums_2.tolist() == [0.0, 0.0]


def test_the_next_epoch_begins_empty():
    state = some_state()
    state.done, state.scored = 20, True
    state.next_epoch()
    assert (state.epoch, state.done, state.scored, state.step) == (4, 0, False, 60)
    assert state.totals == state.since_row == Totals()
    assert state.sums_2.tolist() == [0.0, 0.0]
