"""The model card: what the hub reads in it, and its text held by a golden file."""

from __future__ import annotations

import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

from runner.export.model_card import model_card
from runner.job.inference import TunedOn, settings_of_job
from runner.job.schema import Card, Job, Model
from runner.model.load import ModelFiles, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "model_card.md"
INTERVALS = {"exact_match": (78.25, 84.0), "f1": (86.0, 90.125)}
SCORES = {"exact_match": 81.25, "f1": 88.124, "loss": 0.875, "span_accuracy": 70.0}


def job(text="", **data):
    tables = {
        "name": "tiny-card",
        "data": {"train": "rajpurkar/squad:train[:1000]", "validation": "owner/set@v2#en:dev"}
        | data,
        "model": {"name": "google-bert/bert-base-uncased"},
        "train": {"epochs": 1, "batch_size": 8, "learning_rate": 2e-5},
    }
    return Job.model_validate(tables | ({"model": {"name": text}} if text else {}))


def card(job, job_text='name = "tiny-card"\n', tuned=None):
    hashes = {"training": "a1" * 32, "validation": "b2" * 32}
    answering = settings_of_job(job.data, job.score).model_copy(update={"tuned": tuned})
    return model_card(job, SCORES, hashes, job_text, intervals=INTERVALS, settings=answering)


def test_the_card_is_the_golden_one():
    """If a change of the card is meant, write the golden file anew and say why."""
    assert card(job()) == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("validation", "name", "dataset"),
    [
        ("owner/set@v2#en:dev[:10]", "owner/set@v2#en:dev[:10]", "owner/set"),
        ("/somewhere/sets/é 😀: x.json[10%:]", "é 😀: x.json[10%:]", "é 😀: x.json"),
        ('/sets/"q" \\ #.jsonl', '"q" \\ #.jsonl', '"q" \\ #.jsonl'),
        ("/sets/- {a: [.csv", "- {a: [.csv", "- {a: [.csv"),
        ("/sets/bell\u0007 del\u007f.csv", "bell\u0007 del\u007f.csv", "bell\u0007 del\u007f.csv"),
    ],
)
def test_the_hub_reads_scores_and_names_from_the_front_matter(validation, name, dataset):
    from huggingface_hub import ModelCard

    data = ModelCard(card(job(validation=validation))).data
    assert data.base_model == "google-bert/bert-base-uncased"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "question-answering")
    assert data.model_name == "tiny-card"
    results = [(r.metric_type, r.metric_value, r.metric_name) for r in data.eval_results]
    assert results == [
        ("exact_match", 81.25, "Exact match (%)"),
        ("f1", 88.12, "F1 (%)"),
    ]
    assert {(r.dataset_name, r.dataset_type) for r in data.eval_results} == {(name, dataset)}
    assert data.datasets == ["rajpurkar/squad"]
    assert data.metrics == ["exact_match", "f1"]
    assert (data.license, data.language) == (None, None)


def test_the_hub_reads_what_the_job_declares():
    from huggingface_hub import ModelCard

    declared = job(validation="owner/set@v2#no:dev[:10]", train="/somewhere/mine.csv")
    declared = declared.model_copy(update={"card": Card(license="cc-by-sa-4.0", language="no")})
    data = ModelCard(card(declared)).data
    assert (data.license, data.language) == ("cc-by-sa-4.0", "no")  # YAML's no is not false
    assert data.datasets is None
    (result, _) = data.eval_results
    place = (result.dataset_config, result.dataset_split, result.dataset_revision)
    assert place == ("no", "dev", "v2")


def test_the_recipe_says_what_was_trained_and_how():
    tables = job().model_dump()
    tables["model"]["freeze"] = ["embeddings", "encoder.layer.0-5"]
    tables["data"]["sample"] = 1000
    tables["train"] |= {"warmup": 0.1, "epochs": 5}
    tables["stop"] = {"metric": "f1"}
    text = card(Job.model_validate(tables))
    for row in (
        "| questions | `rajpurkar/squad:train[:1000]`,"
        " 1,000 of its questions drawn with the seed |",
        "| windows | 384 tokens, stride 128 |",
        "| frozen | `embeddings`, `encoder.layer.0-5` |",
        "| epochs | at most 5; until f1 stops improving |",
        "| optimiser | AdamW, learning rate 2e-05 (linear after a warm-up of 10 % of the steps),"
        " weight decay 0 |",
    ):
        assert row in text


def test_scores_of_a_sample_are_not_told_as_those_of_the_whole_slice():
    """Two samples of one slice have a hash each."""
    from huggingface_hub import ModelCard

    text = card(job(train="o/n:dev", validation="o/n:dev", sample=1200, validation_sample=500))
    part = "500 of its questions drawn with the seed"
    assert f"\nOn `o/n:dev`, {part}:\n" in text
    assert {r.dataset_name for r in ModelCard(text).data.eval_results} == {f"o/n:dev, {part}"}
    more = "1,200 of its questions drawn with the seed"
    assert f"\non `o/n:dev`, {more}.\n" in text
    assert f"| training | `o/n:dev`, {more} | `{'a1' * 32}` |" in text
    assert f"| validation | `o/n:dev`, {part} | `{'b2' * 32}` |" in text


@pytest.mark.parametrize("model", ["/somewhere/models/mine", "package:weights/model"])
def test_a_model_that_is_not_on_the_hub_is_no_base_model(model):
    from huggingface_hub import ModelCard

    text = card(job(model))
    assert ModelCard(text).data.base_model is None
    assert f"spantune from `{model.removeprefix('/somewhere/models/')}`" in text


def test_folders_of_the_machine_are_left_out():
    from runner.job.load import dump_job

    private = job("/somewhere/m", train="/somewhere/a.json[:5]", validation="/somewhere/b.csv")
    text = card(private, dump_job(private))
    assert "/home" not in text
    assert 'train = "a.json[:5]"' in text
    assert "| `b.csv` |" in text
    assert "/somewhere" not in text


def test_a_fence_in_the_job_does_not_end_the_jobs_own():
    text = card(job(), "context = '''\n````\n<script>\n'''")
    assert text.endswith("`````toml\ncontext = '''\n````\n<script>\n'''\n`````\n")


def test_the_card_says_whether_the_model_may_answer_nothing():
    assert "always answers" in card(job())
    text = card(job(unanswerable=True))
    assert "answers nothing where the null score exceeds the best span's by more than 0." in text
    tuned = TunedOn(source="dev.json", sha256="c3" * 32, questions=200, metric="f1", percent=50.0)
    text = card(job(unanswerable=True), tuned=tuned)
    assert "by more than 0, tuned on 200 questions of `dev.json`." in text


def test_the_tuning_data_are_no_folder_of_the_machine_either():
    from runner.job.load import dump_job

    private = job(unanswerable=True, tuning="/somewhere/t.json[:5]")
    assert "/somewhere" not in card(private, dump_job(private))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra", "albert"])
def test_both_examples_of_the_card_run_and_answer_alike(kind, tiny, tmp_path, capsys, monkeypatch):
    """As they stand there, one after the other, with the folder of a model put in."""
    # This checkout's, whichever one the environment has installed.
    monkeypatch.setitem(sys.modules, "spantune", import_module("runner.spantune"))
    blocks = re.findall(r"```python\n(.*?)```", card(job(max_length=100, stride=30)), re.DOTALL)
    assert len(blocks) == 2
    folder, names = tmp_path / "model", dict[str, object]()
    shutil.copytree(tiny(kind), folder)
    tokenizer = load_tokenizer(ModelFiles.locate(Model(name=str(tiny(kind)))))
    tokenizer.save_pretrained(folder)  # as a run exports it
    capsys.readouterr()
    for block in blocks:
        exec(block.replace("path/to/model", str(folder)), names)
    plain, ours = capsys.readouterr().out.splitlines()
    assert plain == ours
    assert plain in str(names["text"])
    assert plain
