"""Predictors: the same answers as plain transformers on the exported model, as stored with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from runner.errors import AssetError, DataError, MachineError, UsageError
from runner.job.inference import KEY, TunedOn, settings_of_job
from runner.job.schema import Data, Model, Score
from runner.model.load import ModelFiles, load_tokenizer
from runner.predict.locate import locate_model
from runner.predict.predictor import Predictor, Question, open_model
from tests.plain_transformers import by_hand

CONTEXT = (
    "The lantern folds flat; its battery lasts nine hours on the bright setting. In 1912 the café "
    "opened near the harbour, serving 30 guests an evening. The shade is washable linen. "
)
QUESTIONS = [
    Question("long", "How long does the battery last?", CONTEXT * 2),
    Question("short", "  When did the café open?", CONTEXT),
    Question("tiny", "What is washable?", "The shade is washable linen."),
]


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """`exported(kind, **score)`: a tiny model's folder with settings in its config.json."""

    def make(kind: str = "bert", unanswerable: bool = False, **score) -> Path:
        folder = tmp_path_factory.mktemp("model") / "model"
        shutil.copytree(tiny(kind), folder)
        load_tokenizer(ModelFiles.locate(Model(name=str(tiny(kind))))).save_pretrained(
            folder
        )  # as a run exports it
        data = Data(
            train="o/n", validation="o/n", max_length=64, stride=16, unanswerable=unanswerable
        )
        tuned = TunedOn(source="t", sha256="0" * 64, questions=1, metric="f1", percent=1.0)
        answering = settings_of_job(data, Score(max_answer_length=8, n_best=5, **score))
        answering = answering.model_copy(update={"tuned": tuned if unanswerable else None})
        config = json.loads((folder / "config.json").read_text())
        config[KEY] = answering.model_dump(mode="json")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra", "albert"])
def test_plain_transformers_on_the_exported_model_answer_the_same(exported, kind):
    folder = exported(kind)
    predictor = Predictor.load(str(folder), device="cpu")
    found = predictor.answers(QUESTIONS)
    assert [p.id for p in found] == ["long", "short", "tiny"]
    for asked, prediction in zip(QUESTIONS, found, strict=True):
        spans, _, windows = by_hand(folder, asked)
        order = sorted(spans, key=lambda place: (-spans[place][0], *place))[:5]
        if kind == "albert":  # a space is a token: several of a window's five spans are one text
            assert len(prediction.n_best) >= 3
            order = order[: len(prediction.n_best)]
        assert [(c.start, c.end) for c in prediction.n_best] == order
        best = order[0]
        assert prediction.answer == asked.context[best[0] : best[1]]
        assert (prediction.start, prediction.end, prediction.windows) == (*best, windows)
        logits = np.array([spans[place][0] for place in order])
        weights = np.exp(logits - logits.max())
        assert [c.score for c in prediction.n_best] == pytest.approx(
            (weights / weights.sum()).tolist(), rel=1e-3
        )
        assert prediction.score == prediction.n_best[0].score
        assert (prediction.no_answer_score, prediction.null_difference) == (None, None)
    assert found[0].windows > 2


def test_the_stored_threshold_decides_whether_there_is_an_answer(exported):
    plain = Predictor.load(str(exported(unanswerable=True)), device="cpu").answers(QUESTIONS)
    differences = sorted(p.null_difference for p in plain if p.null_difference is not None)
    middle = (differences[0] + differences[1]) / 2
    folder = exported(unanswerable=True, null_threshold=middle)
    found = Predictor.load(str(folder), device="cpu").answers(QUESTIONS)
    for asked, prediction in zip(QUESTIONS, found, strict=True):
        spans, null, _ = by_hand(folder, asked)
        difference = null - max(score for score, _ in spans.values())
        assert prediction.null_difference == pytest.approx(difference, abs=1e-4)
        assert (prediction.answer == "") is (difference > middle)
        assert prediction.no_answer_score is not None
        if not prediction.answer:
            assert (prediction.start, prediction.end) == (0, 0)
            assert prediction.score == prediction.no_answer_score
    assert sorted(p.answer == "" for p in found) == [False, True, True]
    assert "null_difference" in found[0].record()


def test_settings_can_be_overridden(exported):
    folder = str(exported())
    always = Predictor.load(folder, device="cpu", listed=2, max_answer_length=1)
    for asked in QUESTIONS:
        prediction = always.answer(asked.question, asked.context)
        assert len(prediction.n_best) == 2
        assert " " not in prediction.answer
    never = Predictor.load(folder, device="cpu", null_threshold=-1e9)
    assert [p.answer for p in never.answers(QUESTIONS)] == ["", "", ""]
    assert never.answering.tuned is None
    with pytest.raises(ValueError, match="n_best"):
        Predictor.load(folder, device="cpu", n_best=0)


def test_streams_are_answered_group_after_group(exported):
    predictor = Predictor.load(str(exported()), device="cpu")
    taken = []

    def questions():
        for number in range(7):
            taken.append(number)
            yield Question(str(number), "Who?", "The lantern folds flat; it lasts.")

    answers = predictor.stream(questions(), group=2)
    assert next(answers).id == "0"
    assert taken == [0, 1]
    assert [p.id for p in answers] == list("123456")


def test_answers_are_a_documented_record(exported):
    prediction = Predictor.load(str(exported()), device="cpu", listed=1).answers(QUESTIONS)[1]
    record = json.loads(json.dumps(prediction.record()))
    assert list(record) == [
        *("id", "question", "answer", "score", "start", "end", "window", "windows", "n_best")
    ]
    assert record["question"] == "  When did the café open?"
    assert QUESTIONS[1].context[record["start"] : record["end"]] == record["answer"]
    assert list(record["n_best"][0]) == ["answer", "score", "start", "end", "window"]


def test_questions_that_cannot_be_asked(exported):
    predictor = Predictor.load(str(exported()), device="cpu")
    with pytest.raises(DataError, match="question 1: its context is empty"):
        predictor.answer("Who?", " \n")
    with pytest.raises(DataError, match="question 1: its question is empty"):
        predictor.answer("", "Ann.")
    with pytest.raises(DataError, match=r"question long: question is too long .* leave"):
        predictor.answers([QUESTIONS[2], Question("long", "Who? " * 60, CONTEXT)])
    assert predictor.answers([]) == []


# ---- finding models


def test_a_run_folder_stands_for_its_model(exported, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.toml").write_text("")
    with pytest.raises(DataError, match="has no model yet"):
        locate_model(str(run))
    shutil.copytree(exported(), run / "model")
    assert locate_model(str(run)) == str(run / "model")
    assert Predictor.load(str(run), device="cpu").answer("Who?", "Ann.").answer


def test_models_that_are_not_there(tmp_path, minilm):
    with pytest.raises(DataError, match=r"neither a run \(job\.toml\) nor a model"):
        locate_model(str(tmp_path))
    (tmp_path / "file").write_text("")
    for name in (str(tmp_path / "file"), "no/such/folder", "~/no such"):
        with pytest.raises(AssetError, match="no folder of a run or of a model"):
            locate_model(name)
    with pytest.raises(AssetError, match=r"^nobody/nothing: "):  # no network in tests
        Predictor.load("nobody/nothing", device="cpu")
    with pytest.raises(AssetError, match="not installed"):
        Predictor.load("package:nowhere/model", device="cpu")
    # An encoder without a trained head would answer at random.
    with pytest.raises(DataError, match=r"not fine-tuned to answer questions.*qa_outputs"):
        Predictor.load(minilm, device="cpu")


def test_broken_models_are_one_sentence(exported):
    folder = exported()
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="cannot be read"):
        Predictor.load(str(folder), device="cpu")
    config = json.loads((folder / "config.json").read_text())
    config[KEY]["stride"] = "wide"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"config\.json, spantune: stride"):
        Predictor.load(str(folder), device="cpu")


def test_half_precision_that_the_processor_lacks_becomes_float32(exported, monkeypatch):
    folder = exported()
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    kept = json.loads((folder / "config.json").read_text())[KEY]
    setattr(model.config, KEY, kept)
    model.to(torch.bfloat16).save_pretrained(folder)
    for features, dtype in (
        (frozenset(), torch.float32),
        (frozenset({"avx512_bf16"}), torch.bfloat16),
    ):
        monkeypatch.setattr("runner.model.load.cpu_features", lambda features=features: features)
        assert Predictor.load(str(folder), device="cpu").model.engine.dtype == dtype


def opened_with(folder: Path, **changes) -> Predictor:
    given = {"device": "cpu", "threads": None, "null_threshold": None}
    given |= {"max_answer_length": None, "batch_size": None}
    return open_model(str(folder), **(given | changes), listed=1)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_a_model_that_fits_no_memory_is_the_machines_fault(exported, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("runner.predict.predictor.Predictor.__init__", full)
    with pytest.raises(MachineError, match=r"out of memory: .*; lower --batch-size, or take"):
        opened_with(exported())


def test_the_command_lines_settings_are_checked(exported):
    def opened(**changes):
        return opened_with(exported(), **changes)

    assert opened(batch_size=2).answering.score.batch_size == 2
    with pytest.raises(UsageError, match="null_threshold"):
        opened(null_threshold=float("inf"))
    for device in ("gpu9", "cuda:77"):
        with pytest.raises(UsageError):
            opened(device=device)


def test_the_package_gives_what_is_public():
    from runner import predict
    from runner.predict.qa_pipeline import pipeline

    assert (predict.Predictor, predict.pipeline) == (Predictor, pipeline)
    assert not hasattr(predict, "Asker")
