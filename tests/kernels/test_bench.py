"""The benchmark's rivals compute the same thing, and its text and exit codes are as documented."""

import subprocess
import sys

import pytest
import torch
from span_kernels import bench, bench_cases, reference_qa_head_loss
from span_kernels.bench import Timing
from span_kernels.bench_cases import CASES, Case


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_contestants_agree(packed, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = Case("small", 4, 24, 16, packed=packed, dtype=torch.float32)
    inputs = bench_cases.make_inputs(case, "cpu")
    head = bench_cases.head_contestants(case, inputs)
    assert tuple(head) == bench_cases.NAMES
    assert bench.disagreement(head) is None
    assert bench.disagreement(bench_cases.logits_contestants(case, inputs)) is None
    want = reference_qa_head_loss(*inputs[:3], *inputs.rows)
    torch.testing.assert_close(head["eager"]()[0], want.detach())

    norms = bench_cases.norm_contestants(torch.randn(1000))
    for squared, finite in (work() for work in norms.values()):
        torch.testing.assert_close(squared, norms["eager"]()[0])
        assert finite


def test_contestants_that_differ_are_found():
    def contestant(loss, grad):
        return lambda: (torch.tensor(loss), (torch.tensor(grad),))

    right = contestant(2.0, [1.0, 2.0])
    for wrong, message in (
        (contestant(2.1, [1.0, 2.0]), "fused loss 2.10000, eager 2.00000"),
        (contestant(2.0, [1.0, 2.2]), "a gradient of shape"),
        (contestant(float("nan"), [1.0, 2.0]), "fused loss nan"),
    ):
        assert message in bench.disagreement({"eager": right, "fused": wrong})


def test_the_cases_are_those_of_the_readme():
    sizes = {case.name: bench_cases.make_inputs(case, "cpu").rows[0] for case in CASES[:2]}
    assert sizes["base padded"][:, 1].tolist() == [384] * 32
    lengths_B = sizes["base packed"][:, 1].float()
    assert abs(lengths_B.mean() - 176) < 20
    inputs = bench_cases.make_inputs(CASES[0], "cpu")
    assert bench_cases.head_bytes(inputs) == 2 * 32 * 384 * 768 * 2
    assert bench_cases.logits_bytes(inputs) == 2 * 32 * 384 * 2 * 2


def test_rows_of_the_table():
    timings = {
        "eager": Timing(80.0, 70.0, 200.0),
        "compile": Timing(40.0, 30.0, 90.0),
        "fused": Timing(20.0, 10.0, 60.0),
    }
    lines = bench.format_rows("case", timings, moved=40_000_000, copy=4e12)
    assert lines[0] == "| case | eager | 80.0 | 70.0 | 200.0 | 500 | 12 |  |  |"
    assert lines[2] == "| case | fused | 20.0 | 10.0 | 60.0 | 2000 | 50 | 4.00 | 2.00 |"
    assert all(line.count("|") == bench.header().splitlines()[0].count("|") for line in lines)


def test_neighbours_of_a_plan_hold_the_plan_and_stay_within_its_limits():
    plan = bench.head_plan(12_288, 768, torch.bfloat16)
    plans = bench.neighbours(plan)
    assert plan in plans
    assert len(set(plans)) == len(plans)
    assert all(p.group >= 1 and p.chunk == plan.chunk for p in plans)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_says_so_in_one_line(request):
    done = subprocess.run(
        [sys.executable, "-m", "span_kernels.bench"],
        cwd=request.config.rootpath / "kernels",
        capture_output=True,
        text=True,
    )
    assert done.returncode == bench.UNAVAILABLE == 69
    assert done.stdout.count("\n") == 1
    assert "nothing was measured" in done.stdout
    assert not done.stderr
