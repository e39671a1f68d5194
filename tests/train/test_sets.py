"""Whole runs on two training sets with weights, scored on two validation sets."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from runner.job.load import load_job
from runner.report.read import read_run
from runner.run.folder import RunDir
from runner.run.reproduce import compare_runs
from runner.utils.tables import read_rows
from tests.interruptions import DATA, STOP_SCORING, at_step, outcome, sets

# The second set's scores decide, and by its loss the first evaluation stays the best: the exported
# weights are those of an epoch before the last.
JOB = """
name = "two-sets"
[data]
train = [
  {{ source = "{data}/product_qa_train.json[:4]", name = "few", weight = 1.5 }},
  {{ source = "{data}/product_qa_train.json[20:24]", name = "more", weight = 0.5 }},
]
validation = [
  "{data}/product_qa_validation.json[:4]",
  {{ source = "{data}/product_qa_validation.json[4:10]", name = "second" }},
]
max_length = 96
stride = 24
[model]
name = "{model}"
precision = "fp32"
freeze = ["embeddings", "encoder.layer.0"]
cache_frozen = true
[train]
epochs = 3
batch_size = 8
learning_rate = 1e-2
log_every = 5
[stop]
metric = "loss"
patience = 9
min_delta = 100.0
on = "second"
[expect]
f1 = 50.0
tolerance = 50.0
on = "second"
"""


# What a tracker would be told.
TOLD = """
import json, runner.train.run_log
class Told:
    def log(self, table, row):
        with open({file!r}, "a") as file:
            file.write(json.dumps([table, row]) + chr(10))
    def resume(self, rows): pass
    def close(self): pass
runner.train.run_log.start_trackers = lambda *_: Told()
"""


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("job") / "job.toml"
    path.write_text(JOB.format(data=DATA, model=tiny("bert")))
    return path


@pytest.fixture(scope="module")
def run(zygote, job, tmp_path_factory) -> RunDir:
    """What nobody has disturbed, on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    told = TOLD.format(file=str(folder / "told"))
    codes, said = zygote.run(job, "--run-dir", folder / "run", ranks=2, whole=True, code=told)
    assert codes == [0, 0], said
    (folder / "said.txt").write_text(said)
    return RunDir(folder / "run")


def test_a_killed_run_goes_on_to_the_same_bits(zygote, job, run, tmp_path):
    """In the second epoch, when the second set's table has a row."""
    expected = outcome(run.path)
    steps = int(expected["train.csv"][-1]["step"]) // 3
    code = at_step(steps + 2, 0, "os.kill(os.getpid(), signal.SIGKILL)")
    codes, text = zygote.run(job, "--run-dir", tmp_path, ranks=2, code=code)
    assert -signal.SIGKILL in codes, text
    # What came after the checkpoint comes again: here, rows that nobody committed.
    table = RunDir(tmp_path).eval_table_of("second")
    assert len(read_rows(table)) == 1
    table.write_text(table.read_text() + table.read_text().splitlines()[1] + "\n")
    codes, text = zygote.run(job, "--run-dir", tmp_path, ranks=2)
    assert codes == [0, 0], text
    assert f"goes on after step {steps} " in text
    assert [row["epoch"] for row in read_rows(table)] == ["1", "2", "3"]
    assert outcome(tmp_path) == expected


def test_a_run_that_is_stopped_while_it_scores_goes_on_to_the_same_bits(zygote, job, run, tmp_path):
    codes, text = zygote.run(job, "--run-dir", tmp_path, ranks=2, code=STOP_SCORING)
    assert codes == [75, 75], text
    assert not RunDir(tmp_path).eval_table_of("second").exists()
    # Weights belong to a checkpoint, also where the record of the job says that it was never other.
    record, other = RunDir(tmp_path).job, tmp_path / "other.toml"
    was = record.read_text()
    for path in (record, other):
        path.write_text(was.replace("weight = 1.5", "weight = 2.5"))
    codes, text = zygote.run(other, "--run-dir", tmp_path, ranks=2)
    assert codes == [65, 65], text
    assert "the content of data.train has changed, or a weight" in text
    record.write_text(was)
    codes, text = zygote.run(job, "--run-dir", tmp_path, ranks=2)
    assert codes == [0, 0], text
    assert outcome(tmp_path) == outcome(run.path)
    assert compare_runs(run, RunDir(tmp_path), load_job(job)).results == []


def test_each_set_has_its_table_its_answers_and_its_scores(run):
    result = json.loads(run.result.read_text())
    second = result["sets"]["second"]
    assert result["epoch"] == 1  # on the second set, loss fell by less than min_delta
    assert (result["questions"], second["questions"]) == (4, 6)
    assert second["data"]["source"] == f"{DATA}/product_qa_validation.json[4:10]"
    first_rows, rows = read_rows(run.eval_table), read_rows(run.eval_table_of("second"))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [*rows[0]] == [*first_rows[0]]
    for found, table in ((result, first_rows), (second, rows)):
        assert float(table[0]["f1_percent"]) == found["metrics"]["f1"]
        assert float(table[0]["validation_loss_nats"]) == found["metrics"]["loss"]
    asked = [json.loads(line)["id"] for line in run.predictions.read_text().splitlines()]
    others = run.predictions_of("second").read_text().splitlines()
    assert (len(asked), len(others)) == (4, 6)
    assert not {json.loads(line)["id"] for line in others} & {*asked}


def test_trackers_are_told_of_each_set(run):
    lines = (run.path.parent / "told").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = [row for table, row in rows if table == "eval-second"]
    table = read_rows(run.eval_table_of("second"))
    assert [row["f1_percent"] for row in found] == [float(row["f1_percent"]) for row in table]
    ((name, last),) = rows[-1:]
    metrics = json.loads(run.result.read_text())["sets"]["second"]["metrics"]
    assert (name, last["second/loss"]) == ("result", metrics["loss"])


def test_each_training_set_is_seen_as_often_as_its_weight_says(run):
    said = (run.path.parent / "said.txt").read_text()
    windows = {
        name: int(re.search(rf"train {name}: \d+ questions in (\d+) windows", said)[1])
        for name in ("few", "more")
    }
    for name, weight in (("few", 1.5), ("more", 0.5)):
        seen = round(weight * windows[name])
        assert re.search(rf"train {name}: .* on average, {seen} seen an epoch", said)
    steps = -(-(round(1.5 * windows["few"]) + round(0.5 * windows["more"])) // 8)
    assert [int(row["step"]) for row in read_rows(run.eval_table)] == [
        steps * epoch for epoch in (1, 2, 3)
    ]


def test_what_a_run_says_has_a_row_for_each_set(run):
    said = (run.path.parent / "said.txt").read_text().splitlines()
    rows = [line.split()[:2] for line in said if re.match(r" +[123] +(product|second)", line)]
    names = ["product-q...", "second"]
    each = [[str(epoch), name] for epoch in (1, 2, 3) for name in names]
    assert rows[-6:] == each
    assert max(len(line) for line in said if "±" in line) <= 80
    (end,) = [n for n, line in enumerate(said) if line.startswith("Exact match")][:1]
    assert said[end + 1].startswith("Exact match")
    assert said[end + 1].endswith("product_qa_validation.json[4:10]")
    assert any("eval-*, predictions-*" in line for line in said)


def test_all_sets_stand_in_the_record_and_on_the_page(run):
    data = json.loads(run.provenance.read_text())["data"]
    assert [*data] == [
        *("train few", "train more", "validation product-qa-validation", "validation second")
    ]
    found = read_run(run.path)
    assert [one.name for one in found.sets] == ["second"]
    text = run.report.read_text()
    for heading in ("Validation sets", "Set second", "Where it is wrong in second"):
        assert f"\n## {heading}\n" in text
    assert "product_qa_train.json\\[:4\\] \\+ product_qa_train.json\\[20:24\\]" in text.replace(
        " + ", " \\+ "
    )
    card = (run.model / "README.md").read_text()
    assert "`product_qa_train.json[:4]` (1.5 times an epoch) + `product_qa_train.json" in card
    assert "| validation second | `product_qa_validation.json[4:10]` |" in card
    second = json.loads(run.result.read_text())["sets"]["second"]["metrics"]
    scores = f"exact match {second['exact_match']:.2f}, F1 {second['f1']:.2f}."
    assert f"\nOn `product_qa_validation.json[4:10]`: {scores}\n" in card
    assert str(DATA) not in card


def test_what_is_missed_on_another_set_ends_with_78(zygote, job, run):
    words = [job, "--run-dir", run.path, *sets("expect.f1=100.0", "expect.tolerance=0.0")]
    codes, text = zygote.run(*words)
    assert codes == [78], text
    result = json.loads(run.result.read_text())["sets"]["second"]["metrics"]
    assert f"f1 is {result['f1']:.2f}, " in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("weight = 1.5", "data.train.1.weight is 1.5 there and 2.5 now"),
        ('name = "second"', 'data.validation.2.name is "second" there and "third" now'),
    ],
)
def test_a_run_whose_sets_have_changed_is_another_jobs(zygote, job, run, tmp_path, change, words):
    text = job.read_text().replace('on = "second"', "")
    other = {"weight = 1.5": "weight = 2.5", 'name = "second"': 'name = "third"'}[change]
    if change.startswith("weight"):
        text = job.read_text()
    (tmp_path / "job.toml").write_text(text.replace(change, other))
    overrides = sets("stop.on=third") if "third" in other else []
    codes, said = zygote.run(tmp_path / "job.toml", "--run-dir", run.path, *overrides)
    assert codes == [65], said
    assert words in said


HELD_OUT = """
name = "held-out"
[data]
train = "{data}/product_qa_train.json[:40]"
validation = "25%"
max_length = 96
stride = 24
[model]
name = "{model}"
[train]
epochs = 1
batch_size = 8
learning_rate = 1e-3
"""


def test_a_share_is_held_out_by_whole_texts_and_recorded(zygote, tiny, tmp_path):
    (tmp_path / "job.toml").write_text(HELD_OUT.format(data=DATA, model=tiny("bert")))
    run = RunDir(tmp_path / "run")
    codes, said = zygote.run(tmp_path / "job.toml", "--run-dir", run.path, whole=True)
    assert codes == [0], said
    result = json.loads(run.result.read_text())
    assert 10 <= result["questions"] <= 20
    assert "are about" not in said  # no caveat: no text is on both sides
    data = json.loads(run.provenance.read_text())["data"]
    assert data["validation"]["source"] == f"25% of {DATA}/product_qa_train.json[:40]"
    assert f"on 25% of {DATA}" in said or "on 25% of jobs/data" in said
    assert "scored on 25% of product_qa_train.json\\[:40\\]." in run.report.read_text()
    assert "On 25% of `product_qa_train.json[:40]`:" in (run.model / "README.md").read_text()


REAL = """
name = "real-sets"
seed = 1
[data]
train = [
  {{ source = "{data}/squadshifts_new_wiki_v1.0.json", sample = 60, weight = 0.5 }},
  {{ source = "{data}/squad_v2_dev_half.json[:3700]", name = "v2", sample = 20, weight = 2.0 }},
]
validation = [
  {{ source = "{data}/xquad_en_v1.1.json", sample = 20 }},
  {{ source = "{data}/squad_v2_dev_half.json[3708:]", name = "v2", sample = 20 }},
]
unanswerable = true
[model]
name = "{model}"
[train]
epochs = 2
batch_size = 16
learning_rate = 3e-4
[stop]
on = "v2"
"""


@pytest.mark.slow
def test_real_weights_on_real_sets_go_on_to_the_same_bits(zygote, real_data, minilm, tmp_path):
    (tmp_path / "job.toml").write_text(REAL.format(data=real_data, model=minilm))
    start = (tmp_path / "job.toml", "--run-dir")
    codes, said = zygote.run(*start, tmp_path / "full", ranks=2)
    assert codes == [0, 0], said
    expected = outcome(tmp_path / "full")
    assert expected["sets"]["v2"]["metrics"].keys() >= {"has_answer_f1", "no_answer_exact_match"}
    steps = int(expected["train.csv"][-1]["step"]) // 2
    code = at_step(steps + 2, 1, "os.kill(os.getpid(), signal.SIGKILL)")
    codes, said = zygote.run(*start, tmp_path / "cut", ranks=2, code=code)
    assert -signal.SIGKILL in codes, said
    codes, said = zygote.run(*start, tmp_path / "cut", ranks=2)
    assert codes == [0, 0], said
    assert f"goes on after step {steps} " in said
    assert outcome(tmp_path / "cut") == expected
