"""Metric tables: what is appended is read back, and shown as it is."""

from __future__ import annotations

import csv
import io
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from runner.errors import StorageError
from runner.utils.tables import append_row, markdown, read_rows, rich_table


def on_screen(title, rows, width=80) -> str:
    screen = Console(file=io.StringIO(), width=width)
    screen.print(rich_table(title, rows))
    return screen.file.getvalue()


def test_rows_are_read_back_as_text(tmp_path):
    path = tmp_path / "train.csv"
    assert read_rows(path) == []
    append_row(path, {"step": 1, "loss_nats": 0.1 + 0.2, "note": 'a,"b"\nc'})
    append_row(path, {"step": 2, "loss_nats": None, "note": ""})
    assert path.read_text().startswith("step,loss_nats,note\n1,0.30000000000000004,")
    assert read_rows(path) == [
        {"step": "1", "loss_nats": "0.30000000000000004", "note": 'a,"b"\nc'},
        {"step": "2", "loss_nats": "", "note": ""},
    ]


@given(value=st.floats())
def test_a_number_loses_no_bits(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("table") / "a.csv"
    for number in (value, np.float64(value)):
        append_row(path, {"x": number})
    for row in read_rows(path):
        found = float(row["x"])
        assert found == value or (math.isnan(found) and math.isnan(value))


@pytest.mark.parametrize(
    "row", [{"a": 1}, {"a": 1, "c": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 2, "c": 3}]
)
def test_a_row_with_other_columns_is_refused(tmp_path, row):
    path = tmp_path / "a.csv"
    append_row(path, {"a": 1, "b": 2})
    before = path.read_text()
    with pytest.raises(ValueError, match=r"a\.csv has the columns"):
        append_row(path, row)
    assert path.read_text() == before


def test_a_later_process_goes_on_with_the_table(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n")
    append_row(path, {"a": 3, "b": 4})
    assert path.read_text() == "a,b\n1,2\n3,4\n"


def test_a_row_is_on_disk_when_it_is_told(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    append_row(tmp_path / "a.csv", {"a": 1})
    assert synced == [len("a\n1\n")]


def test_a_table_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"a\.csv: No such file or directory$"):
        append_row(tmp_path / "none" / "a.csv", {"a": 1})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0.000"),
        (0.5, "0.500"),
        (1.23456, "1.235"),
        (3e-5, "3.00e-05"),
        (-3e-5, "-3.00e-05"),
        (47.316, "47.3"),
        (-12.0, "-12.0"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (1234567, "1234567"),
        ("a|b", "a\\|b"),
        ("two\nlines  here", "two lines here"),
    ],
)
def test_values_in_markdown(value, shown):
    assert markdown([{"x": value}]).split("\n")[2] == f"| {shown} |"


def test_markdown_puts_numbers_to_the_right():
    rows = [{"name": "a", "f1": 1.5, "none": None}, {"name": "b", "f1": None, "none": "x"}]
    assert markdown(rows) == (
        "| name | f1 | none |\n|---|---:|---|\n| a | 1.500 | - |\n| b | - | x |\n"
    )
    assert markdown([]) == ""


def test_a_terminal_shows_brackets_colons_and_colours_as_text():
    rows = [{"loss [nats]": 1.0, "answer": "[CLS] [/b] [red]x :100: \u4e2d"}]
    shown = on_screen("epoch [1]", rows)
    assert "epoch [1]" in shown
    assert "loss [nats]" in shown
    assert "[CLS] [/b] [red]x :100: \u4e2d" in shown


@pytest.mark.parametrize("width", [40, 80])
def test_a_terminal_shows_all_of_a_long_answer(width):
    words = [f"word{n}" for n in range(30)]
    shown = on_screen("t", [{"question": "q", "answer": " ".join(words), "f1": 50.0}], width)
    assert max(map(len, shown.split("\n"))) <= width
    assert all(word in shown for word in words)


def test_a_column_of_text_is_set_to_the_right_where_asked():
    rows = [{"F1 %": "57.0 ±5.8", "answer": "a"}, {"F1 %": "8.0 ±0.5", "answer": "b"}]
    screen = Console(file=io.StringIO(), width=80)
    screen.print(rich_table("t", rows, right=("F1 %",)))
    shown = screen.file.getvalue()
    assert " 57.0 ±5.8  a" in shown
    assert "  8.0 ±0.5  b" in shown


def test_no_rows_are_an_empty_table():
    assert on_screen("t", []).strip() in ("", "t")


def test_columns_of_a_table_are_csv_for_others(tmp_path):
    path = tmp_path / "a.csv"
    append_row(path, {"question": "a;b\tc", "n": 1})
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [["question", "n"], ["a;b\tc", "1"]]


def test_percent_has_one_decimal_whatever_its_size():
    rows = [{"accuracy %": 1.0112, "loss": 1.0112}, {"accuracy %": 0.0002, "loss": 41.58}]
    assert markdown(rows).splitlines()[2:] == ["| 1.0 | 1.011 |", "| 0.0 | 41.6 |"]


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_who_may_go_on_with_a_table_is_what_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        append_row(tmp_path / "train.csv", {"step": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "train.csv").stat().st_mode & 0o777 == mode


def test_a_cell_does_not_steer_the_terminal():
    shown = on_screen("t\x1b[2J", [{"k\x1b[1m": "v\x1b]0;x\x07"}])
    assert "\x1b" not in shown
    assert "\\x1b]0;x" in shown
