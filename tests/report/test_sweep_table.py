"""The comparison of trials: means, intervals counted by hand, order, and what is missing."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from runner.cli.command import main
from runner.errors import DataError
from runner.report.sweep_table import compare_trials, ranked_trials
from tests.sample_runs import make_run, predictions


@pytest.fixture
def sweep(tmp_path):
    """`sweep({values: f1 or None, ...})` makes the folder of a sweep; F1 is EM + 10."""

    def make(trials: list[tuple[dict, float | None]], questions=None):
        entries = []
        for number, (values, f1) in enumerate(trials):
            name = f"trial-{number}"
            entries.append({"name": name, "values": values})
            if f1 is not None:
                (tmp_path / name).mkdir()
                metrics = {"f1": f1, "exact_match": f1 - 10, "loss": 2.5}
                (tmp_path / name / "result.json").write_text(json.dumps({"metrics": metrics}))
                lines = "\n".join(map(json.dumps, questions or []))
                (tmp_path / name / "predictions.jsonl").write_text(lines)
        manifest = {"name": "n", "trials": entries}
        (tmp_path / "sweep.json").write_text(json.dumps(manifest))
        return tmp_path

    return make


def test_seeds_are_put_together(sweep):
    rows = compare_trials(
        sweep(
            [
                ({"train.learning_rate": 1e-5, "seed": 1}, 50.0),
                ({"train.learning_rate": 1e-5, "seed": 2}, 54.0),
                ({"train.learning_rate": 1e-5, "seed": 3}, None),
                ({"train.learning_rate": 3e-5, "seed": 1}, 60.0),
                ({"train.learning_rate": 3e-5, "seed": 2}, 61.0),
                ({"train.learning_rate": 3e-5, "seed": 3}, 65.0),
            ]
        )
    )
    assert [row["learning_rate"] for row in rows] == [3e-5, 1e-5]  # the best first
    assert [row["runs"] for row in rows] == ["3/3", "2/3"]
    assert rows[0]["F1 %"] == 62.0
    assert rows[0]["EM %"] == 52.0
    assert rows[0]["loss"] == 2.5
    # t(0.975, 2) = 4.303; the deviation of 60, 61, 65 is sqrt(7)
    assert rows[0]["± F1"] == pytest.approx(4.303 * math.sqrt(7) / math.sqrt(3))
    assert rows[0]["± EM"] == rows[0]["± F1"]
    # t(0.975, 1) = 12.706
    assert rows[1]["± F1"] == pytest.approx(12.706 * statistics.stdev([50, 54]) / math.sqrt(2))


def test_many_seeds_come_near_the_normal_quantile(sweep):
    scores = [50.0 + (n % 7) for n in range(60)]
    [row] = compare_trials(sweep([({"seed": n}, score) for n, score in enumerate(scores)]))
    # t(0.975, 59) = 2.00100
    expected = 2.001 * statistics.stdev(scores) / math.sqrt(60)
    assert row["± F1"] == pytest.approx(expected, rel=1e-3)


def test_one_seed_has_an_interval_over_questions(sweep):
    right, half, wrong = ({"exact_match": f1 == 1, "f1": f1} for f1 in (1.0, 2 / 3, 0.0))
    [row] = compare_trials(sweep([({"train.epochs": 2}, 40.0)], [right, half, wrong, right]))
    f1 = [100, 100 * 2 / 3, 0, 100]
    assert row["± F1"] == pytest.approx(1.959964 * statistics.stdev(f1) / 2)
    assert row["± EM"] == pytest.approx(1.959964 * statistics.stdev([100, 0, 0, 100]) / 2)


@pytest.mark.parametrize("questions", [[], [{"answer": "a"}], [{"exact_match": True, "f1": 1.0}]])
def test_without_enough_questions_there_is_none(sweep, questions):
    [row] = compare_trials(sweep([({"train.epochs": 2}, 40.0)], questions))
    assert (row["F1 %"], row["± F1"]) == (40.0, None)


def test_what_has_no_result_comes_last(sweep):
    rows = compare_trials(sweep([({"seed": 1, "a.b": "x"}, None), ({"seed": 1, "a.b": "y"}, 1.0)]))
    assert [row["b"] for row in rows] == ["y", "x"]
    assert (rows[1]["F1 %"], rows[1]["± F1"], rows[1]["runs"]) == (None, None, "0/1")


def test_keys_of_one_name_stay_apart(sweep):
    [row] = compare_trials(
        sweep([({"train.batch_size": 8, "score.batch_size": 4, "a.c": [1]}, 1.0)])
    )
    assert list(row)[:3] == ["train.batch_size", "score.batch_size", "c"]
    assert row["c"] == "[1]"


@pytest.mark.parametrize("text", ["", "{}", '{"metrics": {"f1": 1}}', '{"metrics": {"f1": null}}'])
def test_a_result_that_cannot_be_read_is_named(sweep, text):
    folder = sweep([({"seed": 1}, 1.0)])
    (folder / "trial-0" / "result.json").write_text(text)
    with pytest.raises(DataError, match=r"trial-0/result\.json: cannot be read"):
        compare_trials(folder)


def test_the_best_trial_is_that_of_the_best_combination(sweep):
    folder = sweep(
        [
            ({"train.learning_rate": 1e-5, "seed": 1}, 40.0),
            ({"train.learning_rate": 1e-5, "seed": 2}, 66.0),
            ({"train.learning_rate": 3e-5, "seed": 1}, 60.0),
            ({"train.learning_rate": 3e-5, "seed": 2}, 61.0),
            ({"train.learning_rate": 9e-5, "seed": 2}, None),
        ]
    )
    assert [run.path.name for run in ranked_trials(folder)] == [
        *("trial-3", "trial-2", "trial-1", "trial-0")
    ]


def test_a_sweep_marks_its_best_and_has_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trials = []
    for number, found in enumerate((predictions(), predictions())):
        make_run(tmp_path / "s" / f"trial-{number}", found)
        trials.append({"name": f"trial-{number}", "values": {"train.epochs": number}})
    (tmp_path / "s" / "sweep.json").write_text(json.dumps({"name": "n", "trials": trials}))
    assert main(["report", "--sweep", "s"]) == 0
    said = capsys.readouterr().out
    assert said.count("best ") == 1
    assert "\nBest: s/trial-0\n" in said
    assert "Written: s/comparison.html" in said
    assert (tmp_path / "s" / "comparison.html").stat().st_size > 1000
