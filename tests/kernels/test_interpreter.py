"""Runs the operators' tests once more, on the Triton kernels interpreted on the CPU."""

from importlib.util import find_spec

import pytest

from tests.apart import run_pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("tier", "least"),
    [("not slow", 137), pytest.param("slow", 17, marks=pytest.mark.slow)],
)
def test_the_kernels_pass_the_operators_tests(tier, least, tmp_path, record_property):
    counts = run_pytest(
        [
            "tests/kernels/interp",
            "tests/kernels/test_span_loss.py",
            "tests/kernels/test_qa_head_loss.py",
            "tests/kernels/test_grad_norm.py",
            "tests/kernels/test_gather.py",
            "tests/kernels/test_operators.py",
        ],
        ["-p", "interpreter_plugin", "-m", f"not gpu and {tier}", "-k", "not inductor"],
        tmp_path,
        TRITON_INTERPRET="1",
        PYTHONPATH="kernels:tests/kernels/interp",
    )
    record_property("interpreted kernels", counts)
    assert counts["passed"] >= least
    assert not counts["skipped"]
