"""Ways to look at the jobs of the test cluster, and to hurt them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
PATIENCE = 600  # seconds; the machine may be busy with other tests
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


class Cluster:
    """The running cluster; its clients find it through SLURM_CONF.

    Several threads do things to it at once, so each command gets the environment as it was at the
    beginning, whatever a test does to that of the process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._environment = folder, dict(os.environ)

    def do(self, *command: object) -> str:
        """Run a command of SLURM's and return what it says."""
        done = self._run(command, {})
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def spantune(self, *arguments: object, check: bool = True, **variables: str):
        """Run our own command; return what it did."""
        variables = {"PYTHONPATH": str(CHECKOUT), **variables}
        done = self._run((sys.executable, "-m", "runner", *arguments), variables)
        assert done.returncode == 0 or not check, done.stderr
        return done

    def _run(self, command: Iterable[object], variables: dict[str, str]):
        return subprocess.run(
            list(map(str, command)),
            env={**self._environment, **variables},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def show(self, job: str) -> dict[str, str]:
        """All that SLURM tells of a job: JobState, ExitCode, Restarts, Reason, BatchHost, ..."""
        words = self.do("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """Wait until a job is in one of these states; without any, until it has ended."""
        states = states or ENDED
        until(lambda: self.state(job) in states, f"job {job} is {', '.join(states)}")
        return self.show(job)

    def step(self, script: str, **options: object) -> str:
        """Submit a shell command as a job; return its number."""
        given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return self.do("sbatch", "--parsable", "--output=/dev/null", *given, "--wrap", script)

    def processes(self, job: str, **variables: object) -> dict[int, str]:
        """Living processes of a job, or of one trial of an array (17_1), by id, each with its
        command line; with `variables` only those that have these values in their environment."""
        # SLURM_JOB_ID of a trial is a number of its own.
        array, is_trial, index = job.partition("_")
        marks: dict[str, object] = {"SLURM_CONF": f"{self.folder}/slurm.conf", **variables}
        if is_trial:
            marks |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": index}
        else:
            marks["SLURM_JOB_ID"] = job
        wanted = {f"{name}={value}".encode() for name, value in marks.items()}
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes().split(b"\0")
                dead = (path / "stat").read_text().rpartition(") ")[2].startswith("Z")
                command = os.fsdecode((path / "cmdline").read_bytes().replace(b"\0", b" "))
            except OSError:
                continue
            if wanted <= set(environment) and not dead:
                found[int(path.name)] = command
        return found

    def kill(self, job: str, begins: str) -> None:
        """Send SIGKILL to the first process of a job whose command line begins so."""
        found = [pid for pid, line in self.processes(job).items() if line.startswith(begins)]
        os.kill(min(found), signal.SIGKILL)

    def ranks(self, job: str, **variables: object) -> list[int]:
        """Process ids of a job's ranks, in no order; with `variables` as `processes`."""
        return [
            pid
            for pid, line in self.processes(job, **variables).items()
            if line.startswith(f"{sys.executable} -u") and " rank " in line
        ]

    def lose_node(self, node: str) -> None:
        """Let SLURM lose a node: its slurmd dies, and what runs there goes on."""
        os.kill(int((self.folder / "run" / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)

    def find_node(self, node: str) -> None:
        """Start a node's slurmd again."""
        subprocess.run(["bash", SCRIPT, "node", self.folder, node], check=True)

    def leaves_nothing(self, job: str) -> None:
        """Wait until no process of an ended job is left, which SLURM takes a moment for."""
        until(lambda: not self.processes(job), f"nothing is left of job {job}")


def freeze(pids: Iterable[int]) -> None:
    """Stop processes where they are, those that there still are."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)


def thaw(pids: Iterable[int]) -> None:
    """Let frozen processes go on, those that there still are."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def signalled(pids: Iterable[int], number: signal.Signals) -> None:
    """Wait until a signal has come to each of some frozen processes, or SLURM has let it go on, as
    it does with what it sends a TERM."""

    def has_come(pid: int) -> bool:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return True
        if not re.search(r"^State:\s*T", status, re.MULTILINE):
            return True
        pending = [int(mask, 16) for mask in re.findall(r"(?:Sig|Shd)Pnd:\s*(\w+)", status)]
        return any(mask >> (number - 1) & 1 for mask in pending)

    until(lambda: all(map(has_come, pids)), f"{number.name} has come to {pids}", every=0.05)


def let_hear(pids: Iterable[int], number: signal.Signals) -> None:
    """Let frozen processes go on once a signal has come to each of them."""
    signalled(pids, number)
    thaw(pids)


def waits(pid: int) -> bool:
    """Look for a moment whether a process's main thread sleeps, all the time, for something that
    does not come."""

    def looks() -> list[str]:
        with suppress(OSError):
            status = Path(f"/proc/{pid}/task/{pid}/status").read_text()
            return re.findall(r"^(?:State|\w+ctxt_switches):\s*(\w+)", status, re.MULTILINE)
        return []

    before = looks()
    time.sleep(0.2)
    return before[:1] == ["S"] and before == looks()


def is_alive(pid: int) -> bool:
    """Whether a process is there and no mere entry that waits for its parent."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


def until(true: Callable[[], bool], what: str, *, every: float = 0.5) -> None:
    """Wait until something is so, looking at it every so many seconds."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"after {PATIENCE} s still not so: {what}"
        time.sleep(every)
