"""The first step whose loss or gradients are no numbers is named, with its questions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from runner.errors import DivergedError
from runner.train.nan_monitor import NanMonitor
from runner.utils.ranks import Rank

IDS = [f"q{number}" for number in range(20)]
MODEL = torch.nn.Linear(2, 2)


def health(*, scaled: bool = False) -> NanMonitor:
    # Two windows of each question.
    return NanMonitor(Rank(0, 1, 0, 1), np.repeat(np.arange(20), 2), IDS, scaled=scaled)


def note(
    found: NanMonitor, step: int, loss: float, norm: float | None = 1.0, first: int = 0
) -> None:
    rows = np.arange(first, first + 4)
    found.record(step, rows[:2], torch.tensor(1.0))
    found.record(step, rows[2:], torch.tensor(loss))
    found.record_step(step, rows, None if norm is None else torch.tensor(norm))


def test_numbers_are_no_news():
    found = health()
    for step in (1, 2):
        note(found, step, 2.0)
        found.check_loss(6.0)
    found.check_weights(MODEL)
    note(found, 3, 2.0, None)
    found.check_loss(1.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_lost_loss_is_named_by_its_first_step_and_pass(loss):
    found = health()
    note(found, 5, 2.0, first=8)
    note(found, 6, loss, first=16)
    note(found, 7, math.nan, first=24)
    with pytest.raises(DivergedError) as caught:
        found.check_loss(math.nan)
    # The second pass of step 6: windows 18 and 19, both of question 9.
    assert str(caught.value).startswith(
        f"the loss is {loss} at step 6 on rank 0, over the questions q9; checkpoints from before"
    )
    assert caught.value.exit_code == 76


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_lost_gradients_are_named_by_their_step(norm):
    found = health()
    note(found, 5, 2.0)
    note(found, 6, 2.0, norm, first=4)
    note(found, 7, math.nan, norm, first=8)
    with pytest.raises(DivergedError) as caught:
        found.check_loss(math.nan)
    assert f"norm is {norm} at step 6, all ranks together, over the questions q2, q3;" in str(
        caught.value
    )


def test_a_loss_comes_before_the_gradients_it_leads_to():
    found = health()
    note(found, 6, math.nan, math.nan)
    with pytest.raises(DivergedError, match="the loss is nan at step 6"):
        found.check_loss(math.nan)


def test_infinite_gradients_are_a_matter_of_the_scale_in_fp16():
    found = health(scaled=True)
    note(found, 1, 2.0, math.inf)
    found.check_loss(2.0)
    note(found, 2, math.nan, math.inf)
    with pytest.raises(DivergedError, match="the loss is nan at step 2"):
        found.check_loss(math.nan)


def test_of_many_questions_the_first_are_named():
    found = health()
    found.record_step(3, np.arange(40), torch.tensor(math.inf))
    with pytest.raises(DivergedError, match=r"questions q0, q1, q2, q3, q4 and 15 more;"):
        found.check_loss(1.0)


def test_nothing_lost_is_saved():
    found = health()
    note(found, 4, 2.0)
    found.check_weights(MODEL)
    note(found, 5, math.nan)
    with pytest.raises(DivergedError, match="the loss is nan at step 5"):
        found.check_weights(MODEL)
    broken = torch.nn.Linear(2, 2)
    with torch.no_grad():
        broken.weight[0, 0] = math.nan
    with pytest.raises(DivergedError, match="the weights are no longer numbers"):
        health().check_weights(broken)


def test_what_was_looked_at_is_forgotten():
    found = health()
    note(found, 1, math.nan)
    with pytest.raises(DivergedError):
        found.check_loss(math.nan)
    found = health()
    note(found, 1, 2.0)
    found.check_loss(2.0)
    note(found, 2, 3.0)
    with pytest.raises(DivergedError, match="no longer numbers"):
        found.check_loss(math.nan)  # a loss of another rank, which names its own step


def test_what_fails_in_a_pass_is_noted_with_its_questions():
    found = health()
    with pytest.raises(MemoryError) as early, found.naming_questions():
        raise MemoryError
    assert not hasattr(early.value, "__notes__")
    found.begin_pass(np.arange(4))
    found.begin_pass(np.arange(6, 8))
    with pytest.raises(MemoryError) as caught, found.naming_questions():
        raise MemoryError
    assert caught.value.__notes__ == ["over the questions q3"]
