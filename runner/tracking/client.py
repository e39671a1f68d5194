"""Tells W&B, TensorBoard and MLflow of a run, each through a process of its own, so that none can
hold up or end the training.

A tracker's library may hang where the network is cut, raise where a key is missing, or leave
threads behind. Here it runs in a child process (`process`) that reads rows from a pipe. The run
writes to that pipe only what goes in at once; the rest waits in a small buffer, and what does
not fit there is dropped with a warning. The run's own tables are complete whatever happens here.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from runner.job.schema import Track
from runner.run.folder import RunDir
from runner.utils.tables import CellValue

BUFFER_BYTES = 1 << 20  # some thousands of rows
# Seconds that a server is given to take up a run before it is kept in the run folder.
TRACKER_START_S = 15
CHECKOUT = Path(__file__).resolve().parents[2]
TRACKER_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow-skinny"}
Say = Callable[[str], None]


class Trackers:
    """All trackers of a run, on rank 0; no method raises or waits, but `close`, for so long as the
    job allows."""

    def __init__(self, children: Sequence[TrackerProcess], wait: float, say: Say) -> None:
        self._children = list(children)
        self._wait = wait
        self._say = say

    def log(self, table: str, row: Mapping[str, CellValue]) -> None:
        """Pass on a row of a table ("train", "eval", "probes"), or the run's "result"."""
        for child in self._children:
            self._guarded(child, lambda c: c.send({"table": table, "row": dict(row)}))

    def resume(self, probe_rows: Sequence[Mapping[str, CellValue]]) -> None:
        """Pass on what earlier attempts have logged of probes.csv: W&B and MLflow get that table
        whole at the end, and it must not begin with this attempt."""
        for row in probe_rows:
            self.log("earlier_probes", row)

    def close(self, *, finished: bool = True) -> None:
        """Let the trackers send what they have, then end them; those that need longer are told to
        stop and warned about."""
        deadline = time.monotonic() + self._wait
        for child in self._children:
            self._guarded(child, lambda c: c.send({"end": finished}))
        while any(child.busy for child in self._children) and time.monotonic() < deadline:
            for child in self._children:
                self._guarded(child, TrackerProcess.finish)
            time.sleep(0.02)
        for child in self._children:
            self._guarded(child, lambda c: c.stop(self._wait))

    def _guarded(self, child: TrackerProcess, act: Callable[[TrackerProcess], None]) -> None:
        if child.gone:
            return
        try:
            act(child)
        # Whatever goes wrong with a tracker, the run goes on.
        except Exception as error:
            self._say(f"{child.tool}: {type(error).__name__}: {error}; the run goes on without it")
            child.gone = True
            with contextlib.suppress(Exception):
                child.abandon()


class TrackerProcess:
    """One tracker's process and what waits to be read by it."""

    def __init__(self, tool: str, process: subprocess.Popen[bytes], log: Path, say: Say) -> None:
        if process.stdin is None or process.stdout is None:
            raise AssertionError("a tracker's process is started with pipes")
        self.tool = tool
        self.gone = False
        self._process = process
        self._log = log
        self._say = say
        self._stdin, self._stdout = process.stdin, process.stdout
        self._outbox, self._inbox = bytearray(), bytearray()
        self._dropped = 0
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)

    @property
    def busy(self) -> bool:
        return not self.gone and self._process.poll() is None

    def send(self, message: Mapping[str, Any]) -> None:
        """Pass on a message now or later, or drop it."""
        line = json.dumps(message).encode() + b"\n"
        if len(self._outbox) + len(line) > BUFFER_BYTES:
            if not self._dropped:
                self._say(f"{self.tool}: does not keep up; rows are left out")
            self._dropped += 1
        else:
            self._outbox += line
        self._push()
        if self._process.poll() is not None:
            self.stop(0)

    def finish(self) -> None:
        """Empty the buffer, then close the pipe: that is how the process learns that this was
        all."""
        self._push()
        if not self._outbox and not self._stdin.closed:
            self._stdin.close()

    def stop(self, waited: float) -> None:
        """End the process if it runs still, and say what became of it."""
        late = self._process.poll() is None
        self.abandon()
        self._listen()
        self._stdout.close()
        if self._dropped:
            self._say(f"{self.tool}: {self._dropped} rows are in the run's tables only")
        if late:
            self._say(
                f"{self.tool}: had not sent everything after {waited:g} s (track.wait); the run's"
                " own tables are complete"
            )
        elif self._process.returncode != 0:
            self._say(f"{self.tool}: ended with code {self._process.returncode}; see {self._log}")

    def abandon(self) -> None:
        """End the process and all that it has started, without a word."""
        self.gone = True
        self._stdin.close()
        if self._process.poll() is None:
            family = psutil.Process(self._process.pid)
            for member in [*family.children(recursive=True), family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            # A process that waits for a dead file system does not end even so.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)

    def _push(self) -> None:
        self._listen()
        try:
            while self._outbox:
                del self._outbox[: os.write(self._stdin.fileno(), self._outbox[:65536])]
        except BlockingIOError:
            pass  # the pipe is full; more goes in with the next row
        except BrokenPipeError:
            self._outbox.clear()  # the process is ending

    def _listen(self) -> None:
        """Pass on the lines that the process has printed since the last time."""
        try:
            while part := os.read(self._stdout.fileno(), 65536):
                self._inbox += part
        except BlockingIOError:
            pass
        *lines, rest = self._inbox.split(b"\n")
        self._inbox = bytearray(rest)
        for line in lines:
            text = line.decode(errors="replace").replace(f"{Path.cwd()}/", "")
            self._say(f"{self.tool}: {text}")


def start_trackers(
    section: Track, run: RunDir, name: str, config: Mapping[str, Any], say: Say
) -> Trackers:
    """Start a process for each tracker of the job; one that cannot start is warned about.

    Args:
        section: the job's [track].
        run: the run, in whose folder the trackers keep their files.
        name: the job's name.
        config: what the trackers show as the run's settings.
        say: takes a line for the user.
    """
    offline = section.mode == "offline" or (section.mode == "auto" and "SLURM_JOB_ID" in os.environ)
    children = []
    for tool in dict.fromkeys(section.tools):
        if importlib.util.find_spec(tool) is None:
            package = TRACKER_PACKAGES[tool]
            say(f"{tool}: not installed (pip install {package}); the run goes on without it")
            continue
        settings = {
            "tool": tool,
            "name": f"{name}/{run.path.name}",
            # The same for every attempt of a run: a requeued one goes on in the same place.
            "id": hashlib.sha256(str(run.path).encode()).hexdigest()[:16],
            "folder": str(run.trackers),
            "offline": offline,
            "project": section.project,
            "entity": section.entity,
            "uri": section.mlflow_uri,
            "wait": section.wait,
            "patience": TRACKER_START_S,
            "pid": os.getpid(),
            "config": config,
        }
        try:
            children.append(_start(tool, settings, run, say))
        except OSError as error:
            say(f"{tool}: cannot be started: {error}; the run goes on without it")
    return Trackers(children, section.wait, say)


def _start(tool: str, settings: Mapping[str, Any], run: RunDir, say: Say) -> TrackerProcess:
    run.trackers.mkdir(exist_ok=True)
    log = run.trackers / f"{tool}.log"
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    with log.open("ab") as file:
        process = subprocess.Popen(
            # -P: a folder called wandb in the current one is not the library.
            [sys.executable, "-P", "-m", "runner.tracking.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the run, which then closes the pipe
        )
    child = TrackerProcess(tool, process, log, say)
    child.send(settings)
    return child
