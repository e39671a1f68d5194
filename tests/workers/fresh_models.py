"""Opens exported models in a process that knows only transformers, one request after another: as
`runner/export/fresh_logits.py` does for one, which takes longer to import than a tiny run to train.

As a program it prints the port at which it answers, until its stdin ends. `processes` stands for
the module `subprocess` in `runner.export.verify`.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import traceback
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FRESH = Path(__file__).resolve().parents[2] / "runner" / "export" / "fresh_logits.py"


def processes(port: int) -> SimpleNamespace:
    """A `subprocess` whose `Popen` of fresh_logits.py asks this program."""

    class Popen:
        def __init__(self, command: list[str], **_: Any) -> None:
            assert command[1:] == [str(FRESH)]

        def communicate(self, request: str, timeout: float) -> tuple[str, str]:
            with socket.create_connection(("127.0.0.1", port)) as asking:
                asking.sendall(request.encode())
                asking.shutdown(socket.SHUT_WR)
                answer = json.loads(asking.makefile("rb").read())
            self.returncode = answer["returncode"]
            return answer["stdout"], answer["stderr"]

        def kill(self) -> None:
            pass

    return SimpleNamespace(Popen=Popen, PIPE=subprocess.PIPE)


def serve() -> None:
    import transformers

    transformers.logging.set_verbosity_error()  # as the variable asks that the other one gets
    transformers.logging.disable_progress_bar()
    main, end = runpy.run_path(str(FRESH))["main"], sys.stdin
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        while end not in select.select([listening, end], [], [])[0]:
            asking, _ = listening.accept()
            with asking, suppress(OSError):  # a rank that was killed waits for no answer
                asking.sendall(json.dumps(answer(main, asking.makefile("rb").read())).encode())


def answer(main: Any, request: bytes) -> dict[str, Any]:
    written, code, said = io.StringIO(), 0, ""
    sys.stdin = io.StringIO(request.decode())
    try:
        os.chdir(json.loads(request)["model"])
        with redirect_stdout(written):
            main()
    except Exception:
        code, said = 1, traceback.format_exc()
    return {"returncode": code, "stdout": written.getvalue(), "stderr": said}


if __name__ == "__main__":
    serve()
    os._exit(0)
