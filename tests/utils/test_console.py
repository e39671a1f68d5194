"""What a run says on a terminal, in a batch log and in log.txt."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.table import Table

from runner.errors import StorageError
from runner.utils import console
from runner.utils.console import LOG_WIDTH, Reporter, print_error, progress
from runner.utils.text import duration

ODD = "job.toml:100: [bold]x[/y] [CLS] :smile: \u4e2d " + "long " * 60 + "end"


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (48.4, "48 s"),
        (59.6, "1 min 0 s"),
        (425, "7 min 5 s"),
        (3599.7, "1 h 0 min"),
        (7830, "2 h 10 min"),
        (360_000, "100 h 0 min"),
    ],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_a_line_is_said_as_it_is_and_logged_with_its_time(tmp_path, capsys):
    reporter = Reporter(tmp_path / "log.txt", speaks=True)
    reporter.line(ODD)
    reporter.line()
    assert capsys.readouterr().out == f"{ODD}\n\n"
    first, second = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d", first[:8])
    assert (first[9:], second) == (ODD, "")


def test_a_log_is_continued(tmp_path):
    for text in ("one", "two"):
        Reporter(tmp_path / "log.txt", speaks=True).line(text)
    assert [line[9:] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]


def test_other_ranks_are_silent(tmp_path, capsys):
    reporter = Reporter(tmp_path / "log.txt", speaks=False)
    reporter.line("a")
    reporter.table(Table("a"))
    with reporter.steps("train", 2, 1) as follow:
        follow(1, "loss 2")
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "log.txt").exists()


def test_a_table_goes_to_both(tmp_path, capsys):
    table = Table("name", "f1")
    table.add_row("a", "47.3")
    Reporter(tmp_path / "log.txt", speaks=True).table(table)
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text()):
        assert "47.3" in text
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= LOG_WIDTH


def test_a_batch_log_has_a_line_every_few_steps(capsys):
    with Reporter(None, speaks=True).steps("train", 7, 3) as follow:
        for step in range(1, 8):
            follow(step, f"loss {step}" if step != 6 else "")
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\d+ s left", "T", line) for line in lines] == [
        "train 1/7  loss 1  T",
        "train 3/7  loss 3  T",
        "train 7/7  loss 7  T",
    ]


@pytest.mark.parametrize("note", ["loss 1.5", "loss 1.5 " + "long " * 40 + "end"])
def test_a_terminal_has_a_bar_and_the_log_its_lines(tmp_path, capsys, monkeypatch, note):
    monkeypatch.setenv("FORCE_COLOR", "1")
    reporter = Reporter(tmp_path / "log.txt", speaks=True)
    assert reporter.live
    with reporter.steps("train", 5, 2) as follow:
        for step in range(1, 6):
            follow(step, note)
    screen = capsys.readouterr().out
    assert "loss 1.5" in screen
    assert ("5/5" in screen) is (len(note) < 40)  # a long note leaves no room for the count
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[9:] for line in lines] == [f"train {n}/5  {note}" for n in (1, 2, 4, 5)]


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"none/log\.txt: No such file or directory$"):
        Reporter(tmp_path / "none" / "log.txt", speaks=True)


def test_a_full_disk_costs_lines_of_the_log_and_is_said_once(capsys):
    reporter = Reporter(Path("/dev/full"), speaks=True)
    reporter.line("one")
    reporter.table(Table("a"))
    reporter.line("two")
    out = capsys.readouterr().out
    assert out.count("/dev/full: No space left on device: not all that is said is in it") == 1
    assert out.startswith("one\n")
    assert out.endswith("two\n")


def test_a_line_goes_back_over_none(tmp_path, capsys):
    Reporter(tmp_path / "log.txt", speaks=True).line("name\rEXACT\x1b[2K")
    assert capsys.readouterr().out == "name\\rEXACT\\x1b[2K\n"
    assert "name\\rEXACT" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("stdout", ["pipe", "/dev/full"])
def test_a_reader_that_has_gone_costs_lines_of_the_screen(tmp_path, stdout):
    """Not the run: its log has all of them, and the process ends as if nothing had been."""
    code = (
        "from pathlib import Path; from rich.table import Table\n"
        "from runner.utils.console import Reporter\n"
        f"reporter = Reporter(Path({str(tmp_path / 'log.txt')!r}), speaks=True)\n"
        "for n in range(3): reporter.line(f'line {n}')\n"
        "reporter.table(Table('a'))\n"
        "with reporter.steps('train', 2, 1) as follow: follow(1, 'loss 2')\n"
    )
    if stdout == "pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(stdout, os.O_WRONLY)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=env)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, b"")
    log = (tmp_path / "log.txt").read_text()
    assert all(f"line {n}" in log for n in range(3))
    assert "train 1/2  loss 2" in log
    assert log.count("standard output: ") == 1
    assert "not all that is said is in it" in log


def dead_stdout(kind):
    """A stream that takes nothing, as a shell makes one."""
    if kind == "absent":
        return None
    if kind == "full":
        return open("/dev/full", "w")
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


@pytest.mark.parametrize("kind", ["absent", "full", "pipe"])
def test_what_stdout_does_not_take_is_in_the_log(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sys, "stdout", dead_stdout(kind))
    reporter = Reporter(tmp_path / "log.txt", speaks=True)
    for text in ("one", "two", "three"):
        reporter.line(text)
        reporter.table(Table(text))
    with reporter.steps("train", 1, 1) as follow:
        follow(1, "loss")
    lines = [line[9:] for line in (tmp_path / "log.txt").read_text().splitlines()]
    why = {"full": "No space left on device", "pipe": "Broken pipe"}
    gap = [f"standard output: {why[kind]}: not all that is said is in it"] if kind in why else []
    assert [line for line in lines if line.startswith(("one", "two", "three", "sta"))] == [
        *("one", *gap, "two", "three")
    ]


def test_a_terminal_that_stands_still_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "_PATIENCE_S", 0.05)
    terminal, stdout = os.openpty()
    with open(stdout, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        termios.tcflow(stdout, termios.TCOOFF)  # Ctrl-S
        reporter = Reporter(tmp_path / "log.txt", speaks=True)
        for number in range(100):
            reporter.line(f"line {number}")
        assert (tmp_path / "log.txt").read_text().endswith("line 99\n")
        termios.tcflow(stdout, termios.TCOON)
        said = b""
        while b"line 99" not in said:  # late is not lost
            said += os.read(terminal, 1000)
        assert said.split(b"\r\n")[:2] == [b"line 0", b"line 1"]
    os.close(terminal)


@pytest.mark.parametrize("kind", ["absent", "full", "pipe"])
def test_a_complaint_that_nobody_takes_is_lost(monkeypatch, kind):
    monkeypatch.setattr(sys, "stderr", dead_stdout(kind))
    print_error("one")
    print_error("two")


def test_a_complaint_keeps_its_lines_and_steers_no_terminal(capsys):
    print_error(f"{ODD}\nb.toml:100: \x1b[31mred\u202e")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{ODD}\nb.toml:100: \\x1b[31mred\\u202e\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_goes_to_stderr_while_results_go_elsewhere(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with progress("answering", 8) as step:
        step(3)
    assert "answering" in screen.getvalue()
    with progress("answering", None) as step:  # nobody knows how many there are
        step(3, "so far")
    assert "so far" in screen.getvalue()


@pytest.mark.parametrize("both", [True, False])
def test_no_bar_in_a_log_and_none_among_results(monkeypatch, both):
    screen = Terminal() if both else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", Terminal())
    with progress("answering", 8) as step:
        step(3)
    assert screen.getvalue() == ""
