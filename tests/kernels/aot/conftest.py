"""Compiles what the host functions launch, for GPUs that are not here: a process of its own.

Started with SPAN_KERNELS_AOT=1 and without TRITON_INTERPRET, since the interpreter rules compiling
out; `test_ahead_of_time.py` one level up does that. The compiler, ptxas and cuobjdump come with
Triton; neither a driver nor a GPU is needed.
"""

import re
import subprocess
import tempfile
from typing import NamedTuple

import pytest
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface


class Offline:
    """Stands in for the driver: names a target and nothing more."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        # Compiled kernels are cached by device number, so every target needs its own.
        return hash((self.target.backend, self.target.arch)) % 99991

    def get_current_stream(self, device=None):
        return 0


class Target(NamedTuple):
    gpu: GPUTarget
    shared_limit: int  # bytes of shared memory that one program may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536),
}


class Compiled(NamedTuple):
    kernel: object
    name: str
    grid: tuple
    registers: int
    spilled: int  # bytes of a thread's stack; register arrays live nowhere else
    shared: int


def _usage(kernel) -> tuple[int, int]:
    if kernel.metadata.target.backend == "hip":
        text = kernel.asm["amdgcn"]

        def number(key: str) -> int:
            return int(re.search(key + r"\s*(\d+)", text)[1])

        spilled = number(r"\.vgpr_spill_count:") + number(r"\.private_segment_fixed_size:")
        return number(r"\.vgpr_count:"), spilled
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


@pytest.fixture(
    params=[
        pytest.param(name, marks=[] if name == "sm_90" else [pytest.mark.slow]) for name in TARGETS
    ]
)
def target(request):
    target = TARGETS[request.param]
    driver.set_active(Offline(target.gpu))
    yield target
    driver._active = None


@pytest.fixture
def launches(target, monkeypatch):
    """Call it with a function: the kernels that the function would launch, compiled."""
    seen = []

    def compile_instead(self, grid):
        def launch(*arguments, **options):
            seen.append((self.warmup(*arguments, grid=grid, **options), grid))

        return launch

    monkeypatch.setattr(KernelInterface, "__getitem__", compile_instead)

    def collect(function) -> list[Compiled]:
        seen.clear()
        function()
        used = {key: _usage(kernel) for key, kernel in {id(k): k for k, _ in seen}.items()}
        return [
            Compiled(k, k.metadata.name, grid, *used[id(k)], k.metadata.shared) for k, grid in seen
        ]

    return collect
