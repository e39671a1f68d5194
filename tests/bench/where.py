"""Where figures were measured: device, driver and clocks, processor and its speed, versions.

Exit code 69 where there is no CUDA device: tests for a GPU would be skipped without a word."""

from __future__ import annotations

import shutil
import subprocess
import sys
import timeit

import measuring
import torch

from runner.run import provenance

ASKED = "name,driver_version,memory.total,power.limit,clocks.sm,clocks.max.sm,clocks.mem"


def main() -> int:
    print(measuring.machine())
    print(", ".join(f"{name} {value}" for name, value in provenance.versions().items()))
    # A host that is twice as slow launches half as many kernels a second.
    loop_s = min(timeit.repeat("for n in range(1_000_000): n * n", number=1, repeat=5))
    print(
        f"a million turns of a Python loop {1e3 * loop_s:.0f} ms; torch's CUDA {torch.version.cuda}"
    )
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv"]
        print(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
    return 0 if torch.cuda.is_available() else 69


if __name__ == "__main__":
    sys.exit(main())
