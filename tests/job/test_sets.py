"""Several sets of questions in a job: how they are written, named, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.cli.command import main
from runner.errors import JobError
from runner.job.assets import hub_assets
from runner.job.load import dump_job, first_difference, load_job
from runner.job.schema import Columns, Job
from runner.job.sources import parse_share, set_name
from runner.job.sweep import load_trials
from runner.run.folder import RunDir

JOB = """\
name = "n"
[data]
{data}
[model]
name = "google-bert/bert-base-uncased"
[train]
epochs = 1
batch_size = 8
learning_rate = 1e-5
{more}
"""
PLAIN = 'train = "a.json"\nvalidation = "b.csv"'
SEVERAL = """\
train = [
  "a.json[:10]",
  { source = "b.csv", name = "mine", weight = 2, sample = 7, columns = { question = "Frage" } },
]
validation = ["b.csv", { source = "owner/other:dev", sample = 5 }]
columns = { context = "Text" }"""


@pytest.fixture
def load(tmp_path: Path):
    """`load(data, more, *overrides)`: the job with this [data] and what comes after [train]."""
    for name in ("a.json", "b.csv"):
        (tmp_path / name).write_text("[]")

    def read(data: str = PLAIN, more: str = "", *overrides: str) -> Job:
        (tmp_path / "job.toml").write_text(JOB.format(data=data, more=more))
        return load_job(tmp_path / "job.toml", overrides)

    return read


@pytest.fixture
def problems(load, tmp_path):
    """What is wrong with a job, its folder left out."""

    def found(*arguments: str) -> list[str]:
        with pytest.raises(JobError) as caught:
            load(*arguments)
        return [line.removeprefix(f"{tmp_path}/") for line in caught.value.problems]

    return found


def test_one_form_for_one_name_and_for_several(load, tmp_path):
    one = load().data
    assert one.train == str(tmp_path / "a.json")
    assert [(s.source, s.name, s.weight, s.sample) for s in one.trained] == [
        (str(tmp_path / "a.json"), "a", 1.0, None)
    ]
    assert load('train = "a.json"\nsample = 3\nvalidation = "b.csv"').data.trained[0].sample == 3
    data = load(SEVERAL).data
    text, german = Columns(context="Text"), Columns(question="Frage")
    assert [(s.source, s.name, s.weight, s.sample, s.columns) for s in data.trained] == [
        (f"{tmp_path}/a.json[:10]", "a", 1.0, None, text),
        (str(tmp_path / "b.csv"), "mine", 2.0, 7, german),
    ]
    assert [(s.source, s.name, s.sample) for s in data.scored] == [
        (str(tmp_path / "b.csv"), "b", None),
        ("owner/other:dev", "other-dev", 5),
    ]
    assert data.described(data.trained, lambda name: name.rpartition("/")[2]) == (
        "a.json[:10] + b.csv, 7 of its questions drawn with the seed (2 times an epoch)"
    )
    table = load('train = "a.json"\nvalidation = { source = "b.csv", name = "dev" }').data
    assert [s.name for s in table.scored] == ["dev"]
    headed = load(f"{PLAIN.splitlines()[1]}\n[[data.train]]\nsource = 'a.json'").data
    assert [s.source for s in headed.trained] == [str(tmp_path / "a.json")]


def test_a_single_name_is_recorded_as_ever(load):
    recorded = load().model_dump(mode="json")["data"]
    assert {type(recorded[key]) for key in ("train", "validation")} == {str}


@pytest.mark.parametrize("data", [PLAIN, SEVERAL, 'train = "a.json"\nvalidation = "10%"'])
def test_the_record_reads_back_to_the_same_job(load, tmp_path, data):
    job = load(data)
    (tmp_path / "record.toml").write_text(dump_job(job))
    assert load_job(tmp_path / "record.toml") == job
    assert Job.model_validate(job.model_dump(mode="json")) == job
    assert Job.model_validate(job.model_dump()) == job


def test_the_run_folder_has_files_for_each_further_set(load, tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    assert run.further_sets == ()
    run = RunDir(run.path)
    run.job.write_text(dump_job(load(SEVERAL)))
    assert [path.name for path in run.tables] == [
        *("train.csv", "eval.csv", "eval-other-dev.csv", "probes.csv")
    ]
    assert {run.path / "predictions-other-dev.jsonl", *run.tables} <= {*run.written}


def test_what_the_hub_has_is_asked_of_it(load):
    names = [asset.name for asset in hub_assets(load(SEVERAL)) if asset.kind == "dataset"]
    assert names == ["owner/other"]
    assert not [a for a in hub_assets(load('train="a.json"\nvalidation="5%"')) if a.kind != "model"]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (
            'train = [\n"a.json",\n"no.json"]\nvalidation = "b.csv"',
            'job.toml:3: data.train.2: no file "no.json" beside the job file or in the current',
        ),
        (
            'train = [{ source = "no.csv[:5]" }]\nvalidation = "b.csv"',
            'job.toml:3: data.train.1: no file "no.csv" beside the job file or in the current',
        ),
        (
            'validation = "b.csv"\n[[data.train]]\nsource = "a.json"\nwieght = 2',
            "job.toml:6: data.train.1.wieght: unknown key; did you mean weight?",
        ),
        (
            'train = "a.json"\nvalidation = [{ source = "b.csv", weight = 2 }]',
            "job.toml:4: data.validation.1.weight: unknown key; allowed here: source, name, sample",
        ),
        (
            'train = [{ source = "a.json", weight = 0 }]\nvalidation = "b.csv"',
            "job.toml:3: data.train.1.weight: must be more than 0, found 0",
        ),
        (
            'train = [{ name = "x" }]\nvalidation = "b.csv"',
            "job.toml:3: data.train.1.source: is missing (a file or hub name with split and slice)",
        ),
        (
            'train = [{ source = "a.json", name = "a/b" }]\nvalidation = "b.csv"',
            'job.toml:3: data.train.1.name: "a/b" does not match',
        ),
        (
            'train = ["a.json[:5]", "a.json[5:]"]\nvalidation = "b.csv"',
            'job.toml:3: data.train: 2 sets are called a; call one { source = "...", name = "..."',
        ),
        (
            'train = []\nvalidation = "b.csv"',
            "job.toml:3: data.train: is empty; name a file or a hub data set",
        ),
        (
            'train = [["a.json"]]\nvalidation = "b.csv"',
            "job.toml:3: data.train.1: expected a string in quotes, found a list",
        ),
        (
            'train = 5\nvalidation = "b.csv"',
            "job.toml:3: data.train: expected a string in quotes, found 5",
        ),
        (
            'train = ["a.json"]\nvalidation = "b.csv"\nsample = 3',
            'job.toml:5: data.sample: is for a single train set; write train = [{ source = "...",'
            " sample = 3 }, ...]",
        ),
        (
            'train = "a.json"\nvalidation = "10%"\nvalidation_sample = 3',
            "job.toml:5: data.validation_sample: is for a single validation set; write",
        ),
        (
            'train = "a.json"\nvalidation = [{ source = "10%", sample = 3 }]',
            "job.toml:4: data.validation: sample beside '10%': write a smaller share",
        ),
        (
            'train = ["a.json", "5%"]\nvalidation = "b.csv"',
            "job.toml:3: data.train: '5%' names no data; a share is for validation",
        ),
        (
            'train = "a.json"\nvalidation = ["5%", "6%"]',
            "job.toml:4: data.validation: 2 sets are called held-out",
        ),
        (
            'train = "a.json"\nvalidation = "b.csv"\nunanswerable = true\ntuning = "a.txt"',
            "job.toml:6: data.tuning: 'a.txt' is neither a file of a kind that is read",
        ),
        (
            'train = "a.json"\nvalidation = "b.csv"\nunanswerable = true\ntuning = "5%"',
            "job.toml:6: data.tuning: '5%' names no data; a share is for validation",
        ),
        ('train = "a.json"\nvalidation = "0%"', "job.toml:4: data.validation: '0%' is neither a"),
        ('train = "a.json"\nvalidation = "100%"', "job.toml:4: data.validation: '100%' is neither"),
    ],
)
def test_a_wrong_set_is_named_with_its_line(problems, data, line):
    (found,) = problems(data)
    assert found.startswith(line)


def test_a_set_that_decides_must_be_there(problems, load):
    more = '[stop]\non = "other-def"\n[expect]\nf1 = 50.0\non = "zzz"'
    assert problems(SEVERAL, more) == [
        'job.toml:16: stop.on: no validation set is called "other-def"; did you mean other-dev?',
        'job.toml:19: expect.on: no validation set is called "zzz"; there is b or other-dev',
    ]
    assert load(SEVERAL, '[stop]\non = "b"').stop.on == "b"


def test_sets_may_be_given_on_the_command_line(load, problems, tmp_path):
    data = load(PLAIN, "", 'data.train=["a.json", {source="b.csv", weight=0.5}]').data
    assert [(s.name, s.weight) for s in data.trained] == [("a", 1.0), ("b", 0.5)]
    data = load(PLAIN, "", 'data.validation={source="b.csv", name="dev"}').data
    assert [s.name for s in data.scored] == ["dev"]
    assert load(PLAIN, "", "data.validation=20%").data.scored[0].name == "held-out"
    assert problems(PLAIN, "", 'data.train=["a.json", "no.csv"]') == [
        '--set: data.train.2: no file "no.csv" beside the job file or in the current folder'
    ]


def test_two_jobs_differ_in_the_key_that_differs(load):
    one, other = load(SEVERAL), load(SEVERAL.replace("weight = 2", "weight = 3"))
    assert first_difference(one, other) == "data.train.2.weight is 2.0 there and 3.0 now"


def test_a_sweep_may_go_over_sets(load, tmp_path):
    load(PLAIN, '[sweep.over]\ndata.train = ["a.json", ["a.json", "b.csv"], ["b.csv"]]')
    _, trials = load_trials(tmp_path / "job.toml")
    assert [len(trial.job.data.trained) for trial in trials] == [1, 2, 1]
    assert len({trial.name for trial in trials}) == 3


def test_check_names_all_training_sets(load, tmp_path, capsys):
    load(SEVERAL.replace("owner/other:dev", "a.json"))
    assert main(["check", str(tmp_path / "job.toml")]) == 0
    assert "a.json[:10] + " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/d/squadshifts_new_wiki_v1.0.json[:1000]", "squadshifts-new-wiki-v1-0"),
        ("/d/é.csv", "data"),
        ("rajpurkar/squad:validation[:10]", "squad-validation"),
        ("owner/set@v2#en:dev", "set-dev"),
        ("12.5%", "held-out"),
    ],
)
def test_a_set_is_called_after_its_file_or_repository(text, name):
    assert set_name(text) == name


def test_a_share_is_read():
    assert [parse_share(text) for text in ("10%", "12.5 %", "99%", "0%", "100%", "x.csv")] == [
        *(0.1, 0.125, 0.99, None, None, None)
    ]
