"""Reports of run folders: what stands in them, what is refused, that they stay light."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runner.errors import DataError, RunDirError, StorageError
from runner.report.comparison_page import short_names
from runner.report.read import read_run
from runner.report.render import write_comparison, write_report
from runner.report.training_section import _best_epochs, thinned
from runner.run.folder import RunDir
from runner.run.lease import Lease
from tests.sample_runs import add_set, make_evaluation, make_run, predictions

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden"


def text_of(run: Path) -> str:
    return RunDir(run).report.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["report.md", "report_v2.md"])
def test_a_runs_report_is_the_golden_one(tmp_path, name):
    """If a change of the report is meant, write the golden file anew and say why."""
    v2 = name == "report_v2.md"
    run = make_run(tmp_path / "run", predictions(unanswerable=v2), unanswerable=v2)
    make_evaluation(run / "evaluations" / "other.json", predictions(20))
    lines = write_report(run)
    assert text_of(run) == (GOLDEN / name).read_text(encoding="utf-8")
    assert re.match(r"sample: exact match [\d.]+ % \[[\d.]+ to [\d.]+\], F1 ", lines[0])
    assert lines[1] == f"Written: {run / 'report.html'}"


def test_the_comparison_is_the_golden_one(tmp_path):
    first = make_run(tmp_path / "runs" / "first", predictions())
    second = make_run(tmp_path / "runs" / "second", predictions(better=6), rate="5e-5")
    lines = write_comparison([first, second], tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert text == (GOLDEN / "comparison.md").read_text(encoding="utf-8")
    assert lines[0].startswith("sample second has ")
    assert lines[-1].endswith("comparison.md")
    assert (tmp_path / "out" / "comparison.html").is_file()


def test_what_a_run_has_found_doubtful_stands_with_its_scores(tmp_path):
    run = RunDir(make_run(tmp_path / "run", predictions()))
    result = json.loads(run.result.read_text())
    run.result.write_text(json.dumps(result | {"caveats": ["validation: <3> of 8 are long"]}))
    write_report(run.path)
    scores = text_of(run.path).split("\n## ")[1]
    assert scores.startswith("Scores")
    assert "validation: \\<3\\> of 8 are long" in scores


def test_a_report_says_that_only_a_sample_was_scored(tmp_path):
    runs = [make_run(tmp_path / name, predictions()) for name in ("first", "second")]
    for run in runs:
        job = RunDir(run).job
        sampled = 'dev.json"\nsample = 1200\nvalidation_sample = 40\n'
        job.write_text(job.read_text().replace('dev.json"\n', sampled))
    write_report(runs[0])
    part = "40 of its questions drawn with the seed"
    whole = "train.json\\[:900\\], 1,200 of its questions drawn with the seed"
    assert f"fine-tuned on {whole}, scored on dev.json, {part}.\n" in text_of(runs[0])
    write_comparison(runs, tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert f"Scored on dev.json, {part}; each" in text


def test_each_validation_set_has_its_part_of_the_page(tmp_path):
    run, one = (make_run(tmp_path / name, predictions()) for name in ("run", "one"))
    add_set(run, "second", predictions(60, better=9))
    write_report(one)
    write_report(run)
    alone = text_of(one)
    text = text_of(run)
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert [name for name in headings if f"\n## {name}\n" not in alone] == [
        *("Validation sets", "Set second", "Where it is wrong in second", "Worst misses in second")
    ]
    table = text.split("## Validation sets")[1].split("\n## ")[0]
    assert re.search(r"\| dev \| dev\.json \| 40 \| ", table)
    assert re.search(r"\| second \| second\.json \| 60 \| ", table)
    # A comparison goes on about the first.
    other = make_run(tmp_path / "other", predictions(better=6))
    write_comparison([run, other], tmp_path / "out")
    compared = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "Scored on dev.json; each" in compared
    assert "| data.validation.2.source | second.json | - |" in compared
    assert "/somewhere" not in compared
    # A run that is not finished has no scores of it yet.
    RunDir(run).result.unlink()
    RunDir(run).predictions_of("second").unlink()
    RunDir(run).report.unlink()
    RunDir(run).report_page.unlink()
    write_report(run)
    assert "## Set second" not in text_of(run)


@pytest.mark.parametrize("validation", ["[]", "5", '[{ name = "x" }]', "[5]"])
def test_a_record_whose_sets_are_none_is_refused(tmp_path, validation):
    run = RunDir(make_run(tmp_path / "run", predictions()))
    run.job.write_text(run.job.read_text().replace('"/somewhere/dev.json"', validation))
    with pytest.raises(DataError, match=r"job\.toml: not the job of a run"):
        write_report(run.path)


def test_a_run_that_is_still_going_has_a_report_without_scores(tmp_path):
    run = make_run(tmp_path / "run", predictions(), finished=False)
    RunDir(run).predictions.unlink()
    assert write_report(run)[0] == "sample: not finished, no score yet"
    text = text_of(run)
    assert "not finished, so there is no score yet" in text
    assert "## Training" in text
    assert "## Scores" not in text
    assert "## Where it is wrong" not in text


def test_an_evaluation_has_a_report_of_its_own(tmp_path):
    folder = make_evaluation(tmp_path / "dev.json", predictions(20))
    write_report(folder)
    text = text_of(folder)
    assert text.startswith("# dev.json\n\nruns/sample, scored on other.json.\n")
    assert "## Worst misses" in text
    assert "## Training" not in text


def test_a_run_that_just_ends_is_reported_before_its_result_is_written(tmp_path):
    run = make_run(tmp_path / "run", predictions())
    result = json.loads(RunDir(run).result.read_text())
    RunDir(run).result.unlink()
    write_report(run, result)
    assert "## Scores" in text_of(run)
    assert not RunDir(run).result.exists()


def test_a_report_can_be_written_elsewhere(tmp_path):
    run = make_run(tmp_path / "run", predictions())
    RunDir(run).curves_svg.write_text("<svg/>")
    place = tmp_path / "new" / "place"
    write_report(run, folder=place)
    assert (place / "report.html").is_file()
    assert not RunDir(run).report.exists()
    pictures = re.findall(r"!\[curves\]\((.*?)\)", text_of(place))
    assert [(place / name).read_text() for name in pictures] == ["<svg/>"]


def test_folders_of_this_machine_stay_out_of_the_pages_own_words(tmp_path):
    run = make_run(tmp_path / "run", predictions(unanswerable=True), unanswerable=True)
    write_report(run)
    before_the_job = text_of(run).partition("## Job")[0]
    assert "/somewhere" not in before_the_job


# ---- several runs


def test_three_runs_are_compared_with_the_first(tmp_path):
    runs = [
        make_run(tmp_path / str(better), predictions(60, better), name=f"run-{better}")
        for better in (0, 3, 12)
    ]
    lines = write_comparison(runs, tmp_path)
    assert [line.split(" has ")[0] for line in lines[:-2]] == ["run-3", "run-3", "run-12", "run-12"]
    text = (tmp_path / "comparison.md").read_text()
    assert "adjusted for the number of comparisons (Holm)" in text
    assert "Only run-12 answers exactly" in text
    assert text.count("| run-3 |") >= 3


def test_runs_of_other_questions_are_not_compared(tmp_path):
    rows = predictions(20)
    first = make_run(tmp_path / "a", rows)
    others = [row | {"id": f"x{row['id']}"} for row in rows]
    second = make_run(tmp_path / "b", others)
    with pytest.raises(DataError, match=r"a and .*b: .*no question is in both"):
        write_comparison([first, second], tmp_path)
    partly = make_run(tmp_path / "c", rows[:5] + others[5:])
    write_comparison([first, partly], tmp_path)
    assert "| sample a | 5 |" in (tmp_path / "comparison.md").read_text()
    RunDir(second).predictions.unlink()
    with pytest.raises(DataError, match=r"has no predictions\.jsonl"):
        write_comparison([first, second], tmp_path)


def test_names_tell_runs_apart(tmp_path):
    rows = predictions(10)
    paths = [("x/1", "a"), ("x/2", "a"), ("y/1", "a"), ("y/2", "b")]
    runs = [read_run(make_run(tmp_path / p, rows, name=n)) for p, n in paths]
    assert short_names(runs) == ["a 1 (1)", "a 2", "a 1 (3)", "b"]


# ---- what is refused


def test_other_folders_are_no_runs(tmp_path):
    with pytest.raises(RunDirError, match="neither a run folder nor an evaluation"):
        write_report(tmp_path)
    with pytest.raises(RunDirError):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("job.toml", "name = ", "job.toml: not the job of a run"),
        ("job.toml", 'name = "x"', "job.toml: not the job of a run"),
        ("result.json", "{", "result.json: not valid JSON"),
        ("predictions.jsonl", '{"id": "a"}\n', r"predictions.jsonl:1: not a line of this version"),
        ("predictions.jsonl", "\n\nx\n", r"predictions.jsonl:3: not valid JSON"),
        ("provenance.json", "\udcff", "provenance.json: cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, words):
    run = make_run(tmp_path / "run", predictions(5))
    (run / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=words):
        write_report(run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, None) for key in ("id", "question", "answer", "score", "answers", "answer_starts")),
        *((key, None) for key in ("start", "end", "windows", "context_tokens", "excerpts")),
        ("context_characters", "many"),
        ("f1", True),
        ("answer_starts", []),
        ("excerpts", ["text"]),
    ],
)
def test_every_key_that_a_page_uses_is_checked(tmp_path, key, value):
    rows = predictions(5)
    assert not rows[0]["exact_match"]
    rows[0][key] = value
    if value is None:
        del rows[0][key]
    run = make_run(tmp_path / "run", rows)
    with pytest.raises(DataError, match=rf"predictions\.jsonl:1: not a line .*\({key}: absent"):
        write_report(run)


def test_a_report_that_a_person_wrote_beside_a_job_stays(tmp_path):
    run = RunDir(make_run(tmp_path / "run", predictions()))
    run.report.write_text("mine")
    with pytest.raises(DataError, match="is not a run that spantune made"):
        write_report(run.path)
    assert run.report.read_text() == "mine"
    write_report(run.path, folder=tmp_path / "elsewhere")
    # Ours is renewed.
    Lease.acquire(run).release(0)
    write_report(run.path)
    assert run.report.read_text() != "mine"


@pytest.mark.parametrize("ends", [False, True])
def test_a_run_without_its_job_is_no_evaluation(tmp_path, ends):
    """Its file was lost, before or while the run that just ends went on."""
    run = RunDir(make_run(tmp_path / "run", predictions()))
    result = json.loads(run.result.read_text())
    run.job.unlink()
    if ends:
        run.result.unlink()
    with pytest.raises(StorageError, match=r"job\.toml: No such file"):
        write_report(run.path, result if ends else None)


def test_many_steps_become_few_points():
    points = [(n / 100, float(n)) for n in range(1000)]
    few = thinned(points)
    assert len(few) <= 300
    assert few[-1][0] == points[-1][0]
    assert sum(y for _, y in few) / len(few) == pytest.approx(499.5, rel=0.01)
    assert thinned(points[:10]) == points[:10]
    assert thinned([]) == []


def test_reporting_stays_light(tmp_path):
    run = make_run(tmp_path / "run", predictions(5))
    script = "import sys; from runner.report.render import write_report as w; w(sys.argv[1]); "
    script += "print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, run], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"torch", "transformers", "datasets", "deepspeed", "evaluate", "matplotlib"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize(
    ("losses", "f1", "exact", "words"),
    [
        ([3, 1, 2], [1, 2, 3], [5, 6, 7], "2; F1 and exact match were highest after epoch 3."),
        ([3, 2, 1], [1, 3, 2], [5, 6, 7], "3; F1 was highest after epoch 2, exact match after"),
    ],
)
def test_after_which_epoch_it_was_best_is_said(losses, f1, exact, words):
    rows = [
        {
            "epoch": str(epoch),
            "validation_loss_nats": str(found[0]),
            "f1_percent": str(found[1]),
            "exact_match_percent": str(found[2]),
        }
        for epoch, found in enumerate(zip(losses, f1, exact, strict=True), 1)
    ]
    assert _best_epochs(rows).startswith(f"Validation loss was lowest after epoch {words}")
