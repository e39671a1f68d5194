"""Stands in for spantune in a batch script: a rank that needs no second to start, and does what it
is told by the environment variable PLAN."""

import json
import os
import signal
import sys
import time
from pathlib import Path

verb, *rest = sys.argv[1:]
if verb == "may-requeue":
    # As many lives as the plan says.
    sys.exit(0 if len(list(Path(rest[0]).glob("life-*-0"))) < int(os.environ["LIVES"]) else 75)

run = Path(rest[rest.index("--run-dir") + 1])
rank, life = os.environ["SLURM_PROCID"], os.environ.get("SLURM_RESTART_COUNT", "0")
names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURMD_NODENAME", "MASTER_ADDR", "MASTER_PORT")
names += ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RANK", "A_SETTING")
seen = {name: os.environ.get(name) for name in names}
(run / f"life-{life}-{rank}").write_text(json.dumps({**seen, "cwd": os.getcwd()}))
got: list[str] = []


def note(number: int, _: object) -> None:
    got.append(signal.Signals(number).name)
    (run / f"signals-{life}-{rank}").write_text(" ".join(got))


plan = os.environ["PLAN"]
late = 3 if plan == "late" else 0  # seconds of loading libraries
time.sleep(late)
for name in ("SIGUSR1", "SIGUSR2", "SIGTERM"):
    signal.signal(getattr(signal, name), note)

if plan == "finish" or (life != "0" and plan != "idle"):
    if rank == "0":
        (run / "result.json").write_text("{}")
    sys.exit(0)
if plan.isdecimal():
    time.sleep(1 if rank == "0" else 0)
    sys.exit(int(plan))
for _ in range(12000):
    stops = {"SIGTERM"} if plan == "deaf" else {"SIGTERM", "SIGUSR2"}
    if plan == "idle" or stops & set(got):
        # As long as a real rank saves: SLURM signals ranks and script one after the other.
        time.sleep(2)
        # As real ranks end: at an ordinary exit Python first lets go of its handlers, and SLURM
        # sends a second TERM.
        os._exit(75)
    time.sleep(0.1)
