"""What computes in float32, once more with the instructions of a CPU that has no AVX-512.

Sums come out in another order there, so that a test which compares rounding noise passes on the
machine where it was written and fails on the next one.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.apart import run_pytest

OLDER = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
PATHS = (
    "tests/kernels/test_bench.py::test_the_contestants_agree",
    "tests/kernels/test_grad_norm.py",
    "tests/kernels/test_operators.py",
    "tests/kernels/test_qa_head_loss.py",
    "tests/kernels/test_reference.py",
    "tests/kernels/test_span_loss.py",
    "tests/model/test_attention.py",
    "tests/train/test_plan.py",
    "tests/distributed/test_flat_zero.py",
    "tests/model/test_frozen.py",
    "tests/model/test_load.py::test_logits_are_those_of_plain_transformers",
    "tests/model/test_dropout.py",
    "tests/test_older_instructions.py",
    "tests/model/test_packing.py",
    "tests/predict/test_predictor.py",
    "tests/eval/test_inference.py",
    "tests/model/test_loss.py",
    "tests/train/test_trainer.py::test_ranks_and_zero_stages_take_the_same_steps",
)


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    reason="this CPU has nothing newer than AVX2: every test shows the same",
)
def test_the_numbers_are_right_with_older_instructions(tmp_path, record_property):
    options = ["-m", "not gpu and not slow"]
    counts = run_pytest(PATHS, options, tmp_path, **OLDER)
    record_property("older instructions", counts)
    # Whatever is silently not collected must not look like success.
    assert counts["passed"] >= 320
    assert not counts["skipped"]


if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":

    def test_the_variables_take_effect():
        assert torch.backends.cpu.get_cpu_capability() == "AVX2"
