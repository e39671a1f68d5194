"""Questions made ready: both data sets checked first, windows that fit the model, probes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.data import splits as prepare
from runner.data.splits import Split, probe_examples
from runner.data.splits import load_splits as load_sets
from runner.errors import DataError, JobError
from runner.job.schema import Data, Model, Probe
from runner.model.load import ModelFiles, load_tokenizer

CONTEXT = "The river folds battery before beech. "


@pytest.fixture
def data(tmp_path, monkeypatch):
    """`data(train=[...], validation=[...], ...)`: the [data] of questions with these contexts."""
    monkeypatch.setenv("SPANTUNE_CACHE", str(tmp_path / "cache"))

    def make(train=(CONTEXT,) * 6, validation=(CONTEXT,) * 3, **section):
        for name, contexts in (("train", train), ("validation", validation)):
            rows = [
                {"id": f"{name}{n}", "question": "Who?", "context": context}
                | {"answer": "The", "answer_start": 0}
                for n, context in enumerate(contexts)
            ]
            (tmp_path / f"{name}.json").write_text(json.dumps(rows))
            section |= {name: str(tmp_path / f"{name}.json")}
        return Data(**{"max_length": 128, "stride": 16} | section)

    return make


def load_splits(*arguments) -> tuple[Split, Split, Split | None]:
    """A single set of each kind."""
    sets = load_sets(*arguments)
    (train,), (validation,) = sets.training.values(), sets.validation.values()
    return train, validation, sets.tuning


@pytest.fixture
def tokenizer(tiny):
    return load_tokenizer(ModelFiles.locate(Model(name=str(tiny("bert")))))


def test_both_slices_with_their_samples(data, tokenizer):
    section = data(sample=4, validation_sample=2)
    train, validation, tuning = load_splits(section, 3, tokenizer)
    assert tuning is None
    assert [len(train.dataset.examples), len(validation.dataset.examples)] == [4, 2]
    assert [len(train.windows), len(validation.windows)] == [4, 2]
    assert not train.cached
    other, *_ = load_splits(section, 4, tokenizer)
    assert other.dataset.examples != train.dataset.examples
    again, *_ = load_splits(section, 3, tokenizer)
    assert again.cached
    assert again.dataset == train.dataset


def test_settings_of_the_section_reach_the_data(data, tokenizer):
    with pytest.raises(DataError, match="1 of 2 rows refused"):
        load_splits(data(validation=(CONTEXT, "")), 0, tokenizer)
    _, validation, _ = load_splits(data(validation=(CONTEXT, ""), on_bad_row="drop"), 0, tokenizer)
    assert validation.dataset.dropped == ("validation.json: row 2: context is empty",)
    with pytest.raises(DataError, match="no column 'text'"):
        load_splits(data(columns={"context": "text"}), 0, tokenizer)
    train, *_ = load_splits(data((CONTEXT * 9,), (CONTEXT,), max_length=32, stride=8), 0, tokenizer)
    assert train.windows.lengths_N.max() == 32


def test_a_question_too_long_for_its_window_is_a_bad_row(data, tokenizer):
    section = data((CONTEXT * 9, CONTEXT, CONTEXT), max_length=40, stride=20)
    rows = json.loads(Path(section.train).read_text())
    rows[0]["question"] = rows[2]["question"] = "how long battery " * 6  # 18 tokens
    rows[2] |= {"context": "beech", "answer": "beech"}  # with so short a context it fits
    Path(section.train).write_text(json.dumps(rows))
    with pytest.raises(DataError) as refused:
        load_splits(section, 0, tokenizer)
    assert str(refused.value).split("\n") == [
        f"{section.train}: 1 of 3 rows refused: 1 x question is too long for its window; set"
        ' data.on_bad_row = "drop" to leave them out',
        "  question train0: question is too long for its window (its 18 tokens and 3 special tokens"
        " leave 19 of max_length 40 for the context, which must be more than stride 20;"
        " raise max_length or lower stride)",
    ]
    dropping = section.model_copy(update={"on_bad_row": "drop"})
    train, *_ = load_splits(dropping, 0, tokenizer)
    assert [e.id for e in train.dataset.examples] == ["train1", "train2"]
    assert train.dataset.dropped[0].startswith("question train0: question is too long")
    assert len(train.windows) == 2
    again, *_ = load_splits(dropping, 0, tokenizer)
    assert again.cached
    assert again.dataset == train.dataset


def test_the_threshold_is_tuned_on_questions_of_its_own(data, tokenizer):
    section = data(unanswerable=True, validation=(CONTEXT + "Here.",))
    section = section.model_copy(update={"tuning": f"{section.train}[:2]"})
    _, _, tuning = load_splits(section, 3, tokenizer)
    assert tuning is not None
    assert [e.id for e in tuning.dataset.examples] == ["train0", "train1"]
    assert len(tuning.windows) == 2


def test_a_question_that_is_reported_is_never_tuned_on(data, tokenizer, monkeypatch):
    # Its id and the blanks around it are other ones: the texts decide.
    section = data(unanswerable=True, train=(CONTEXT + "There.", CONTEXT))
    section = section.model_copy(update={"tuning": section.train})
    monkeypatch.setattr(prepare, "cached_windows", None)  # refused before anything is tokenised
    with pytest.raises(DataError) as refused:
        load_splits(section, 3, tokenizer)
    assert str(refused.value).startswith(
        "data.tuning: 1 of its 2 questions are also in data.validation, such as train1 (there "
        "validation2);"
    )


def test_a_bad_validation_set_is_found_before_anything_is_tokenised(data, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "cached_windows", None)
    with pytest.raises(DataError, match=r"validation\.json: row 1: context is empty"):
        load_splits(data(validation=("",)), 0, tokenizer)


@pytest.mark.parametrize("slot", ["train", "validation"])
def test_windows_longer_than_the_models_positions_are_refused(data, tokenizer, slot):
    long = {slot: (CONTEXT, CONTEXT * 40)}
    with pytest.raises(JobError) as refused:
        load_splits(data(**long, max_length=131), 0, tokenizer)
    told = "data.max_length: 131 gives windows of 131 tokens"
    assert str(refused.value).startswith(told)
    assert f"{slot}.json); this model takes 130" in str(refused.value)
    load_splits(data(**long, max_length=130), 0, tokenizer)
    load_splits(data(max_length=512), 0, tokenizer)  # no window is as long as it might be


def test_probes_become_questions_with_a_label_where_there_is_one():
    asked = [
        Probe(question="Who?", context="Ann saw Bo and Bo.", answer="Bo"),
        Probe(question="Who?", context="Ann saw Bo.", answer="Cy"),
        Probe(question="Who?", context="Ann saw Bo."),
    ]
    examples = probe_examples(asked)
    assert [e.id for e in examples] == ["probe-1", "probe-2", "probe-3"]
    assert [(e.answers, e.answer_starts) for e in examples] == [(("Bo",), (8,)), ((), ()), ((), ())]
    assert [(e.question, e.context) for e in examples] == [(p.question, p.context) for p in asked]
