"""Runs jobs in seconds: torch and DeepSpeed are imported once, and every rank is a fork.

As a program it is the zygote; `Zygote` starts one and asks it for runs. A run is a small launcher
process and its ranks, as `spantune run` has them, so that each of them can be killed.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
FRESH = Path(__file__).with_name("fresh_models.py")
# Left out where a test is about neither: together they take longer than all else of a tiny run.
WITHOUT = """
import runner.train.finish, runner.train.run_log, runner.train.trainer
runner.train.trainer.FreshProcess = lambda: None
runner.train.finish.verify_export = lambda *_: 0.0
runner.train.run_log.draw_curves = lambda *_: None
"""
# The exported model is opened by a process that has opened others before.
VERIFIED = """
import runner.export.verify
from tests.workers.fresh_models import processes
runner.export.verify.subprocess = processes({port})
"""


@dataclass
class Running:
    """A run that was started.

    Attributes:
        launcher, ranks: process ids.
        log: where stdout and stderr of all ranks go.
        codes: file of the ranks' exit codes, written at the end by the launcher.
    """

    launcher: int
    ranks: list[int]
    log: Path
    codes: Path

    def kill(self, victim: int | str, number: int = signal.SIGKILL) -> None:
        """Signal a rank by its number, the "launcher", or "all"."""
        pids = {"launcher": [self.launcher], "all": [self.launcher, *self.ranks]}
        for pid in pids[victim] if isinstance(victim, str) else [self.ranks[victim]]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def wait(self, seconds: float = 120) -> list[int]:
        """Wait until no process of the run is left; returns the ranks' exit codes, none if the
        launcher was killed. Whoever is left after `seconds` is killed, and that is an error."""
        deadline = time.monotonic() + seconds
        while any(map(lives, [self.launcher, *self.ranks])):
            if time.monotonic() > deadline:
                self.kill("all")
                raise AssertionError(f"still running after {seconds} s:\n{self.text()}")
            time.sleep(0.02)
        return json.loads(self.codes.read_text()) if self.codes.exists() else []

    def text(self) -> str:
        """What all ranks have said."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Zygote:
    """Starts a zygote and asks it for runs.

    Args:
        folder: for logs.
        threads: CPU threads of each rank.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self.folder, self._number = folder, 0
        self._fresh: subprocess.Popen[str] | None = None
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._is_ready = False  # others may import meanwhile

    def start(
        self,
        *arguments: object,
        ranks: int = 1,
        code: str = "",
        whole: bool = False,
        **variables: str,
    ) -> Running:
        """Start `spantune rank ARGUMENTS` on each rank.

        Args:
            arguments: of the command.
            ranks: how many.
            code: Python that each rank runs first, to break something.
            whole: whether curves are drawn and the exported model is verified.
            variables: of the environment.
        """
        self._number += 1
        log = self.folder / f"run-{self._number}.log"
        codes = self.folder / f"run-{self._number}.codes"
        request = {
            "arguments": ["rank", *map(str, arguments)],
            "ranks": ranks,
            "code": (VERIFIED.format(port=self.verifier()) if whole else WITHOUT) + code,
            "variables": variables,
            "log": str(log),
            "codes": str(codes),
        }
        assert self._is_ready or self._answer() == "ready"
        self._is_ready = True
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Running(*self._answer(), log, codes)

    def run(self, *arguments: object, ranks: int = 1, **options: Any) -> tuple[list[int], str]:
        """Start a run and wait for its end; returns the ranks' codes and what they said."""
        started = self.start(*arguments, ranks=ranks, **options)
        return started.wait(), started.text()

    def close(self) -> None:
        """End the zygote."""
        if self._fresh:
            self._fresh.communicate()
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def verifier(self) -> int:
        """The port of the process that opens exported models, started when it is first needed."""
        if self._fresh is None:
            self._fresh = subprocess.Popen(
                [sys.executable, str(FRESH)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                text=True,
            )
            assert self._fresh.stdout
            self._port = int(self._fresh.stdout.readline())
        return self._port

    def _answer(self):
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())


def lives(pid: int) -> bool:
    """Whether a process runs; a killed one that nobody has asked for its code does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


# --- the zygote itself


def serve() -> None:
    sys.path[:1] = [str(CHECKOUT), str(CHECKOUT / "kernels")]
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    import runner.cli.command
    import runner.distributed.engine
    import runner.train.trainer  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare()
    signal.signal(signal.SIGCHLD, lambda *_: reap())
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reads, writes = os.pipe()
        launcher = os.fork()
        if launcher == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(reads)
            launch(request, writes)
        os.close(writes)
        with os.fdopen(reads) as file:
            ranks = json.loads(file.readline())
        print(json.dumps([launcher, ranks]), file=answers, flush=True)


def prepare() -> None:
    """Do once what each run would do anew: imports that come late, patterns that are compiled at
    their first use, fonts that are looked for. A run finds nothing else than without it."""
    import deepspeed.module_inject.auto_ep_config
    import deepspeed.runtime.zero.muon.muon_optimizer
    import numpy as np
    import torch
    import transformers

    from runner.report import plots
    from runner.report.render import write_report
    from runner.run.folder import RunDir
    from runner.utils.tables import append_row
    from tests.sample_runs import make_run, predictions

    numbers, torch_numbers = np.random.get_state(), torch.get_rng_state()
    for family in ("bert", "distilbert", "roberta", "electra", "albert"):
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    _ = deepspeed.ops.__compatible_ops__  # asks a compiler
    with tempfile.TemporaryDirectory() as folder:
        shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = transformers.BertConfig(vocab_size=8, intermediate_size=8, **shape)
        transformers.logging.disable_progress_bar()
        transformers.BertForQuestionAnswering(config).save_pretrained(folder)
        transformers.BertForQuestionAnswering.from_pretrained(folder)
        transformers.logging.enable_progress_bar()
        drawn, curves = RunDir(Path(folder)), (*plots.LOSS_CURVES, *plots.SCORE_CURVES)
        append_row(
            drawn.train_table, {"step": 1, "epoch": 1, "loss_nats": 1, "span_accuracy_percent": 1}
        )
        append_row(drawn.eval_table, {"epoch": 1, **{curve.name: 1 for curve in curves}})
        plots.draw_curves(drawn, "x")
        write_report(make_run(Path(folder) / "run", predictions()))
    np.random.set_state(numbers)
    torch.set_rng_state(torch_numbers)
    # What is here now stays: a collection in a fork need not look through it, nor write to it.
    gc.collect()
    gc.freeze()


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def launch(request: dict, writes: int) -> None:
    """Be the launcher of one run."""
    from runner.run.launch import GRACE_S
    from runner.utils.ranks import free_port

    count = request["ranks"]
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        **request["variables"],
    }
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.close(writes)
            be_rank(rank, request)
        children.append(child)
    os.write(writes, json.dumps(children).encode() + b"\n")
    os.close(writes)
    codes, deadline = {}, math.inf
    while len(codes) < count:
        pid, status = os.waitpid(-1, 0 if deadline == math.inf else os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
        left = [child for child in children if child not in codes]
        # As `runner.launch` does: who waits for a dead rank where no signal is heard is killed.
        if pid and codes[pid] and left:
            deadline = min(deadline, time.monotonic() + GRACE_S)
            for child in left:
                os.kill(child, signal.SIGTERM)
        if time.monotonic() > deadline:
            for child in left:
                os.kill(child, signal.SIGKILL)
        if not pid:
            time.sleep(0.01)
    text = json.dumps([codes[child] for child in children])
    Path(request["codes"] + ".new").write_text(text)
    os.rename(request["codes"] + ".new", request["codes"])
    os._exit(0)


def be_rank(rank: int, request: dict) -> None:
    import numpy as np

    import runner.cli.command

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.setpgid(0, 0)
    code = 70
    np.random.seed()  # each process has numbers of its own, which no run may use
    try:
        exec(request["code"], {"rank": rank})
        code = runner.cli.command.main(request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
    os._exit(0)  # nothing is left to be put away
