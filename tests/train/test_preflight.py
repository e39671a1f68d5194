"""`check --data` on a tiny job: every number of its report counted by hand."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from runner.errors import AssetError, DataError, JobError
from runner.job.schema import Job
from runner.model.config import empty_model
from runner.train.preflight import check_data
from runner.utils.tables import markdown
from tests.hollow import save_hollow

WORDS = "river folds battery before beech"  # each one token of the tiny vocabulary


def text(words):
    return " ".join((f"{WORDS} " * 40).split()[:words])


def row(name, words, answer="river", answer_start=0):
    asked = {"id": name, "question": "how long", "context": text(words)}
    return asked | {"answer": answer, "answer_start": answer_start}


@pytest.fixture
def job(tiny, tmp_path, monkeypatch):
    """`job(rows, model={...}, ...)`: a job on the tiny BERT, or with another section."""
    monkeypatch.setenv("SPANTUNE_CACHE", str(tmp_path / "cache"))

    def make(rows, **sections):
        names = {"train": rows, "validation": [row("v", 5)]}
        for name, questions in names.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(questions))
        defaults = {
            "data": {name: str(tmp_path / f"{name}.json") for name in names}
            | {"max_length": 25, "stride": 5},
            "model": {"name": str(tiny("bert"))},
            "train": {"epochs": 3, "batch_size": 2, "learning_rate": 1e-3},
            "zero": {"stage": 2},
        }
        assert sections.keys() <= defaults.keys()
        tables = {name: table | sections.get(name, {}) for name, table in defaults.items()}
        return Job.model_validate({"name": "t"} | tables)

    return make


def report(job, ranks=1):
    parts = check_data(job, ranks)
    return "\n".join(part if isinstance(part, str) else f"\n{markdown(part)}" for part in parts)


def table(text, first):
    """The Markdown table whose first column is called `first`, as rows."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


# 5 tokens around the context, [CLS] how long [SEP] ... [SEP], of 25: 20 are left for it, and each
# further window brings 15 new ones.
TRAIN = [
    row("short", 5),
    row("whole", 20),
    row("two windows", 21),
    row("cut", 40, answer=text(21)),
    row("bad", 5, answer_start=1),
]


def test_the_report_counts_questions_windows_padding_and_steps(job):
    told = report(job(TRAIN, data={"on_bad_row": "drop"}, train={"warmup": 0.5}))
    train, validation = table(told, "slice")
    # Of 10; 25; 25, 11; 25, 25, 15 tokens.
    assert train == {
        "slice": "train",
        "questions": "4",
        "dropped": "1",
        "windows": "7",
        "mean tokens": f"{136 / 7:.1f}",
        "longest": "25",
        "answers in no window": "1",
    }
    assert (validation["questions"], validation["windows"], validation["dropped"]) == (
        "1",
        "1",
        "0",
    )
    assert "dropped: train.json: row 5: answer text not at answer_start" in told
    assert f"({100 * (1 - 136 / (7 * 25)):.1f} % if every window were padded to 25)" in told
    steps = "4 an epoch, 12 in all; 2 windows each = 1 rank(s) x 2 x 1; learning rate at its peak"
    assert f"steps: {steps} from step 6" in told


def test_each_set_has_a_row_and_says_what_an_epoch_sees_of_it(job, tmp_path):
    (tmp_path / "more.json").write_text(json.dumps([row(f"m{n}", 5) for n in range(4)]))
    sets = [
        {"source": str(tmp_path / "train.json"), "weight": 0.5},
        {"source": str(tmp_path / "more.json"), "weight": 2.0},
    ]
    scored = [str(tmp_path / "validation.json"), {"source": str(tmp_path / "more.json")}]
    told = report(job(TRAIN[:4], data={"train": sets, "validation": scored}))
    rows = {found["slice"]: found for found in table(told, "slice")}
    assert [(name, found["windows"], found["seen"]) for name, found in rows.items()] == [
        ("train train", "7", "4"),  # 3.5, to the even one
        ("train more", "4", "8"),
        ("validation validation", "1", "-"),
        ("validation more", "4", "-"),
    ]
    assert "validation more: its 4 questions are those of train more" in told
    assert "steps: 6 an epoch, 18 in all" in told
    assert "on train.json (0.5 times an epoch) + " in told.replace(f"{tmp_path}/", "")


def test_three_windows_are_shown_as_the_model_will_see_them(job):
    """Tokens of the tiny vocabulary; of the long context those around the answer."""
    rows = [
        row("first", 5, answer="folds battery", answer_start=6),
        row("no", 5, answer="", answer_start=-1),
        row("long", 60, answer=f"{text(1)}", answer_start=0),
        row("last", 60, answer="beech", answer_start=len(text(30)) - 5),
    ]
    told = report(job(rows, data={"unanswerable": True, "max_length": 80})).splitlines()
    at = next(n for n, line in enumerate(told) if line.startswith("as the model sees 3"))
    assert told[at - 1] == (
        "lengths: windows of train have 10 to 65 tokens, half of them at most 37, nine of ten at"
        " most 65; 0 have all 80 (data.max_length)"
    )
    first, second, third = told[at + 1 : at + 4]
    assert first == "  10 tokens: [CLS] how long [SEP] river >> folds battery << before beech [SEP]"
    assert second == (
        f"  65 tokens: [CLS] how long [SEP] >> river << {text(13).removeprefix('river ')} ... [SEP]"
    )
    around = "battery before beech river folds battery before beech river folds battery before"
    assert third.startswith(f"  65 tokens: [CLS] how long [SEP] ... {around} >> beech << river")


def test_ceilings_and_leaks_stand_first(job):
    told = report(job([row("v", 5)])).splitlines()
    read = "read as rows of question, context, answer, answer_start, 1 question"
    assert told[1:5] == [
        "validation: its 1 questions are those of train: their scores tell how well they were"
        " learnt by heart; take others",
        f"train: {read}",
        f"validation: {read}",
        "",
    ]
    assert report(job([row("other", 6)])).splitlines()[1] == f"train: {read}"


def test_of_many_dropped_rows_the_first_five_are_named(job):
    rows = [row(str(n), 5, answer_start=n) for n in range(8)]
    told = report(job(rows, data={"on_bad_row": "drop"}))
    named = [line.split(": ")[2] for line in told.splitlines() if line.startswith("dropped: t")]
    assert named == [f"row {n}" for n in range(2, 7)]
    assert "\ndropped: and 2 more\n" in told


def test_rows_that_contradict_themselves_are_counted(job):
    rows = [row(str(n), 5) | {"is_impossible": n > 0} for n in range(3)]
    told = report(job(rows, data={"unanswerable": True})).splitlines()
    assert (
        "train: 2 questions taken as without an answer where is_impossible is true beside an"
        " answer, first: train.json: row 2"
    ) in told


def test_padding_is_that_of_the_batches_of_the_first_epoch(job):
    same = report(job([row(str(n), 5) for n in range(4)]))
    assert "padding: 0.0 % of the tokens computed (60.0 % if every" in same
    mixed = [row("a", 5), row("b", 15)]
    assert "padding: 25.0 % of the tokens computed" in report(job(mixed))
    assert "padding: 0.0 % of the" in report(job(mixed, train={"batch_size": 1}))
    pairs = [row(str(n), 5 + n % 2 * 10) for n in range(8)]
    assert "padding: 0.0 % of the" in report(job(pairs))
    assert "padding: 0.0 % of the" not in report(job(pairs, train={"length_buckets": False}))


@pytest.mark.parametrize(
    ("stage", "ranks", "weights", "gradients", "optimiser"),
    [
        (0, 1, 1, 1, 2),
        (0, 2, 1, 1, 2),
        (1, 2, 1, 1, 1.5),
        (2, 2, 1, 0.5, 1.5),
        (3, 2, 0.5, 0.5, 1.5),
    ],
)
def test_parameters_and_memory_of_bert_base(
    job, tiny, tmp_path, stage, ranks, weights, gradients, optimiser
):
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    config = AutoConfig.for_model("bert")
    config.save_pretrained(folder)
    shapes = {name: [*t.shape] for name, t in empty_model(config, "bert").state_dict().items()}
    save_hollow(folder / "model.safetensors", shapes)
    model = {"name": str(folder), "freeze": ["embeddings", "encoder.layer.0-2"]}
    told = report(job([row("a", 5)], model=model, zero={"stage": stage}), ranks)
    total, embeddings, layer = 108_893_186, 23_837_184, 7_087_872
    trained = total - embeddings - 3 * layer
    assert table(told, "part") == [
        {"part": part, "parameters": str(count), "trained": str(moving)}
        for part, count, moving in (
            ("embeddings", embeddings, 0),
            ("encoder.layer.0-2", 3 * layer, 0),
            ("encoder.layer.3-11", 9 * layer, 9 * layer),
            ("qa_outputs", 1538, 1538),
            ("all", total, trained),
        )
    ]
    # Shares of 4 bytes a parameter; AdamW keeps two moments, ZeRO a copy of the weights beside.
    states = 4 * (weights * total + (gradients + optimiser) * trained)
    assert f" {states / 2**30:.2f} GiB a rank in fp32 with ZeRO-{stage};" in told


def test_of_the_weights_the_header_alone_is_read(job, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    section = {"name": str(folder)}
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    told = report(job([row("a", 5)], model=section))
    content = weights.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    weights.write_bytes(content[:header])
    os.truncate(weights, size)  # no number of it is there
    assert report(job([row("a", 5)], model=section)) == told
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert report(job([row("a", 5)], model=section | {"sha256": sha256}))


def test_weights_that_the_run_would_refuse_are_refused(job, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["bert.embeddings.LayerNorm.bias"] = torch.zeros(5)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"1 tensors are .* such as bert.embeddings.LayerNorm.bias"):
        report(job([row("a", 5)], model={"name": str(folder)}))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="bin: cannot be read as pickled weights"):
        report(job([row("a", 5)], model={"name": str(folder)}))


def test_pickled_weights_are_told(job, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    told = report(job([row("a", 5)], model={"name": str(folder)}))
    assert "weights: pytorch_model.bin converted into safetensors, kept in " in told


@pytest.mark.parametrize(
    ("sections", "error", "told"),
    [
        ({"model": {"sha256": "0" * 64}}, DataError, "the job declares 000"),
        ({"model": {"name": "nobody/nothing"}}, AssetError, "hf download nobody/nothing"),
        ({"model": {"freeze": ["layers"]}}, JobError, "'layers' matches no parameter"),
        ({"data": {"max_length": 256}}, JobError, "this model takes 130"),
        ({"train": {"batch_size": 3}}, JobError, "do not divide over 2 ranks"),
    ],
)
def test_what_the_run_would_refuse_is_refused(job, sections, error, told):
    with pytest.raises(error, match=told):
        report(job([row("a", 5), row("b", 190)], **sections), ranks=2)
