"""What SLURM takes minutes for, with the stand-in: begun with all other scenes, looked at last."""

from __future__ import annotations

from .scenes import first_signal, outcome


def test_a_killed_rank_takes_the_others_with_it(cluster, scenes):
    # These do not notice, as real ones would: after a minute they are killed.
    assert outcome(cluster, scenes["killed rank"][0]) == ("FAILED", "137:0", "0")


def test_the_time_limit(cluster, scenes):
    job, run = scenes["busy at the limit"]
    assert outcome(cluster, job) == ("TIMEOUT", "75:0", "0")
    assert not (run / "result.json").exists()
    signals = (run / "signals-0-0").read_text().split()
    assert (signals[0], signals[-1]) == ("SIGUSR2", "SIGTERM")


def test_the_warning_before_the_time_limit(cluster, scenes):
    job, run = scenes["warned of the limit"]
    assert outcome(cluster, job) == ("COMPLETED", "0:0", "1")
    assert first_signal(run, 0) == "SIGUSR2"


def test_preemption_by_cancel_at_the_end_of_its_grace(cluster, scenes):
    job, run = scenes["grace runs out"]
    assert outcome(cluster, job) == ("COMPLETED", "0:0", "1")
    signals = (run / "signals-0-0").read_text().split()
    assert (signals[0], signals[-1]) == ("SIGUSR2", "SIGTERM")


def test_preemption_saves_requeues_and_goes_on(cluster, scenes):
    job, run = scenes["preempted"]
    assert outcome(cluster, job) == ("COMPLETED", "0:0", "1")
    for rank in range(4):
        assert first_signal(run, rank) == "SIGUSR2"
