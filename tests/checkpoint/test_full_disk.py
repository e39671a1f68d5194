"""A disk that fills up: at most some checkpoints are missing, and one line says what is needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interruptions import DATA, FAULT, FAULT_JOB, SCORED, at_step, intact


@pytest.fixture
def job_file(tmp_path: Path, tiny: Callable[[str], Path]) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(FAULT_JOB.format(data=DATA, model=tiny("bert")))
    return path


FULL = """
import errno, os
import runner.checkpoint.files
class Full(runner.checkpoint.files.Files):
    def write(self, file, data):
        if rank == {rank} and "a0001" in os.readlink(f"/proc/self/fd/{{file}}") and {when}:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(file, data)
import runner.checkpoint.store
runner.checkpoint.store.Files = Full
"""
# Notes where training is.
NOW = """
import runner.train.state
now = []
init = runner.train.state.TrainState.__init__
def noted(self, *arguments, **options):
    init(self, *arguments, **options)
    now.append(self)
runner.train.state.TrainState.__init__ = noted
"""


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_full_disk_ends_all_with_what_is_needed(zygote, job_file, tmp_path, rank):
    folder = tmp_path / "run"
    code = FULL.format(rank=rank, when=f"now and now[-1].step > {FAULT}") + NOW
    codes, text = zygote.run(job_file, "--run-dir", folder, ranks=2, code=code)
    assert codes == [74, 74], text
    (said,) = [line for line in text.splitlines() if "a checkpoint needs" in line]
    assert re.search(
        rf"rank {rank}: \S+step-\d+\S*: No space left on device; a checkpoint needs [\d,]+ bytes"
        r" or more; [\d,]+ are free; checkpoints from before are untouched; free some space",
        said,
    )
    assert "Traceback" not in text
    assert intact(folder) == [SCORED]


# From a step on, rank 0 finds no room for anything below the run folder: in what is open already,
# or to open it. The ranks' last words have had theirs from the start.
ALL_FULL = """
import builtins, errno, io, os
def fill_up():
    real_open, real_os_open = io.open, os.open
    def refuse(name, writes):
        inside = isinstance(name, (str, os.PathLike)) and {folder!r} in str(name)
        if inside and writes and "rank-" not in str(name) and "spoken" not in str(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(name))
    for number in os.listdir("/proc/self/fd"):
        try:
            if os.readlink("/proc/self/fd/" + number).startswith({folder!r}):
                os.dup2(real_os_open("/dev/full", os.O_WRONLY), int(number))
        except OSError:
            continue
    def os_open(name, flags, *rest, **options):
        refuse(name, flags & (os.O_WRONLY | os.O_RDWR))
        return real_os_open(name, flags, *rest, **options)
    def io_open(name, mode="r", *rest, **options):
        refuse(name, set(mode) & set("wax+"))
        return real_open(name, mode, *rest, **options)
    os.open, io.open, builtins.open = os_open, io_open, io_open
"""


def test_a_disk_that_is_full_for_everything_ends_in_one_line(zygote, job_file, tmp_path):
    """The log has gaps; the next row of train.csv, which cannot be made up for, ends it."""
    folder = tmp_path / "run"
    code = ALL_FULL.format(folder=str(folder)) + at_step(FAULT, 0, "fill_up()")
    codes, text = zygote.run(job_file, "--run-dir", folder, ranks=2, code=code)
    assert codes == [74, 74], text
    assert text.count("train.csv: No space left on device") == 1, text
    assert "Traceback" not in text
    assert intact(folder) == [SCORED]


def test_a_checkpoint_that_fails_once_in_between_is_only_warned_of(zygote, job_file, tmp_path):
    """checkpoint_minutes makes one every step; the third of them finds the disk full."""
    code = FULL.format(rank=0, when="saves[0] == 3")
    code += (
        "\nimport runner.checkpoint.commit\nsaves = [0]\nsave = runner.checkpoint.commit.save\n"
        "def counted(*arguments):\n    saves[0] += 1\n    return save(*arguments)\n"
        "runner.checkpoint.commit.save = counted\n"
    )
    code += at_step(
        4, 0, "import runner.utils.signals; runner.utils.signals.request_stop('SIGUSR2')"
    )
    options = ("--set", "train.checkpoint_minutes=0.00001")
    codes, text = zygote.run(job_file, "--run-dir", tmp_path / "run", *options, code=code)
    assert codes == [75], text
    assert text.count("no checkpoint after step") == 1
    assert "No space left on device; a checkpoint needs" in text
    assert "training goes on" in text
    assert intact(tmp_path / "run") == [2, 4]
