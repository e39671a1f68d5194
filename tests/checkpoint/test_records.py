"""Dataclasses as JSON: what comes back is what went in, to the bit, or a refusal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.eval.evaluation import JsonArray
from runner.utils.files import parse_json, to_jsonable


@dataclass(frozen=True)
class Inner:
    text: str
    score: float
    pair: tuple[int, float]


@dataclass
class Outer:
    many: tuple[Inner, ...]
    named: dict[str, float]
    more: Mapping[str, list[int]]
    maybe: Inner | None
    number: int | None
    kind: Literal["a", "b"]
    flag: bool
    values_NK: JsonArray
    arrays: list[JsonArray]


def again(kind: Any, value: Any) -> Any:
    return parse_json(json.dumps(to_jsonable(value)), kind)


def example(**changes: Any) -> Outer:
    return Outer(
        **{
            "many": (Inner("é\n", 0.1 + 0.2, (1, -0.0)), Inner("", math.inf, (2, 1e-310))),
            "named": {"f1": 1 / 3},
            "more": {"x": [1, 2]},
            "maybe": None,
            "number": 7,
            "kind": "b",
            "flag": True,
            "values_NK": np.array([[0.1, np.nan], [np.inf, -0.0]], np.float32),
            "arrays": [np.arange(3), np.zeros((0, 2), np.float16)],
            **changes,
        }
    )


def test_what_is_written_is_read_back_to_the_bit():
    before, after = example(), again(Outer, example())
    assert after.many == before.many
    assert math.copysign(1, after.many[0].pair[1]) == -1
    assert (after.named, after.more, after.maybe) == (before.named, before.more, None)
    assert (after.number, after.kind, after.flag) == (7, "b", True)
    pairs = zip(before.arrays, after.arrays, strict=True)
    for one, other in ((before.values_NK, after.values_NK), *pairs):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()
    after.values_NK[0, 0] = 5  # an array of one's own, not a view of what was read


@given(st.floats(width=64), st.floats(width=32))
def test_every_float_comes_back(one, other):
    found = again(Inner, Inner("", one, (0, other)))
    for a, b in ((found.score, one), (found.pair[1], other)):
        assert np.float64(a).tobytes() == np.float64(b).tobytes() or (
            math.isnan(a) and math.isnan(b)
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"many": [{"text": "", "score": 1.0}]},  # a field is missing
        {"many": [{"text": "", "score": 1.0, "pair": [1, 2.0], "more": 1}]},
        {"many": [{"text": 5, "score": 1.0, "pair": [1, 2.0]}]},
        {"many": [{"text": "", "score": 1.0, "pair": [1, 2.0, 3]}]},
        {"number": "7"},
        {"number": True},
        {"kind": "c"},
        {"flag": 1},
        {"maybe": 3},
        {"values_NK": {"dtype": "O", "shape": [1], "base64": ""}},
        {"values_NK": {"dtype": "<f4", "shape": [3], "base64": "AAAA"}},
        {"values_NK": [1.0]},
    ],
)
def test_anything_else_is_refused(changes):
    plain = to_jsonable(example()) | changes
    with pytest.raises(ValueError, match=r"^\w+(\.\w+)*: "):
        parse_json(json.dumps(plain), Outer)


def test_what_has_no_spelling_is_said():
    with pytest.raises(ValueError, match="unknown type: <class 'object'>"):
        to_jsonable(example(number=object()))
