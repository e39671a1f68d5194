"""Runs workers of tests/workers, and the command, as forks of the zygote, which has imported torch
and DeepSpeed: each then takes as long as what it does."""

from __future__ import annotations

import contextlib
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests.workers.zygote import Running, Zygote

_WORKER = """
import os, runpy, sys
os.dup2(os.open({errors!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
sys.argv = {words!r}
{code}
runpy.run_path({script!r}, run_name="__main__")
sys.stdout.flush()
os._exit(0)
"""
# A process that no launcher has started; it talks through two sockets where it is given their name.
_COMMAND = """
import os, runpy, socket, sys
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)
sys.argv = ["spantune", *{words!r}]
for number in (0, 1) if {name!r} else ():
    with socket.socket(socket.AF_UNIX) as end:
        end.connect({name!r})
        os.dup2(end.fileno(), number)
try:
    runpy.run_module("runner", run_name="__main__")
except SystemExit as ended:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended.code or 0)
"""


def forked(
    zygote: Zygote, script: Path, *arguments: object, ranks: int = 1, code: str = ""
) -> list[str]:
    """Run a Python file on each rank of a new group, each with the environment that a launcher
    gives it; returns the lines that they print. A worker must end well on every rank.

    Args:
        zygote: whose forks they are.
        script: the file.
        arguments: of its command line.
        ranks: how many.
        code: Python that each rank runs first.
    """
    with tempfile.NamedTemporaryFile(dir=zygote.folder) as errors:
        words = [str(script), *map(str, arguments)]
        code = _WORKER.format(words=words, script=str(script), errors=errors.name, code=code)
        codes, text = zygote.run(code=code, ranks=ranks)
        assert codes == [0] * ranks, (text + errors.read().decode())[-3000:]
    return text.splitlines()


def command(zygote: Zygote, *words: object) -> tuple[int, str]:
    """Run `python -m runner WORDS`; returns its code and what it said."""
    (code,), text = zygote.run(code=_COMMAND.format(words=[*map(str, words)], name=""))
    return code, text


@dataclass
class Talking:
    """A command at the other ends of `stdin` and `stdout`."""

    stdin: BinaryIO
    stdout: BinaryIO
    _running: Running

    def end(self) -> tuple[int, str]:
        """Close its standard input and wait; returns its code and its standard error."""
        self.stdin.close()
        (code,) = self._running.wait()
        return code, self._running.text()


@contextlib.contextmanager
def talking(zygote: Zygote, *words: object) -> Iterator[Talking]:
    """Run `python -m runner WORDS` and talk to it while it runs."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("")  # the system finds a name that no other has
        server.listen()
        server.settimeout(120)
        code = _COMMAND.format(words=[*map(str, words)], name=server.getsockname())
        running = zygote.start(code=code)
        (first, _), (second, _) = server.accept(), server.accept()
    with first, second:
        stdin, stdout = first.makefile("wb", 0), second.makefile("rb")
    # The sockets are closed with these.
    with stdin, stdout:
        yield Talking(stdin, stdout, running)
