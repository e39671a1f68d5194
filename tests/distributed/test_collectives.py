"""What ranks agree on; two ranks doing it are in test_resume and test_faults."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from runner.distributed.collectives import (
    all_gather,
    broadcast,
    gather_to_main,
    is_connection_lost,
    main_first,
)
from runner.distributed.preemption import StopSaveSync
from runner.errors import DataError
from runner.utils import signals
from runner.utils.ranks import Rank

MAIN, OTHER = Rank(0, 2, 0, 2), Rank(1, 2, 1, 2)


@pytest.fixture(autouse=True)
def _no_request():
    signals.forget_stop()
    yield
    signals.forget_stop()


def test_saving_is_due_after_a_time():
    boundary = StopSaveSync(MAIN, seconds=0.0)
    assert boundary.poll().save
    patient = StopSaveSync(MAIN, seconds=3600.0)
    assert not patient.poll().save
    patient.saved()
    assert not patient.poll().save


def test_after_a_save_that_failed_the_next_is_due_sooner():
    """Else a kill would cost up to twice the time that checkpoint_minutes promises."""
    boundary = StopSaveSync(MAIN, seconds=3600.0)
    boundary.saved(whole=False)
    assert not boundary.poll().save
    boundary._saved -= 0.3 * 3600
    assert boundary.poll().save
    boundary.saved()
    boundary._saved -= 0.3 * 3600
    assert not boundary.poll().save


def test_only_rank_0_looks_at_the_clock():
    assert not StopSaveSync(OTHER, seconds=0.0).poll().save


@pytest.mark.parametrize("rank", [MAIN, OTHER])
def test_a_signal_to_any_rank_is_a_wish_to_stop(rank):
    boundary = StopSaveSync(rank, seconds=3600.0)
    assert not boundary.poll().stop
    signals.request_stop("SIGUSR2")
    assert boundary.poll().stop
    boundary.saved()
    assert boundary.poll().stop  # until it has stopped


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[...]/gloo/transport/tcp/pair.cc:537] Read error: Connection reset"), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp"), True),
        (dist.DistBackendError("x"), True),
        (dist.DistNetworkError("x"), True),
        (dist.DistStoreError("x"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
        (DataError("x"), False),
    ],
)
def test_what_means_that_another_rank_is_gone(error, expected):
    assert is_connection_lost(error) is expected


def test_one_rank_talks_to_itself():
    alone = Rank(0, 1, 0, 1)
    assert broadcast({"a": 1}) == {"a": 1}
    assert gather_to_main(5) == all_gather(5) == [5]
    assert main_first(alone, lambda: "done") == "done"
    with pytest.raises(DataError, match="no"):
        main_first(alone, fail)


def fail() -> None:
    raise DataError("no")
