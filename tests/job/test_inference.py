"""How a model is asked, as it is stored with the model and read back."""

from __future__ import annotations

import json

import pytest

from runner.errors import DataError
from runner.job.inference import (
    KEY,
    InferenceSettings,
    TunedOn,
    default_settings,
    read_settings,
    settings_of_job,
)
from runner.job.schema import Data, Score

TUNED = TunedOn(source="dev.json[:9]", sha256="a" * 64, questions=9, metric="f1", percent=71.5)


def stored(**changes) -> dict:
    score = Score(null_threshold=-1.25, n_best=7, max_answer_length=12, mode="run_qa")
    data = Data(train="o/n", validation="o/n", max_length=256, stride=64, unanswerable=True)
    answering = settings_of_job(data, score).model_copy(update={"tuned": TUNED} | changes)
    return json.loads(json.dumps({KEY: answering.model_dump(mode="json")}))


def test_what_is_stored_is_read_back():
    found = read_settings(stored(), 512, "m")
    assert (found.max_length, found.stride, found.unanswerable) == (256, 64, True)
    assert (found.score.null_threshold, found.score.n_best) == (-1.25, 7)
    assert (found.score.max_answer_length, found.score.mode) == (12, "run_qa")
    assert found.tuned == TUNED


def test_a_model_without_settings_is_asked_by_the_schemas_defaults():
    found = read_settings({"model_type": "bert"}, 512, "m")
    data = Data(train="o/n", validation="o/n")
    assert found == settings_of_job(data, Score())
    # A model of few positions gets windows that it takes, and a stride that fits them.
    assert (default_settings(130).max_length, default_settings(130).stride) == (130, 43)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_length": "many"}, "max_length"),
        ({"max_length": 4}, "max_length"),
        ({"score": {"n_best": 0}}, "score.n_best"),
        ({"score": {"from_the_future": 1}}, "score.from_the_future"),
        ({"tuned": {"source": 5}}, "tuned"),
        ({"stride": 256}, "stride of 256"),
        ({"max_length": 600}, "a model that takes 512 tokens"),
    ],
)
def test_settings_that_no_run_wrote_are_refused(change, words):
    config = stored()
    config[KEY] |= change
    with pytest.raises(DataError, match=rf"^m: config\.json, {KEY}: .*{words}"):
        read_settings(config, 512, "m")
    with pytest.raises(DataError):
        read_settings({KEY: [1]}, 512, "m")


def test_settings_can_be_changed_within_their_ranges():
    found = InferenceSettings.model_validate(stored()[KEY])
    changed = found.with_score(null_threshold=2.0, n_best=None)
    assert changed.score == found.score.model_copy(update={"null_threshold": 2.0})
    assert found.with_score() == found
    with pytest.raises(ValueError, match="max_answer_length"):
        found.with_score(max_answer_length=0)
    with pytest.raises(ValueError, match="null_threshold"):
        found.with_score(null_threshold=float("nan"))
