"""Scores against cases worked by hand and against what the official scripts printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import DataError
from runner.metrics.squad import (
    ENGLISH,
    exact_match,
    f1,
    squad_scores,
    squad_v2_scores,
    tune_null_threshold,
)
from runner.metrics.statistics import bootstrap_interval, intervals
from tests.forked import forked

CHECKOUT = Path(__file__).parents[2]
DATA = Path(os.environ.get("SPANTUNE_TEST_DATA", CHECKOUT / "../shared/data"))


def questions(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    articles = json.loads(path.read_text("utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    return [(qa, paragraph["context"]) for paragraph in paragraphs for qa in paragraph["qas"]]


def rough_predictions(rows):
    """Right, nearly right, wrong and empty texts, by a rule that needs no random numbers."""
    table = {}
    for n, (qa, context) in enumerate(rows):
        words, texts = context.split(), [answer["text"] for answer in qa["answers"]]
        piece = " ".join(words[n % len(words) :][: n % 6])
        good = texts[n % len(texts)] if texts else ""
        rare = ("the", "a.", "\u2014", "\u00c9t\u00e9")[n % 4]
        table[qa["id"]] = (good, f"The {good}! {piece}", piece, "", good, rare, piece)[n % 7]
    return table


# What the official scripts print for `rough_predictions`. Version 2.0 adds with sum(), which rounds
# differently from Python 3.12 on; version 1.1 adds one by one.
OFFICIAL_NEW_WIKI = {"exact_match": 31.002771478961954, "f1": 39.62543206933123}
OFFICIAL_XQUAD = {"exact_match": 30.672268907563026, "f1": 38.47152237541256}
NEW_SUM = sys.version_info >= (3, 12)
OFFICIAL_V2 = {
    "exact": 58.341559723593285,
    "f1": 62.13558353147724 if NEW_SUM else 62.13558353147716,
    "total": 6078,
    "HasAns_exact": 30.0,
    "HasAns_f1": 37.924424984301936 if NEW_SUM else 37.92442498430191,
    "HasAns_total": 2910,
    "NoAns_exact": 84.375,
    "NoAns_f1": 84.375,
    "NoAns_total": 3168,
    "best_exact": 61.220796314577164,
    "best_exact_thresh": 0.37267080745341613,
    "best_f1": 63.57929013317729,
    "best_f1_thresh": 0.37267080745341613,
}
OFFICIAL_V2_PLAIN = {
    "exact": 45.29450477130635,
    "f1": 49.22667970450826 if NEW_SUM else 49.226679704508236,
    "total": 6078,
    "HasAns_exact": 31.27147766323024,
    "HasAns_f1": 39.48445334845401 if NEW_SUM else 39.48445334845396,
    "HasAns_total": 2910,
    "NoAns_exact": 58.17550505050505,
    "NoAns_f1": 58.17550505050505,
    "NoAns_total": 3168,
}


# The same of the questions in jobs/data, so that no machine skips it; for version 2.0 every third
# is left without its answers.
PRODUCTS = CHECKOUT / "jobs" / "data" / "product_qa_validation.json"
OFFICIAL_PRODUCTS = {"exact_match": 30.46594982078853, "f1": 39.368222144945726}
OFFICIAL_PRODUCTS_V2 = {
    "exact": 47.67025089605735,
    "f1": 53.00242569059774 if NEW_SUM else 53.002425690597725,
    "total": 279,
    "HasAns_exact": 31.182795698924732,
    "HasAns_f1": 39.1810578907353,
    "HasAns_total": 186,
    "NoAns_exact": 80.64516129032258,
    "NoAns_f1": 80.64516129032258,
    "NoAns_total": 93,
    "best_exact": 47.67025089605735,
    "best_exact_thresh": 0.6024844720496895,
    "best_f1": 53.21747945403862,
    "best_f1_thresh": 0.6211180124223602,
}
OFFICIAL_PRODUCTS_V2_PLAIN = {
    "exact": 37.992831541218635,
    "f1": 43.540060099199884,
    "total": 279,
    "HasAns_exact": 32.25806451612903,
    "HasAns_f1": 40.5789073531009,
    "HasAns_total": 186,
    "NoAns_exact": 49.46236559139785,
    "NoAns_f1": 49.46236559139785,
    "NoAns_total": 93,
}


# ---- normalisation


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("  a   an\tthe\nAn  ", ""),
        ("a.n apple", "apple"),  # punctuation goes first, then articles
        ("another theatre, anthem", "another theatre anthem"),
        ("well-known U.S. 1,000", "wellknown us 1000"),
        ("it's $5 (five)", "its 5 five"),
        ("\u201cthe\u201d", "\u201c \u201d"),  # only ASCII punctuation goes
        ("\u2014 the \u2014", "\u2014 \u2014"),
        ("x\u00a0y\u2003z", "x y z"),  # no-break and em space are spaces
        ("x\u200by", "x\u200by"),  # a zero-width space is not
        ("STRASSE stra\u00dfe \u00c9", "strasse stra\u00dfe \u00e9"),
        ("e\u0301 \u00e9", "e\u0301 \u00e9"),  # composed and decomposed stay different
        ("\u4e00 the \u4e8c", "\u4e00 \u4e8c"),
        ("\u00e9the the\u00e9", "\u00e9the the\u00e9"),  # a letter with accent is a letter
        ("", ""),
        ("?!", ""),
    ],
)
def test_normalise(text, normal):
    assert ENGLISH(text) == normal


@settings(max_examples=200)
@given(st.text(alphabet="aAnthe tT.,-\u00a0\u201c\u00c9", max_size=20))
def test_normalise_leaves_what_it_made(text):
    normal = ENGLISH(text)
    assert normal == " ".join(normal.split())
    # Removing an article can bring forth no other: its neighbours stay apart.
    assert ENGLISH(normal) == normal


# ---- one question


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "overlap"),
    [
        ("1976", ["1976"], True, 1),
        ("The 1976.", ["1975", "1976"], True, 1),
        ("in 1976", ["1976", "the year 1976"], False, Fraction(2, 3)),
        ("b b c", ["b c c"], False, Fraction(2, 3)),  # each word counts as often as in both
        ("b", ["b b b b"], False, Fraction(2, 5)),
        ("x", ["y"], False, 0),
        ("", ["y"], False, 0),
        ("", [""], True, 0),  # version 1.1: no common word, no F1
        ("the", ["a"], True, 0),
    ],
)
def test_one_question_by_hand(prediction, golds, exact, overlap):
    assert exact_match(prediction, golds) is exact
    assert f1(prediction, golds) == pytest.approx(float(overlap), abs=1e-15)


WORDS = st.lists(st.sampled_from("bcde"), max_size=6).map(" ".join)


@settings(max_examples=200)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_f1_is_the_best_overlap(prediction, golds):
    def overlap(gold):
        left, common = gold.split(), 0
        for word in prediction.split():
            if word in left:
                left.remove(word)
                common += 1
        both = len(prediction.split()) + len(gold.split())
        return Fraction(2 * common, both) if both else Fraction(0)

    assert f1(prediction, golds) == pytest.approx(float(max(map(overlap, golds))), rel=1e-14)
    assert exact_match(prediction, golds) == (prediction in golds)


# ---- version 1.1


def test_v1_scores_by_hand():
    scores = squad_scores(
        {"q2": "the b", "q1": "c d", "unknown": "x"}, {"q1": ["c"], "q2": ["b"], "q3": ["e"]}
    )
    assert scores.official() == {"exact_match": 100 / 3, "f1": 100.0 * (2 / 3 + 1) / 3}
    assert (scores.total, scores.missing, scores.ids) == (3, 1, ("q1", "q2", "q3"))
    assert scores.exact_N.tolist() == [0, 100, 0]
    assert scores.f1_N.tolist() == [100 * (2 / 3), 100, 0]


@pytest.mark.parametrize(
    ("name", "total", "printed"),
    [
        ("squadshifts_new_wiki_v1.0.json", 7938, OFFICIAL_NEW_WIKI),
        ("xquad_en_v1.1.json", 1190, OFFICIAL_XQUAD),
        (PRODUCTS, 279, OFFICIAL_PRODUCTS),
    ],
)
def test_v1_scores_equal_the_official_script(name, total, printed):
    rows = questions(name)
    predictions = rough_predictions(rows)
    for qa, _ in rows[::97]:
        del predictions[qa["id"]]
    references = {qa["id"]: [answer["text"] for answer in qa["answers"]] for qa, _ in rows}
    scores = squad_scores(predictions, references)
    assert scores.official() == printed
    assert (scores.total, scores.missing) == (total, len(rows[::97]))
    assert scores.f1_N.mean() == pytest.approx(scores.f1)


@pytest.mark.parametrize(
    ("references", "message"),
    [({}, "no questions"), ({"q1": ["b"], "q2": []}, "question q2: no right answer")],
)
def test_v1_refuses_what_it_cannot_score(references, message):
    with pytest.raises(DataError, match=message):
        squad_scores({"q1": "b"}, references)


# ---- version 2.0

V2 = {"answered": ["b c"], "wrong": ["d"], "none": [], "fooled": [], "articles": ["the"]}
V2_TEXT = {"answered": "b", "wrong": "e", "none": "", "fooled": "f", "articles": "an"}


def test_v2_scores_by_hand():
    scores = squad_v2_scores(V2_TEXT, V2)
    assert scores.exact_N.tolist() == [0, 0, 100, 0, 100]
    assert scores.f1_N.tolist() == [100 * (2 / 3), 0, 100, 0, 100]
    assert scores.has_answer_N.tolist() == [True, True, False, False, True]
    assert scores.official() == {
        "exact": 40.0,
        "f1": 100 * (2 / 3 + 1 + 1) / 5,
        "total": 5,
        "HasAns_exact": 100 / 3,
        "HasAns_f1": 100 * (2 / 3 + 1) / 3,
        "HasAns_total": 3,
        "NoAns_exact": 50.0,
        "NoAns_f1": 50.0,
        "NoAns_total": 2,
    }


def test_v2_threshold_empties_predictions_and_the_search_goes_question_by_question():
    doubt = {"answered": 0.1, "wrong": 0.2, "none": 0.9, "fooled": 0.5, "articles": 0.3}
    scores = squad_v2_scores(V2_TEXT, V2, doubt, threshold=0.2)
    assert scores.exact_N.tolist() == [0, 0, 100, 100, 0]  # the last three are taken as ""
    assert (scores.f1, scores.no_answer.f1) == (100 * (2 / 3 + 2) / 5, 100.0)
    # Nothing answered: 2 of 5. Then +2/3, +0, +1, -1, -0 for F1 and +0, +0, +1, -1, -0 for exact.
    assert (scores.best.f1, scores.best.f1_threshold) == (100 * (2 + 2 / 3 + 1) / 5, 0.3)
    assert (scores.best.exact_match, scores.best.exact_match_threshold) == (60.0, 0.3)
    assert squad_v2_scores(V2_TEXT, V2, doubt, threshold=0.3).f1 == scores.best.f1


def test_v2_best_threshold_follows_the_official_script_through_ties():
    # The script stops between questions of the same score, in the order in which they are given.
    golds, texts = {"right": ["b"], "fooled": []}, {"right": "b", "fooled": "c"}
    scores = squad_v2_scores(texts, golds, {"right": 0.4, "fooled": 0.4})
    assert (scores.best.exact_match, scores.best.exact_match_threshold) == (100.0, 0.4)
    scores = squad_v2_scores(texts, golds, {"fooled": 0.4, "right": 0.4})
    assert (scores.best.exact_match, scores.best.exact_match_threshold) == (50.0, 0.0)


@pytest.mark.parametrize(("golds", "absent"), [(["b"], "NoAns"), ([], "HasAns")])
def test_v2_parts_without_questions_are_absent(golds, absent):
    scores = squad_v2_scores({"q": "b"}, {"q": golds})
    assert not any(name.startswith(absent) for name in scores.official())
    assert (scores.has_answer is None, scores.no_answer is None) == (not golds, bool(golds))


@pytest.mark.parametrize(
    ("name", "printed", "printed_plain"),
    [
        ("squad_v2_dev_half.json", OFFICIAL_V2, OFFICIAL_V2_PLAIN),
        (PRODUCTS, OFFICIAL_PRODUCTS_V2, OFFICIAL_PRODUCTS_V2_PLAIN),
    ],
)
def test_v2_scores_equal_the_official_script(name, printed, printed_plain):
    rows = questions(name)
    if name is PRODUCTS:
        for qa, _ in rows[2::3]:
            qa["answers"] = []
    references = {qa["id"]: [answer["text"] for answer in qa["answers"]] for qa, _ in rows}
    # Coarse, so that many questions tie; in another order than the references; one too many.
    doubt = {
        qa["id"]: (n * 37 % 101 + 60 * (not qa["answers"])) / 161 for n, (qa, _) in enumerate(rows)
    }
    doubt = dict(reversed(doubt.items())) | {"unknown": 0.5}
    predictions = rough_predictions(rows) | {"unknown": "x"}
    assert squad_v2_scores(predictions, references, doubt, 0.6).official() == printed
    plain = squad_v2_scores(predictions, references).official()
    assert plain == printed_plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"references": {}}, "no questions"),
        ({"predictions": {"answered": "b"}}, "wrong, none, fooled and 1 more: no prediction"),
        ({"no_answer_scores": {**dict.fromkeys(V2, 0.0)}}, None),
        ({"no_answer_scores": dict.fromkeys(list(V2)[1:], 0.0)}, "answered: no no-answer score"),
    ],
)
def test_v2_refuses_what_the_official_script_stops_on(change, message):
    call = {"predictions": V2_TEXT, "references": V2} | change
    if message is None:
        assert squad_v2_scores(**call).total == 5
    else:
        with pytest.raises(DataError, match=message):
            squad_v2_scores(**call)


# ---- tuning the threshold


def score_at(threshold, texts, golds, difference, metric):
    answered = {id: "" if difference[id] > threshold else text for id, text in texts.items()}
    return getattr(squad_v2_scores(answered, golds), metric)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["b", "b c", ""]),
            st.sampled_from([[], ["b"], ["c d", "b c"]]),
            st.sampled_from([-3.0, -1.0, 0.0, 0.5, 4.0, float("inf"), float("-inf")])
            | st.floats(-9, 9),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(["f1", "exact_match"]),
)
def test_tuned_threshold_is_the_best_and_keeps_its_promise(rows, metric):
    texts, golds, difference = ({str(n): row[k] for n, row in enumerate(rows)} for k in range(3))
    tuned = tune_null_threshold(texts, golds, difference, metric)
    assert np.isfinite(tuned.threshold)
    reached = score_at(tuned.threshold, texts, golds, difference, metric)
    assert reached == pytest.approx(tuned.score)
    others = [-1e9, 0.0, 1e9, *filter(np.isfinite, difference.values())]
    tried = [score_at(t, texts, golds, difference, metric) for t in others]
    assert tuned.score >= max(tried) - 1e-9


def test_tuned_threshold_stands_in_the_middle_and_near_the_default():
    golds, texts = {"a": ["b"], "n": []}, {"a": "b", "n": "c"}
    tuned = tune_null_threshold(texts, golds, {"a": 1.0, "n": 4.0})
    assert (tuned.threshold, tuned.score) == (2.5, 100.0)
    assert tune_null_threshold({"n": "c"}, {"n": []}, {"n": 4.0}).threshold == 3.0
    assert tune_null_threshold({"a": "b"}, {"a": ["b"]}, {"a": 4.0}).threshold == 5.0
    # Right wherever it stands: nearest to 0 of -4, -1 (halfway between -3 and 1), and 2.
    same = tune_null_threshold({"x": "", "y": ""}, {"x": [], "y": []}, {"x": -3.0, "y": 1.0})
    assert same.threshold == -1.0
    # Between neighbouring floats there is no middle: rounding it must not reach the upper one.
    one = float(np.nextafter(1.0, 2.0))
    for low, high in ((1.0, one), (one, float(np.nextafter(one, 2.0)))):
        tuned = tune_null_threshold(texts, golds, {"a": low, "n": high})
        assert (tuned.score, low <= tuned.threshold < high) == (100.0, True)


def test_tuning_needs_every_difference():
    with pytest.raises(DataError, match="n: no null difference"):
        tune_null_threshold({"a": "b", "n": "c"}, {"a": ["b"], "n": []}, {"a": 1.0})


# ---- bootstrap


def test_bootstrap_interval_is_seeded_and_covers_the_mean():
    values = np.random.default_rng(0).normal(50, 10, 400)
    low, high = bootstrap_interval(values, seed=1)
    assert (low, high) == bootstrap_interval(values, seed=1)
    assert (low, high) != bootstrap_interval(values, seed=2)
    # The standard error of 400 values of deviation 10 is 0.5: the interval is near mean +- 0.98.
    assert low == pytest.approx(values.mean() - 0.98, abs=0.1)
    assert high == pytest.approx(values.mean() + 0.98, abs=0.1)
    narrow = bootstrap_interval(values, seed=1, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_interval_of_a_binary_score_meets_the_binomial_one():
    exact = np.repeat([0.0, 100.0], [300, 700])
    low, high = bootstrap_interval(exact, seed=0, resamples=4000)
    assert (low, high) == (pytest.approx(67.2, abs=0.3), pytest.approx(72.8, abs=0.3))
    assert bootstrap_interval(np.array([7.0]), seed=0) == (7.0, 7.0)


def test_bootstrap_draws_questions_with_replacement():
    """Drawing how often each value comes is drawing the questions themselves."""
    values = np.random.default_rng(4).choice([0.0, 40.0, 66.7, 100.0], 60, p=[0.3, 0.1, 0.2, 0.4])
    low, high = bootstrap_interval(values, seed=2, resamples=40_000)
    draw = np.random.default_rng(5)
    means = values[draw.integers(60, size=(40_000, 60))].mean(1)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.35)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.zeros(0)}, "N >= 1"),
        ({"values": np.zeros((2, 2))}, "N >= 1"),
        ({"level": 1.0}, "N >= 1"),
        ({"resamples": 0}, "N >= 1"),
        ({"values": np.array([1.0, np.nan])}, "finite"),
    ],
)
def test_bootstrap_refuses_nonsense(change, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**({"values": np.ones(3), "seed": 0} | change))


def test_intervals_of_all_parts():
    golds = {"a": ["red"], "b": [], "c": ["blue"], "d": []}
    scores = squad_v2_scores({"a": "red", "b": "", "c": "x", "d": "y"}, golds)
    found = intervals(scores, seed=3)
    half = bootstrap_interval(np.array([100.0, 0.0]), 3)
    assert found["has_answer_exact_match"] == found["has_answer_f1"] == half
    assert found["no_answer_exact_match"] == half
    assert found["exact_match"] == bootstrap_interval(np.array([100.0, 100.0, 0.0, 0.0]), 3)
    assert set(intervals(squad_scores({"a": "red"}, {"a": ["red"]}), 3)) == {"exact_match", "f1"}
    assert "no_answer_exact_match" not in intervals(squad_v2_scores({"a": ""}, {"a": ["x"]}), 3)


# ---- evaluate.Metric objects and imports

HUB_STYLE = """
import json, os, pathlib
import runner.eval.hf_metrics as objects
import evaluate
predictions = [{"id": "a", "prediction_text": "1976"}, {"id": "b", "prediction_text": "x"}]
references = [
    {"id": "a", "answers": {"text": ["1976", "in 1976"], "answer_start": [97, 94]}},
    {"id": "b", "answers": {"text": ["y x"], "answer_start": [1]}},
]
squad, v2 = objects.Squad(), objects.SquadV2()
first = squad.compute(predictions=predictions, references=references)
squad.add(prediction=predictions[0], reference=references[0])
squad.add_batch(predictions=predictions[1:], references=references[1:])
doubtful = [{**p, "no_answer_probability": 0.1 + 0.5 * n} for n, p in enumerate(predictions)]
references_v2 = [references[0], {"id": "b", "answers": {"text": [], "answer_start": []}}]
print(json.dumps({
    "first": first,
    "again": squad.compute(),
    "twice": squad.compute(
        predictions=predictions + predictions[:1], references=references + references[:1]
    ),
    "combined": evaluate.combine([squad]).compute(predictions=predictions, references=references),
    "v2": v2.compute(predictions=doubtful, references=references_v2, no_answer_threshold=0.5),
    "v2_default": v2.compute(predictions=doubtful, references=references_v2)["exact"],
    "names": [squad.name, v2.name, isinstance(v2, evaluate.Metric)],
    "files": sorted(str(p) for p in pathlib.Path.cwd().rglob("*") if p.is_file()),
    "folders": sorted(p.name for p in pathlib.Path.cwd().iterdir()),
}))
"""


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_metric_objects_speak_the_hubs_format_and_leave_nothing_behind(tmp_path, zygote, fresh):
    """In a process that has imported torch, or nothing at all, before."""
    home, script = tmp_path / "home", tmp_path / "script.py"
    (home / "scratch").mkdir(parents=True)
    script.write_text(HUB_STYLE)
    environment = {
        **dict.fromkeys(("HOME", "HF_HOME", "XDG_CACHE_HOME"), str(home)),
        "TMPDIR": str(home / "scratch"),  # torch makes an empty folder there
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(CHECKOUT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    caches = ("HF_METRICS_CACHE", "HF_EVALUATE_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE")
    if fresh:
        inherited = {name: value for name, value in os.environ.items() if name not in caches}
        out = subprocess.run(
            [sys.executable, script],
            cwd=home, env=inherited | environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        (line,) = out.stdout.splitlines()
    else:
        code = f"""
for name in {caches!r}:
    os.environ.pop(name, None)
os.environ |= {environment!r}
os.chdir({str(home)!r})
sys.dont_write_bytecode = True
"""
        (line,) = forked(zygote, script, code=code)
    said = json.loads(line)
    assert said["first"] == said["again"] == said["combined"]
    assert said["first"] == {"exact_match": 50.0, "f1": 100.0 * (1.0 + 2 / 3) / 2}
    assert said["twice"]["exact_match"] == 100.0 * 2 / 3
    v2 = said["v2"]
    assert (v2["exact"], v2["HasAns_total"], v2["NoAns_exact"]) == (100.0, 1, 100.0)
    assert (v2["best_exact"], v2["best_exact_thresh"]) == (100.0, float(np.float32(0.1)))
    assert said["v2_default"] == 50.0
    assert said["names"] == ["squad", "squad_v2", True]
    assert (said["files"], said["folders"]) == ([], ["scratch"])


def test_importing_metrics_stays_light():
    code = "import sys, runner.metrics.squad as m"
    code += "; print(*{'torch', 'evaluate', 'datasets'} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHECKOUT, check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert out.stdout.strip() == ""
