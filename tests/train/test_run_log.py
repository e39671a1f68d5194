"""What a run tells while it goes on."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.job.schema import Track
from runner.run.folder import RunDir
from runner.train.run_log import RunLog
from runner.utils.ranks import Rank
from runner.utils.tables import append_row, read_rows
from tests.interruptions import DATA, SIX


def test_a_picture_that_cannot_be_drawn_costs_a_line(tmp_path, capsys):
    run = RunDir(tmp_path)
    append_row(run.train_table, {"step": "of whom?", "epoch": 1, "loss_nats": 2})
    job: Any = SimpleNamespace(name="n", track=Track(), model_dump=lambda **_: {})
    RunLog(job, run, Rank(0, 1, 0, 1), None).curves()
    assert "no curves: " in capsys.readouterr().out


def log_of_steps(tmp_path, monkeypatch, clock) -> tuple[Any, RunDir, Any]:
    """A log whose rows are numbers of steps, a folder, and the fsyncs that it asks for."""
    run, synced = RunDir(tmp_path), []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(file), fsync(file)))
    monkeypatch.setattr("runner.train.run_log.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("runner.train.run_log.train_row", lambda state, *_: {"step": state})
    train: Any = SimpleNamespace(epochs=1, log_every=1, eval_every=1)
    job: Any = SimpleNamespace(name="n", track=Track(), train=train, model_dump=lambda **_: {})
    return RunLog(job, run, Rank(0, 1, 0, 1), None), run, synced


def test_rows_of_steps_are_written_once_a_second_after_the_first_and_waited_for_by_nobody(
    tmp_path, monkeypatch
):
    clock = [100.0]
    log, run, synced = log_of_steps(tmp_path, monkeypatch, clock)
    seen = []
    for number in range(20):
        log.step(number, None, None)
        seen.append(len(read_rows(run.train_table)))
        clock[0] += 0.25
    assert seen == [*range(1, 11), 10, 10, 10, 14, 14, 14, 14, 18, 18, 18]
    log.write_steps()
    log.write_steps()
    assert [row["step"] for row in read_rows(run.train_table)] == [str(n) for n in range(20)]
    assert synced == []


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_an_epoch_leaves_no_row_of_its_steps_unwritten(tmp_path, monkeypatch, error):
    log, run, _ = log_of_steps(tmp_path, monkeypatch, [0.0])
    state: Any = SimpleNamespace(epoch=1, steps_per_epoch=2)
    with pytest.raises(error) if error else nullcontext(), log.steps(state):
        log.step(1, None, None)
        log.step(2, None, None)
        if error:
            raise error
    assert len(read_rows(run.train_table)) == 2


JOB = (
    SIX
    + """\
[train]
epochs = 3
batch_size = 2
learning_rate = 1e-3
"""
)
JARGON = ("span loss:", "batches:", "step: flat", "compile:", "dropout:", "exchange:", "first step")


@pytest.fixture
def job(tmp_path: Path, tiny: Callable[[str], Path]) -> Path:
    path = tmp_path / "told.toml"
    path.write_text(JOB.format(data=DATA, model=tiny("bert")), encoding="utf-8")
    return path


def test_a_run_names_its_phases_and_keeps_its_jargon_for_the_log(zygote, job, tmp_path):
    run = RunDir(tmp_path / "run")
    codes, text = zygote.run(job, "--run-dir", run.path)
    assert codes == [0], text
    lines = [line.strip() for line in text.splitlines()]
    phases = ("reading the data", "loading the model", "evaluating", "proving the export: a fresh")
    places = [next(n for n, line in enumerate(lines) if line.startswith(p)) for p in phases]
    assert places == sorted(places)
    assert not [line for line in lines if line.startswith(JARGON)]
    log = run.log.read_text()
    assert all(f"  {word}" in log for word in JARGON if word != "exchange:")
    # Loss, speed and the time to the run's end are told from the first step on.
    first = next(line for line in lines if line.startswith("epoch 1/3 1/"))
    assert re.search(r"loss \d\.\d+  \S+ windows/s  .* s left$", first)
    left = [int(re.search(r"(\d+) s left", line)[1]) for line in lines if " s left" in line]
    assert left[-1] <= left[0]
    # A row each epoch, and the whole table at the end.
    headers = [n for n, line in enumerate(lines) if line.startswith("epoch   loss")]
    rows = [n for n, line in enumerate(lines) if re.match(r"[123] +\d", line)]
    assert len(headers) == 2
    assert len(rows) == 6
    assert rows[-3:] == [headers[1] + 2 + n for n in range(3)]


def test_a_verbose_run_tells_all(zygote, job, tmp_path):
    codes, text = zygote.run(job, "--run-dir", tmp_path / "run", "-v", ranks=2)
    assert codes == [0, 0], text
    assert all(f"  {word}" in text for word in JARGON)


def test_on_a_terminal_the_rows_of_the_table_stand_below_each_other(zygote, job, tmp_path):
    variables = {"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm"}
    run = zygote.start(job, "--run-dir", tmp_path / "run", **variables)
    assert run.wait() == [0], run.text()
    text = run.log.read_bytes().decode()
    seen = screen(text)
    (header,) = [n for n, line in enumerate(seen) if line.startswith(" epoch   loss")]
    assert [line[:6].strip() for line in seen[header + 2 : header + 5]] == ["1", "2", "3"]
    widths = {len(line) for line in seen[header + 2 : header + 5]}
    assert max(widths) <= 80
    assert "proving the export" in text  # while it lasts, and gone afterwards
    assert not [line for line in seen if "proving the export" in line]
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is back


def screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end, of what rich sends to one."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] == "\x1b" and part[-1] == "A":
            row = max(0, row - int(part[2:-1] or 1))
        elif part[0] not in "\x1b\r":
            lines[row] += part
    return [line.rstrip() for line in lines]


def test_ctrl_c_is_answered_at_once(tmp_path):
    """A real terminal: what is typed there reaches the launcher; its rank takes a while."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "print('ready', flush=True)\n"
        "sys.exit(75 if signal.sigwait([signal.SIGTERM]) else 0)\n"
    )
    code = (
        "import sys; from pathlib import Path; from runner.run.launch import launch;"
        f" sys.exit(launch([], 1, Path({str(script)!r})))"
    )
    mine, theirs = pty.openpty()
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: take_terminal(theirs),
    )
    os.close(theirs)
    seen = b""
    try:
        for key, words in ((b"", b"ready"), (b"\x03", b"stopping: "), (b"\x03", b"ending now; ")):
            os.write(mine, key)
            while words not in seen:
                seen += os.read(mine, 1000)
    finally:
        started.send_signal(signal.SIGTERM)
        assert started.wait(30) == 75
        os.close(mine)


def take_terminal(descriptor: int) -> None:
    """Let a new session's controlling terminal be this one."""
    os.close(os.open(os.ttyname(descriptor), os.O_RDWR))
