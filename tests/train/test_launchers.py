"""Whatever starts the ranks, they train the same: torchrun, and our own launcher.

deepspeed's launcher is in test_train, our own with a Ctrl-C in test_resume. Plain srun, and the
batch script, are tested under a real SLURM (`make test-cluster`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.utils.ranks import free_port
from tests.interruptions import outcome

CHECKOUT = Path(__file__).resolve().parents[2]
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
# Each of these takes a second of a start or more, and no job asks for it.
SPARE = {
    *("mlflow.tracking", "wandb", "tensorboard", "pandas", "datasets", "evaluate"),
    *("transformers.pipelines.base", "torch._inductor.compile_fx"),
}
PYTHON = (sys.executable, "-m")
LAUNCHERS = {
    "ours": (*PYTHON, "runner", "run", "--ranks", "2"),
    "torchrun": (*PYTHON, "torch.distributed.run", "--nproc-per-node=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_same_run(zygote, tiny, tmp_path, launcher):
    """Weights, answers, scores and tables are those of ranks that are forks; and they import only
    what the job needs."""
    job, run, forks = tmp_path / "tiny.toml", tmp_path / "run", tmp_path / "forks"
    job.write_text(JOB.format(data=DATA, model=tiny("bert")))
    port = () if launcher == "ours" else (f"--master_port={free_port()}", MAIN)
    options = ("--threads", "1", "--run-dir")
    done = subprocess.run(
        [*LAUNCHERS[launcher], *port, str(job), *options, str(run)],
        env={
            **os.environ,
            "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT}/kernels",
            "PYTHONPROFILEIMPORTTIME": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if launcher == "ours":
        loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert {"deepspeed", "transformers", "torch"} <= loaded
        assert not loaded & SPARE
    codes, text = zygote.run(job, *options, forks, ranks=2)
    assert codes == [0, 0], text
    assert outcome(run) == outcome(forks)
