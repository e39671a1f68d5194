"""Compiles the Triton kernels for GPUs that are not here."""

from importlib.util import find_spec

import pytest

from tests.apart import run_pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("tier", "least"),
    [("not slow", 13), pytest.param("slow", 34, marks=pytest.mark.slow)],
)
def test_the_kernels_compile_for_every_target(tier, least, tmp_path, record_property):
    """For Hopper first, the rest in the second tier."""
    counts = run_pytest(
        ["tests/kernels/aot"],
        ["-m", tier],
        tmp_path,
        SPAN_KERNELS_AOT="1",
        PYTHONPATH="kernels",
    )
    record_property("compiled kernels", counts)
    assert counts["passed"] >= least
    assert not counts["skipped"]
