"""What a finished run is held against."""

from __future__ import annotations

import pytest

from runner.job.schema import Expect, missed_expectation

METRICS = {"exact_match": 50.0, "f1": 60.25, "span_accuracy": 40.0, "loss": 1.5}


@pytest.mark.parametrize(
    ("expect", "missed"),
    [
        (None, None),
        (Expect(f1=60.0), None),
        (Expect(f1=59.75), None),
        (
            Expect(f1=59.7),
            "f1 is 60.25, 0.55 from the expected 59.70 (tolerance 0.5)",
        ),
        (Expect(f1=59.7, tolerance=1.0), None),
        (
            Expect(exact_match=52.0, loss=1.0, span_accuracy=40.0, tolerance=0.25),
            "exact_match is 50.00, 2.00 from the expected 52.00 (tolerance 0.25); "
            "loss is 1.50, 0.50 from the expected 1.00 (tolerance 0.25)",
        ),
    ],
)
def test_what_is_missed_is_said(expect, missed):
    assert missed_expectation(expect, {"metrics": METRICS}) == missed


def test_another_set_may_be_meant():
    result = {"metrics": METRICS, "sets": {"second": {"metrics": METRICS | {"f1": 20.0}}}}
    assert missed_expectation(Expect(f1=20.0, on="second"), result) is None
    assert missed_expectation(Expect(f1=20.0, on="first"), result)
    assert missed_expectation(Expect(f1=20.0), result)


def test_a_score_that_is_no_number_is_missed():
    assert missed_expectation(Expect(f1=50.0), {"metrics": {"f1": float("nan")}})
