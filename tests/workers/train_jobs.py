"""Trains several jobs one after another in this process group: RUNS JOB [JOB:key=value:...] ...

A start of DeepSpeed takes many seconds; tests that compare settings pay for it once.
"""

import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(CHECKOUT), str(CHECKOUT / "kernels")]

from runner.claim import Attempt  # noqa: E402
from runner.engine import stop_distributed  # noqa: E402
from runner.jobfile import load_job  # noqa: E402
from runner.ranks import current_rank  # noqa: E402
from runner.starting import Where, open_run  # noqa: E402
from runner.train import train  # noqa: E402


def main() -> None:
    runs, *jobs = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    for number, text in enumerate(jobs):
        path, *overrides = text.split("::")
        job, where = load_job(path, overrides), Where(run_dir=Path(runs) / str(number))
        opened = open_run(job, where) if current_rank().is_main else None
        attempt = opened if isinstance(opened, Attempt) else None
        train(job, attempt=attempt, threads=1)
        if attempt:
            attempt.end(0)
    stop_distributed()


main()
sys.stdout.flush()
os._exit(0)  # as the command does
