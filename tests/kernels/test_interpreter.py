"""Runs the operators' tests once more, on the Triton kernels interpreted on the CPU."""

from importlib.util import find_spec

import pytest


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_pass_the_operators_tests(run_pytest_apart):
    passed = run_pytest_apart(
        "interpreted kernels",
        [
            "tests/kernels/interp",
            "tests/kernels/test_span_loss.py",
            "tests/kernels/test_qa_head_loss.py",
            "tests/kernels/test_grad_norm.py",
            "tests/kernels/test_gather.py",
            "tests/kernels/test_operators.py",
        ],
        ["-p", "interpreter_plugin", "-m", "not gpu", "-k", "not inductor"],
        TRITON_INTERPRET="1",
        PYTHONPATH="kernels:tests/kernels/interp",
    )
    # A folder that is silently not collected must not look like success.
    assert passed > 150
