"""Names of data sets and models, slices, and where files are looked for."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.job.sources import (
    DataSource,
    Slice,
    find_file,
    is_hub_model,
    package_folder,
    parse_data,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.json", DataSource("a.json", "file", "a.json")),
        ("x/a b.JSONL", DataSource("x/a b.JSONL", "file", "x/a b.JSONL")),
        ("a.csv[:5]", DataSource("a.csv[:5]", "file", "a.csv", slice=Slice(None, "5"))),
        ("a[1].json", DataSource("a[1].json", "file", "a[1].json")),
        (
            "/d/a.parquet[-10%:]",
            DataSource("/d/a.parquet[-10%:]", "file", "/d/a.parquet", slice=Slice("-10%", None)),
        ),
        ("o/n", DataSource("o/n", "hub", "o/n", split="train")),
        (
            "o/n-1.2:validation[10:20]",
            DataSource(
                "o/n-1.2:validation[10:20]",
                "hub",
                "o/n-1.2",
                split="validation",
                slice=Slice("10", "20"),
            ),
        ),
        (
            "o/n@refs/pr/1#xquad.en:test",
            DataSource(
                "o/n@refs/pr/1#xquad.en:test", "hub", "o/n", "test", "refs/pr/1", "xquad.en"
            ),
        ),
    ],
)
def test_parse_data(text, expected):
    assert parse_data(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither a file"),
        ("squad", "neither a file"),
        ("a.txt", "neither a file"),
        ("o/n\n", "neither a file"),
        ("o/n:", "neither a file"),
        ("../o/n", "neither a file"),
        ("a.json[:10", "neither a file"),
        ("a.json[::2]", "cannot be read"),
        ("a.json[1.5:]", "cannot be read"),
        ("a.json[five]", "cannot be read"),
        ("a.json[]", "cannot be read"),
        ("a.json[:0]", "never holds a question"),
        ("a.json[200:100]", "never holds a question"),
        ("o/n:train[20%:20%]", "never holds a question"),
        ("a.json[-5:-5]", "never holds a question"),
        ("a.json[100%:]", "never holds a question"),
    ],
)
def test_names_without_a_meaning(text, words):
    with pytest.raises(ValueError, match=words):
        parse_data(text)


@pytest.mark.parametrize(
    ("text", "total", "expected"),
    [
        ("[:]", 7, (0, 7)),
        ("[:1000]", 7, (0, 7)),
        ("[2:5]", 7, (2, 5)),
        ("[-3:]", 7, (4, 7)),
        ("[:-3]", 7, (0, 4)),
        ("[-5:5]", 3, (0, 3)),
        ("[10%:20%]", 1000, (100, 200)),
        ("[60%:500]", 800, (480, 500)),
        ("[-1%:]", 40, (40, 40)),
        ("[:-1%]", 40, (0, 40)),
        ("[-120%:]", 40, (0, 40)),
        ("[:50%]", 5, (0, 2)),
        ("[-50%:]", 5, (2, 5)),
        ("[5:6]", 3, (3, 3)),
        ("[:50%]", 0, (0, 0)),
    ],
)
def test_bounds(text, total, expected):
    part = parse_data(f"a.json{text}").slice
    assert part is not None
    assert part.bounds(total) == expected


BOUNDS = st.none() | st.integers(-300, 300).map(str) | st.integers(-120, 120).map("{}%".format)


@given(BOUNDS, BOUNDS, st.integers(0, 400))
def test_a_slice_lies_in_the_data_as_python_has_it(start, stop, total):
    low, high = Slice(start, stop).bounds(total)
    assert 0 <= low <= high <= total
    if "%" not in f"{start}{stop}":
        numbers = [int(bound) if bound else None for bound in (start, stop)]
        assert list(range(low, high)) == list(range(total))[slice(*numbers)]


@given(BOUNDS, BOUNDS)
def test_a_slice_that_is_refused_holds_nothing(start, stop):
    part = Slice(start, stop)
    if part.is_empty():
        assert not any(low < high for low, high in map(part.bounds, (*range(500), 10**6)))


@pytest.mark.parametrize(
    "text", ["[5:6]", "[-5:5]", "[60%:5]", "[0:1%]", "[:-5]", "[-2:-1]", "[:]"]
)
def test_a_slice_that_some_data_set_fills_is_not_refused(text):
    part = parse_data(f"a.json{text}").slice
    assert part is not None
    assert any(low < high for low, high in map(part.bounds, range(500)))


@given(st.integers(0, 400))
def test_percentages_split_without_gap_or_overlap(total):
    cuts = [0, 13, 50, 87, 100]
    parts = [Slice(f"{a}%", f"{b}%").bounds(total) for a, b in itertools.pairwise(cuts)]
    assert [n for low, high in parts for n in range(low, high)] == list(range(total))


@pytest.mark.parametrize("tail", ["", "[:10]", "[10%:]"])
def test_at_moves_the_file_and_keeps_the_slice(tail):
    moved = parse_data(parse_data(f"a.json{tail}").relocated(Path("/x/y [1:2].json")))
    assert (moved.location, moved.slice) == ("/x/y [1:2].json", parse_data(f"a.json{tail}").slice)


def test_a_file_beside_the_job_comes_before_one_in_the_current_folder(tmp_path, monkeypatch):
    job, here = tmp_path / "job", tmp_path / "here"
    for folder in (job, here):
        folder.mkdir()
        (folder / "both.json").touch()
    (here / "one.json").touch()
    monkeypatch.chdir(here)
    assert find_file("both.json", job) == job / "both.json"
    assert find_file("one.json", job) == here / "one.json"
    assert find_file("none.json", job) is None
    assert find_file(str(here / "one.json"), job) == here / "one.json"
    assert find_file(str(here / "none.json"), job) is None


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.json").touch()
    assert find_file("~/a.json", Path("/")) == tmp_path / "a.json"


@pytest.mark.parametrize(
    "location", ["a\0.json", "~no_such_user/a.json", "a" * 5000, "/" + "a" * 300, "x/" * 3000]
)
def test_names_that_no_file_can_have_are_not_found(location, tmp_path):
    assert find_file(location, tmp_path) is None


def test_a_folder_in_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "some_weights" / "model").mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_folder("some_weights/model") == tmp_path / "some_weights" / "model"
    assert package_folder("some_weights") == tmp_path / "some_weights"
    assert package_folder("some_weights/other") is None
    # Looking inside a package would import the one around it.
    assert package_folder("some_weights.model/x") is None
    assert "some_weights" not in sys.modules


@pytest.mark.parametrize(
    "name", ["", "/", "no_such_package/x", "../x", ".", "sys/x", "__main__/x", "json/a\0b", "a b/c"]
)
def test_no_package(name):
    assert package_folder(name) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert-base-uncased", True),
        ("google-bert/bert-base-uncased", True),
        ("o/n.v1_2", True),
        ("", False),
        ("o/n/m", False),
        ("/o", False),
        ("o/", False),
        ("./o", False),
        ("o n", False),
        ("o/n\n", False),
        ("o/" + "n" * 100, False),
    ],
)
def test_hub_ids(name, expected):
    assert is_hub_model(name) is expected
