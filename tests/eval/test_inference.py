"""A model run over windows in blocks: any blocks, any batches give the same answers and sums."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from runner.data.dataset import Example
from runner.data.windows import build_windows
from runner.eval import inference as scoring
from runner.eval.inference import dry_run, predict_windows
from runner.job.schema import Model, Score
from runner.model.forward import SpanModel
from runner.model.load import ModelFiles, load_pretrained, load_tokenizer
from runner.utils.ranks import Rank
from tests.interruptions import DATA, JOB

ALONE = Rank(0, 1, 0, 1)
CONTEXT = "The lantern folds flat; its battery lasts nine hours on the bright setting. "


@pytest.fixture(scope="module")
def reader(tiny):
    import torch

    section = Model(name=str(tiny("bert")))
    files = ModelFiles.locate(section)
    tokenizer, model = load_tokenizer(files), load_pretrained(files, 0)
    return SpanModel.of(model, tokenizer, torch.device("cpu")), tokenizer


@pytest.fixture(scope="module")
def examples():
    lengths = [1, 9, 2, 1, 5, 1, 3]
    return [
        Example(str(n), "How long?", CONTEXT * length, ("nine hours",), (CONTEXT.find("nine"),))
        for n, length in enumerate(lengths)
    ]


def test_blocks_hold_whole_questions():
    questions_N = np.repeat(np.arange(5), [1, 7, 2, 1, 3])
    for most in (1, 2, 3, 5, 8, 14, 100):
        scoring.BLOCK_WINDOWS, old = most, scoring.BLOCK_WINDOWS
        try:
            blocks = list(scoring._blocks(questions_N))
        finally:
            scoring.BLOCK_WINDOWS = old
        assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]
        assert blocks[-1].stop == len(questions_N)
        for block in blocks:
            inside = questions_N[block]
            assert not set(inside) & set(np.delete(questions_N, np.r_[block]))
            assert len(inside) <= most or len(set(inside)) == 1
    assert list(scoring._blocks(np.zeros(0, np.int64))) == []


@pytest.mark.parametrize("unanswerable", [False, True])
def test_any_blocks_give_the_same_answers(reader, examples, monkeypatch, unanswerable):
    reader, tokenizer = reader
    windows = build_windows(examples, tokenizer, 64, 16)
    assert len(windows) > 2 * len(examples)
    told = []

    def read(**options):
        return predict_windows(
            reader, windows, examples, Score(batch_size=3), ALONE,
            unanswerable=unanswerable, step=told.append, **options,
        )  # fmt: skip

    whole = read()
    assert told == list(range(1, -(-len(windows) // 3) + 1))
    monkeypatch.setattr(scoring, "BLOCK_WINDOWS", 4)
    parts = read()
    assert whole is not None
    assert parts is not None
    assert [a.text for a in parts.answers] == [a.text for a in whole.answers]
    for mine, other in zip(parts.answers, whole.answers, strict=True):
        assert (mine.start, mine.end, mine.window) == (other.start, other.end, other.window)
        assert mine.score == pytest.approx(other.score, rel=1e-4)
        assert mine.null_difference == pytest.approx(other.null_difference, abs=1e-4)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    for name in ("start_accuracy", "end_accuracy", "span_accuracy"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name))
    short = read(n_listed=2)
    assert short is not None
    assert all(len(answer.n_best) <= 3 for answer in short.answers)
    assert [a.text for a in short.answers] == [a.text for a in whole.answers]


def test_no_answer_is_scored_where_each_window_has_its_cls(reader, examples):
    reader, tokenizer = reader
    windows = build_windows(examples[:1], tokenizer, 130, 16)
    elsewhere = dataclasses.replace(windows, cls_N=windows.cls_N + 2)
    first, other = (
        predict_windows(reader, some, examples[:1], Score(), ALONE, unanswerable=True)
        for some in (windows, elsewhere)
    )
    assert first is not None
    assert other is not None
    logits_T2 = reader(reader.batch(windows, np.array([0]))).logits_T2.detach()
    for place, found in ((0, first), (2, other)):
        wanted = float(logits_T2[place].sum())
        assert found.answers[0].null_score == pytest.approx(wanted, abs=1e-5)


def test_no_windows_are_no_answers(reader):
    reader, tokenizer = reader
    windows = build_windows([], tokenizer, 64, 16)
    found = predict_windows(reader, windows, [], Score(), ALONE, unanswerable=False)
    assert found is not None
    assert (found.answers, found.loss) == ((), 0.0)


class Spy(SpanModel):
    """A model that notes what it does, and with how many windows."""

    @property
    def noted(self) -> list:
        return vars(self).setdefault("_noted", [])

    def batch(self, windows, rows):
        self.noted.append(("batch", rows.tolist()))
        return super().batch(windows, rows)

    def __call__(self, batch):
        self.noted.append(("run", batch.counted))
        return super().__call__(batch)


def spying(reader, monkeypatch) -> Spy:
    spy = Spy(**vars(reader))

    def search(*arguments, **options):
        spy.noted.append(("search", len(arguments[1])))
        return plain(*arguments, **options)

    plain = scoring.search
    monkeypatch.setattr(scoring, "search", search)
    return spy


def test_the_next_batch_is_on_its_way_before_the_search_waits_for_this_one(
    reader, examples, monkeypatch
):
    reader, tokenizer = reader
    windows = build_windows(examples[:3], tokenizer, 64, 16)
    spy = spying(reader, monkeypatch)
    predict_windows(spy, windows, examples[:3], Score(batch_size=2), ALONE, unanswerable=False)
    before_the_last = -(-len(windows) // 2) - 1
    assert before_the_last > 1
    each = ["run", "batch", "search"] * before_the_last
    assert [name for name, _ in spy.noted] == ["batch", *each, "run", "search"]


@pytest.mark.parametrize("training", [False, True])
def test_a_rehearsal_reads_and_searches_the_longest_batch(reader, examples, monkeypatch, training):
    reader, tokenizer = reader
    windows = build_windows(examples, tokenizer, 100, 16)
    spy = spying(reader, monkeypatch)
    dry_run(spy, windows, Score(batch_size=3))
    assert not spy.noted  # a CPU has room
    monkeypatch.setattr(scoring, "DRY_RUN_DEVICES", ("cpu",))
    reader.engine.train(training)
    try:
        dry_run(spy, windows, Score(batch_size=3))
        assert reader.engine.training is training
    finally:
        reader.engine.eval()
    assert [name for name, _ in spy.noted] == ["batch", "run", "search"]
    read = windows.lengths_N[spy.noted[0][1]]
    assert sorted(read) == sorted(windows.lengths_N)[-3:]
    dry_run(spy, build_windows([], tokenizer, 64, 16), Score())
    assert len(spy.noted) == 3


FULL = """
import runner.eval.inference, torch
runner.eval.inference.DRY_RUN_DEVICES = ("cpu",)
plain = runner.eval.inference.search
def search(logits, segments, *arguments, **options):
    if len(segments) > 1:  # no probe
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to")
    return plain(logits, segments, *arguments, **options)
runner.eval.inference.search = search
"""


def test_scoring_that_does_not_fit_ends_a_run_before_its_first_step(zygote, tiny, tmp_path):
    job = tmp_path / "job.toml"
    job.write_text(JOB.format(data=DATA, model=tiny("bert"), context=CONTEXT, extra=""))
    codes, text = zygote.run(job, "--run-dir", tmp_path / "run", code=FULL)
    assert codes == [71], text
    assert re.search(r"out of memory on rank \d at the longest batch of the scoring", text), text
    assert not (tmp_path / "run" / "train.csv").exists()


def test_other_ranks_get_nothing(reader, examples, monkeypatch):
    reader, tokenizer = reader
    windows = build_windows(examples[:2], tokenizer, 64, 16)
    monkeypatch.setattr(scoring, "gather_to_main", lambda value: None)
    second = Rank(1, 2, 1, 2)
    assert (
        predict_windows(reader, windows, examples[:2], Score(), second, unanswerable=False) is None
    )
