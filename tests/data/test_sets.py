"""Several sets of questions: joined, weighted, and some of them held out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.dataset import Dataset, Example, content_sha256
from runner.data.sampler import TrainSampler, WeightedSet, epoch_batches
from runner.data.splits import (
    Split,
    hold_out,
    joined,
    load_splits,
    weighted_sets,
    with_unique_ids,
)
from runner.data.windows import Windows, build_windows
from runner.errors import DataError
from runner.eval.caveats import caveats
from runner.job.schema import BatchLayout, Data, Model, Score, Train
from runner.model.load import ModelFiles, load_tokenizer

WORDS = "river folds battery before beech "


def dataset(*asked: tuple[str, str], source: str = "t.json") -> Dataset:
    """Questions by their ids and contexts."""
    examples = tuple(Example(name, "Who?", text, (text.split()[0],), (0,)) for name, text in asked)
    return Dataset(source, examples, content_sha256(examples), ())


# --- an epoch of weighted sets


@pytest.fixture(scope="module")
def questions_N() -> np.ndarray:
    """41 questions with 1 to 4 windows each."""
    draw = np.random.default_rng(5)
    return np.repeat(np.arange(41, dtype=np.int32), draw.integers(1, 5, 41))


@given(
    weight=st.floats(0.01, 5), first=st.integers(0, 9), seed=st.integers(0, 99), place=st.just(1)
)
def test_no_window_is_seen_twice_more_often_than_another(questions_N, weight, first, seed, place):
    """After any number of epochs, whatever the weight: nothing drifts."""
    part = WeightedSet(first, questions_N, weight)
    seen = Counter[int]()
    for epoch in range(7):
        rows = part.windows(seed, place, epoch)
        assert len(rows) == part.count
        seen.update((rows - first).tolist())
        counts = [seen[n] for n in range(len(questions_N))]
        assert seen.total() == sum(counts)
        assert max(counts) - min(counts) <= 1
        assert np.array_equal(part.windows(seed, place, epoch), rows)


def test_half_of_the_questions_and_then_the_others(questions_N):
    part = WeightedSet(0, questions_N, 0.5)
    one, other = (part.windows(3, 0, epoch) for epoch in (0, 1))
    both = {*questions_N[one].tolist()} & {*questions_N[other].tolist()}
    assert len(both) <= 1  # whose windows lie on both sides of the middle
    windows = Counter(questions_N.tolist())
    assert sum(Counter(questions_N[one].tolist())[q] == windows[q] for q in windows) >= 19
    assert {*one.tolist()} != {*part.windows(4, 0, 0).tolist()}
    assert {*one.tolist()} != {*part.windows(3, 1, 0).tolist()}
    passes = [WeightedSet(0, questions_N, 1.0).windows(3, 0, epoch).tolist() for epoch in (0, 1)]
    assert passes[0] != passes[1]  # each has an order of its own
    assert sorted(passes[0]) == sorted(passes[1])


def sampler(lengths_N, *sets: WeightedSet, **section) -> TrainSampler:
    train = Train(**{"epochs": 2, "batch_size": 6, "learning_rate": 1e-3} | section)
    return TrainSampler(lengths_N, train, BatchLayout(1, 6, 1), seed=9, rank=0, sets=sets)


def test_without_weights_the_order_is_what_it_was(questions_N):
    lengths_N = np.random.default_rng(0).integers(10, 300, len(questions_N))
    for epoch in (1, 2):
        was = epoch_batches(lengths_N, 6, 9, epoch - 1)
        now = sampler(lengths_N).epoch(epoch)
        assert [rows.tolist() for rows in now] == [rows.tolist() for rows in was]


@pytest.mark.parametrize("buckets", [True, False])
def test_every_epoch_has_the_same_steps_and_each_set_its_share(questions_N, buckets):
    first, second = questions_N, questions_N[:50]
    count = len(first) + len(second)
    lengths_N = np.random.default_rng(0).integers(10, 300, count)
    sets = (WeightedSet(0, first, 1 / 3), WeightedSet(len(first), second, 2.0))
    dealt = sampler(lengths_N, *sets, length_buckets=buckets)
    assert dealt.windows == round(len(first) / 3) + 100
    for epoch in (1, 2, 3):
        steps = dealt.epoch(epoch)
        assert len(steps) == dealt.steps
        rows = np.concatenate(steps)
        assert [len(step) for step in steps[:-1]] == [6] * (len(steps) - 1)
        assert (rows < len(first)).sum() == round(len(first) / 3)
        # Twice means twice, each.
        assert set(Counter(rows[rows >= len(first)].tolist()).values()) == {2}


# --- sets as one


@pytest.fixture
def tokenizer(tiny):
    return load_tokenizer(ModelFiles.locate(Model(name=str(tiny("bert")))))


def test_joined_windows_are_those_of_the_questions_end_to_end(tokenizer):
    parts = [
        dataset(("a", WORDS * 9), ("b", WORDS * 9), ("c", WORDS)),
        dataset(("d", f"{WORDS}x"), ("e", WORDS * 7)),
    ]
    splits = [Split(p, build_windows(p.examples, tokenizer, 32, 8), cached=True) for p in parts]
    whole = joined(splits)
    wanted = build_windows([e for p in parts for e in p.examples], tokenizer, 32, 8)
    assert [e.id for e in whole.dataset.examples] == [*"abcde"]
    for field in fields(Windows):
        mine, theirs = getattr(whole.windows, field.name), getattr(wanted, field.name)
        assert mine.dtype == theirs.dtype
        if not field.name.startswith("chars"):
            assert np.array_equal(mine, theirs), field.name
    # A context that both sets have is there twice; each token has the characters that it had.
    for n in range(len(wanted)):
        low, high = wanted.contexts_N2[n]
        mine, theirs = (
            w.chars_C2[w.chars_firsts_N[n] + low : w.chars_firsts_N[n] + high]
            for w in (whole.windows, wanted)
        )
        assert np.array_equal(mine, theirs)
    assert joined(splits[:1]) is splits[0]


def test_ids_that_several_sets_have_begin_with_the_sets_name():
    sets = {"one": dataset(("1", "x"), ("2", "x")), "two": dataset(("2", "y"), ("3", "y"))}
    found = with_unique_ids(sets)
    assert {name: [e.id for e in part.examples] for name, part in found.items()} == {
        "one": ["1", "one:2"],
        "two": ["two:2", "3"],
    }
    assert [part.sha256 for part in found.values()] == [part.sha256 for part in sets.values()]
    alone = {"one": sets["one"], "three": dataset(("7", "z"))}
    assert with_unique_ids(alone) == alone


# --- a share held out


@given(share=st.floats(0.02, 0.9), seed=st.integers(0, 99))
def test_whole_contexts_are_held_out_of_each_set(share, seed):
    """Also contexts that two sets have, whatever blanks are in them."""
    one = dataset(*((f"{n}", f"text {n // 3}") for n in range(300)))
    two = dataset(*((f"b{n}", f"  text  {n // 2 + 90}") for n in range(100)), source="two.csv")
    left, out = hold_out({"one": one, "two": two}, share, "x%", seed)

    def contexts(examples):
        return {" ".join(e.context.split()) for e in examples}

    kept = [e for part in left.values() for e in part.examples]
    assert not contexts(kept) & contexts(out.examples)
    assert {e.id for e in (*kept, *out.examples)} == {e.id for e in (*one.examples, *two.examples)}
    for name, part in (("one", one), ("two", two)):
        mine = {e.id for e in part.examples}
        held = sum(e.id in mine for e in out.examples)
        assert len(part.examples) - held == len(left[name].examples)
        # One context more at most, and those that the other set has drawn.
        assert share * len(mine) <= held <= share * len(mine) + 3 + 30
    assert out.source == "x% of t.json + two.csv"
    assert out.sha256 == content_sha256(out.examples)
    again = hold_out({"one": one, "two": two}, share, "x%", seed)
    assert again == (left, out)


def test_the_seed_decides_what_is_held_out():
    one = dataset(*((f"{n}", f"text {n}") for n in range(100)))
    drawn = [hold_out({"one": one}, 0.1, "10%", seed)[1].examples for seed in (1, 2)]
    assert [len(examples) for examples in drawn] == [10, 10]
    assert drawn[0] != drawn[1]


def test_a_set_about_one_text_cannot_be_divided():
    one = dataset(("a", "text"), ("b", "text"))
    with pytest.raises(DataError, match=r"10% of t\.json cannot be held out: too few texts"):
        hold_out({"one": one}, 0.1, "10%", 0)


# --- as a job names them


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files of questions, by name: a to c; a and b share an id, a and c a question."""
    monkeypatch.setenv("SPANTUNE_CACHE", str(tmp_path / "cache"))
    for name, ids in (("a", "123"), ("b", "345"), ("c", "67")):
        rows = [
            {"id": f"q{n}", "question": f"Who {n}?", "context": f"{WORDS * 3}{name}{n}"}
            | {"answer": "river", "answer_start": 0}
            for n in ids
        ]
        if name == "c":
            rows[0] |= {"question": "Who 1?", "context": f"{WORDS * 3}a1"}
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def test_sets_are_loaded_named_and_compared_pair_by_pair(files, tokenizer):
    section = Data.model_validate(
        {
            "train": [str(files / "a.json"), {"source": str(files / "b.json"), "weight": 2.0}],
            "validation": [str(files / "c.json"), {"source": str(files / "b.json"), "name": "too"}],
            "max_length": 128,
            "stride": 16,
        }
    )
    sets = load_splits(section, 1, tokenizer)
    assert [*sets.named()] == ["train a", "train b", "validation c", "validation too"]
    assert sets.trained() == ["train a", "train b"]
    assert [e.id for e in sets.training["b"].dataset.examples] == ["b:q3", "q4", "q5"]
    assert [e.id for e in sets.validation["too"].dataset.examples] == ["q3", "q4", "q5"]
    first, second = weighted_sets(section, sets)
    assert (first.first, first.weight, second.first, second.weight) == (0, 1.0, 3, 2.0)
    told = caveats(sets.named(), Score(), trained=sets.trained())
    shared = [line for line in told if "trained" not in line and " in train " in line]
    assert shared == [
        "validation c: 1 of 2 questions are also in train a, such as q6: their scores tell how well"
        " they were learnt by heart; take others",
    ]
    assert any(
        line.startswith("validation too: its 3 questions are those of train b") for line in told
    )
    again = load_splits(section, 1, tokenizer)
    assert all(split.cached for split in again.named().values())


def test_weights_of_one_are_none(files, tokenizer):
    both = [str(files / "a.json"), {"source": str(files / "b.json"), "weight": 1.0}]
    section = Data.model_validate({"train": both, "validation": str(files / "c.json")})
    assert weighted_sets(section, load_splits(section, 1, tokenizer)) == []


def test_no_validation_set_may_be_tuned_on(files, tokenizer):
    section = Data.model_validate(
        {
            "train": str(files / "a.json"),
            "validation": [str(files / "c.json"), str(files / "b.json")],
            "tuning": f"{files / 'b.json'}[:1]",
            "unanswerable": True,
        }
    )
    with pytest.raises(DataError, match=r"1 of its 1 questions are also in data\.validation b,"):
        load_splits(section, 1, tokenizer)


def test_a_share_of_several_sets_is_one_validation_set(files, tokenizer):
    section = Data.model_validate(
        {
            "train": [str(files / "a.json"), str(files / "b.json")],
            "validation": ["30%", str(files / "c.json")],
        }
    )
    sets = load_splits(section, 1, tokenizer)
    held = [e.id for e in sets.validation["held-out"].dataset.examples]
    trained = [e.id for split in sets.training.values() for e in split.dataset.examples]
    assert len(held) == 2
    assert sorted([*held, *trained]) == ["a:q3", "b:q3", "q1", "q2", "q4", "q5"]
    assert [*sets.validation] == ["held-out", "c"]
