"""Charts: ticks, places of points, marks that differ without colours, words for screen readers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.report.line_chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    line_chart,
    number,
    ticks,
)
from runner.report.page import Chart, Series

SVG = "{http://www.w3.org/2000/svg}"


def chart(**changes) -> Chart:
    given = {
        "title": "Loss & <score>",
        "x_label": "epoch",
        "y_label": "loss (nats)",
        "series": [
            Series("steps", "grey", [(0.5, 6.0), (1.0, 3.0)]),
            Series("training", "blue", [(1, 4.0), (2, 2.0)], [(1, 3.0, 5.0), (2, 1.0, 3.0)]),
            Series("validation", "orange", [(1, 3.5), (2, 2.5)]),
            Series("nothing yet", "green", []),
        ],
    }
    return Chart(**(given | changes))


def drawn(**changes) -> ET.Element:
    return ET.fromstring(line_chart(chart(**changes), "c1"))


def test_points_stand_where_they_belong():
    marks = drawn().findall(f".//{SVG}circle[@class='mark blue']")
    places = [(float(m.attrib["cx"]), float(m.attrib["cy"])) for m in marks[:2]]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    middle = LEFT + (right - LEFT) / 2
    assert places == [
        (pytest.approx(middle, abs=0.1), pytest.approx(bottom - (bottom - TOP) * 4 / 6, abs=0.1)),
        (pytest.approx(right, abs=0.1), pytest.approx(bottom - (bottom - TOP) * 2 / 6, abs=0.1)),
    ]


def test_series_differ_without_colours_and_empty_ones_are_left_out():
    svg = drawn()
    names = [t.text for t in svg.findall(f"{SVG}text[@class='label']")]
    assert names == ["epoch", "loss (nats)", "steps", "training", "validation"]
    dashes = {p.get("stroke-dasharray") for p in svg.findall(f".//{SVG}path[@class='line orange']")}
    assert dashes == {"7 4"}
    assert svg.findall(f".//{SVG}rect[@class='mark orange']")
    assert len(svg.findall(f".//{SVG}path[@class='band blue']")) == 1


def test_a_chart_says_in_words_what_it_shows():
    svg = drawn()
    assert svg.attrib["role"] == "img"
    told = {e.attrib["id"]: e.text for e in svg if "id" in e.attrib}
    assert svg.attrib["aria-labelledby"].split() == list(told)
    assert told["c1-title"] == "Loss & <score>"
    assert told["c1-text"] == (
        "loss (nats) against epoch: steps from 6 to 3; training from 4 to 2; validation from 3.5"
        " to 2.5."
    )


def test_one_evaluation_has_its_interval_as_a_line():
    once = [Series("F1", "blue", [(1, 50.0)], [(1, 40.0, 60.0)])]
    svg = drawn(series=once, top=100.0)
    strokes = [p.attrib["d"] for p in svg.findall(f".//{SVG}path[@class='line blue']")]
    assert any(re.fullmatch(r"M[\d.]+ [\d.]+V[\d.]+", path) for path in strokes)


@given(st.floats(1e-6, 1e6), st.integers(2, 8), st.booleans())
def test_ticks_are_few_and_reach_the_end(high, most, whole):
    found = ticks(0.0, high, most, whole=whole)
    assert found[0] == 0.0
    assert found[-1] >= high * (1 - 1e-5)
    assert 2 <= len(found) <= most + 2
    steps = {round(b - a, 9) for a, b in pairwise(found)}
    assert len(steps) == 1 or high > 1e3
    if whole:
        assert all(tick == round(tick) for tick in found)


def test_numbers_are_short():
    assert [number(v) for v in (0.0, 2.5, 100.0, 0.30000000000000004)] == ["0", "2.5", "100", "0.3"]
