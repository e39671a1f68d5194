"""Which checkpoints a start takes for its own; saving and loading are in test_resume, test_faults
and test_shards."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from runner.checkpoint.commit import Ranks
from runner.checkpoint.manager import _IDENTITY, CheckpointManager
from runner.checkpoint.store import Manifest
from runner.errors import DataError
from runner.job.schema import Data, Job, Model, Train
from runner.run.folder import RunDir
from runner.train.state import TrainState
from runner.utils.ranks import Rank

JOB = Job(
    name="j",
    data=Data(train="a.json", validation="b.json"),
    model=Model(name="m"),
    train=Train(epochs=1, batch_size=8, learning_rate=0.5),
).model_dump(mode="json")
IDENTITY = dict.fromkeys(_IDENTITY, "then") | {"job": JOB}


@pytest.fixture
def start(tmp_path: Path) -> CheckpointManager:
    """A start whose engine does nothing."""
    run, rank = RunDir(tmp_path), Rank(0, 1, 0, 1)
    return CheckpointManager(run, 1, None, rank, SimpleNamespace(), IDENTITY, lambda _: None)


def manifest(identity: dict[str, object]) -> Manifest:
    facts = {"identity": identity, "memory": {"best": None}, "step": 10}
    return Manifest("step-000010-a0001", {}, facts)


def test_a_checkpoint_of_the_same_kind_is_taken(start):
    start._examine(True, manifest(dict(IDENTITY)))


@pytest.mark.parametrize("key", [key for key in _IDENTITY if key != "job"])
def test_whatever_a_checkpoint_belongs_to_has_to_be_the_same(start, key):
    """Each is refused with its own sentence, before anything is loaded."""
    with pytest.raises(DataError) as caught:
        start._examine(False, manifest(IDENTITY | {key: "another"}))
    assert type(caught.value) is DataError  # no damage: none before it will do better
    sentence = _IDENTITY[key].format("another", "then")
    assert str(caught.value).endswith(f"{sentence}, or begin anew with --restart")


@pytest.mark.parametrize(
    "identity",
    [{k: v for k, v in IDENTITY.items() if k != "model"}, IDENTITY | {"optimizer": "x"}, {}],
)
def test_a_checkpoint_of_another_version_is_refused_as_such(start, identity):
    with pytest.raises(DataError, match="was made by another version of spantune"):
        start._examine(False, manifest(identity))


def test_a_checkpoint_from_before_labels_were_noted_says_why_it_is_refused(start):
    before = {key: value for key, value in IDENTITY.items() if key != "labels"}
    with pytest.raises(DataError, match="labels by another rule: an answer was the tokens up to"):
        start._examine(False, manifest(before))


def test_a_checkpoint_of_another_job_is_refused_with_the_key(start):
    other = IDENTITY | {"job": JOB | {"train": JOB["train"] | {"learning_rate": 0.25}}}
    told = r"another job: train\.learning_rate is 0\.25 there and 0\.5 now"
    with pytest.raises(DataError, match=told):
        start._examine(False, manifest(other))
    later = {key: value for key, value in JOB["train"].items() if key != "log_every"}
    start._examine(False, manifest(IDENTITY | {"job": JOB | {"train": later}}))
    without_effect = IDENTITY | {"job": JOB | {"slurm": {"partition": "p"}}}
    start._examine(False, manifest(without_effect))
    with pytest.raises(DataError, match="another version of spantune wrote it"):
        start._examine(False, manifest(IDENTITY | {"job": JOB | {"train": {"gone": 1}}}))


def test_ranks_that_have_read_different_data_do_not_begin(start):
    other = IDENTITY | {"train": "read later"}
    start._ranks = Ranks(0, lambda mine: [mine, other])
    state: TrainState = SimpleNamespace()  # type: ignore[assignment]  # not looked at
    with pytest.raises(DataError, match="the files changed while they were read"):
        start.load(state, needs_best=False)
