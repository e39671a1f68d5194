"""Importing the package touches neither Triton nor the runner."""

import subprocess
import sys


def test_importing_never_imports_triton_and_a_cpu_never_runs_it():
    script = """
import sys
import torch
before = set(sys.modules)
import span_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "runner", "transformers"}, new
y = torch.zeros(1, dtype=torch.int64)
z = torch.zeros(4, 2, requires_grad=True)
span_kernels.span_loss(z, torch.tensor([[0, 4]]), y, y).backward()
span_kernels.warm_up(torch.device("cpu"), torch.float32, rows=2, longest=4)
# PyTorch looks for Triton at the first call of any operator; our kernels stay unread.
assert not [name for name in sys.modules if name.startswith("span_kernels.pool")]
for name in span_kernels.__all__:
    assert getattr(span_kernels, name).__doc__
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": _kernels()})


def _kernels() -> str:
    import span_kernels

    return span_kernels.__path__[0] + "/.."
