"""The best evaluation: written with its model, read back to the bit, and what a run exports."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from runner.checkpoint.best import MODEL, BestEvaluation, load_best, save_best
from runner.data.dataset import Example
from runner.errors import DataError
from runner.eval.answers import Answer, Candidate
from runner.eval.evaluation import evaluate
from runner.eval.inference import Predictions
from runner.job.inference import settings_of_job
from runner.job.schema import Data, Model, Score
from runner.model.load import ModelFiles, load_pretrained, load_tokenizer
from runner.run.folder import RunDir
from runner.utils.tables import read_rows
from tests.interruptions import CONTEXT, DATA, JOB, outcome, sets


def kept_of(text: str) -> BestEvaluation:
    listed = (Candidate(text, 0.1 + 0.2, 1 / 3, 0, len(text), 0),)
    answer = Answer("a", text, 0.1 + 0.2, 0, len(text), 0, -1 / 7, 0.0, -2.5, 0, listed)
    readings = Predictions(np.pi, 12.5, 1 / 3, 0.0, (answer,), 0.125)
    examples = [Example("a", "q?", "red house", ("red",), (0,))]
    scores = evaluate(readings, examples, Score(), unanswerable=False, seed=1)
    return BestEvaluation(3, 41, scores, [np.array([[0.1, -np.inf], [1e-40, 2.0]], np.float32)])


@pytest.fixture
def folder(tiny, tmp_path):
    """A kept evaluation with its exported model."""
    section = Model(name=str(tiny("bert")))
    files = ModelFiles.locate(section)
    model, tokenizer = load_pretrained(files, 0), load_tokenizer(files)
    answering = settings_of_job(Data(train="t.json", validation="v.json"), Score())
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    folder = tmp_path / "best"
    save_best(folder, kept_of("red"), model, state, tokenizer, "# a card", answering)
    return folder


def test_what_was_kept_is_read_back_to_the_bit(folder):
    found, wanted = load_best(folder), kept_of("red")
    assert (found.epoch, found.step) == (3, 41)
    assert found.scores.predictions == wanted.scores.predictions
    for field in dataclasses.fields(wanted.scores):
        mine, theirs = (getattr(kept.scores, field.name) for kept in (found, wanted))
        assert np.array_equal(mine, theirs) if isinstance(theirs, np.ndarray) else mine == theirs
    (mine,), (theirs,) = found.logits, wanted.logits
    assert mine.dtype == theirs.dtype
    assert mine.tobytes() == theirs.tobytes()


def test_the_model_has_the_weights_that_were_given(folder, tiny):
    """Not those that the model in memory has by then."""
    from safetensors.torch import load_file

    before = load_file(tiny("bert") / "model.safetensors")
    after = load_file(folder / MODEL / "model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name] + 1).equal(after[name]) for name in before)
    assert (folder / MODEL / "README.md").read_text() == "# a card"


@pytest.mark.parametrize("damage", ["", "{}", "[1]", None, "epoch"])
def test_a_record_that_is_none_is_refused(folder, damage):
    path = folder / "kept.json"
    if damage is None:
        path.unlink()
    elif damage == "epoch":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"epoch": "3"}))
    else:
        path.write_text(damage)
    with pytest.raises(DataError, match=r"kept\.json: cannot be read"):
        load_best(folder)


# The metric of [stop] says what it is told: the first evaluation is the best one.
FIRST_IS_BEST = """
import runner.eval.evaluation
values = iter([90.0, 10.0])
runner.eval.evaluation.Evaluation.metric = lambda self, name: next(values)
"""


def test_a_run_that_goes_on_after_its_best_epoch_exports_that_one(zygote, tiny, tmp_path):
    """Weights, answers and scores are those of a run that ended there."""
    job = tmp_path / "job.toml"
    job.write_text(JOB.format(data=DATA, model=tiny("bert"), context=CONTEXT, extra=""))
    same = ("train.schedule=constant", "train.warmup=0", "train.learning_rate=1e-3")
    short, long = tmp_path / "short", tmp_path / "long"
    codes, text = zygote.run(job, "--run-dir", short, *sets(*same, "train.epochs=1"))
    assert codes == [0], text
    stop = sets(*same, "train.epochs=2", "stop.metric=f1", "stop.patience=5")
    codes, text = zygote.run(job, "--run-dir", long, *stop, code=FIRST_IS_BEST)
    assert codes == [0], text
    losses = [row["validation_loss_nats"] for row in read_rows(RunDir(long).eval_table)]
    assert len(set(losses)) == 2, "weights that did not move would prove nothing"
    wanted, found = outcome(short), outcome(long)
    for name in ("weights", "predictions", "metrics", "epoch", "step"):
        assert found[name] == wanted[name], name
