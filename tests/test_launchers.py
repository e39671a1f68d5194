"""Whatever starts the ranks, they train the same: torchrun, deepspeed's launcher, and our own.

Plain srun, and the batch script, are tested under a real SLURM (`make test-slurm`).
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.ranks import free_port

CHECKOUT = Path(__file__).resolve().parents[1]
DATA = CHECKOUT / "jobs" / "data"
MAIN = str(CHECKOUT / "runner" / "main.py")
JOB = """
name = "tiny"
[data]
train = "{data}/product_qa_train.json[:8]"
validation = "{data}/product_qa_validation.json[:4]"
max_length = 128
stride = 32
[model]
name = "{model}"
precision = "fp32"
[train]
epochs = 1
batch_size = 4
learning_rate = 1e-3
log_every = 1
"""
PYTHON = (sys.executable, "-m")
LAUNCHERS = {
    "ours": (*PYTHON, "runner", "run", "--ranks", "2"),
    "torchrun": (*PYTHON, "torch.distributed.run", "--nproc-per-node=2"),
    "deepspeed": (*PYTHON, "deepspeed.launcher.runner", "--num_gpus=2"),
}


@pytest.mark.slow
def test_every_launcher_gives_the_same_weights(tiny, tmp_path):
    job = tmp_path / "tiny.toml"
    job.write_text(JOB.format(data=DATA, model=tiny("bert")))
    found = {}
    for name, command in LAUNCHERS.items():
        run = tmp_path / name
        port = () if name == "ours" else (f"--master_port={free_port()}", MAIN)
        done = subprocess.run(
            [*command, *port, str(job), "--run-dir", str(run), "--threads", "1"],
            env={**os.environ, "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT}/kernels"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        with (run / "train.csv").open(newline="") as file:
            losses = [row["loss_nats"] for row in csv.DictReader(file)]
        result = json.loads((run / "result.json").read_text())
        found[name] = (result["weights_sha256"], losses)
    assert found["torchrun"] == found["ours"]
    assert found["deepspeed"] == found["ours"]
