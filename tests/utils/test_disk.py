"""A full disk is told by its own name: the file that found no room, or the place that is full."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from runner.errors import DataError, StorageError
from runner.utils import disk
from runner.utils.disk import reason, room
from runner.utils.files import full_disk_errors, storage_errors

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def free(monkeypatch):
    """`free({folder: bytes})`: what `statvfs` finds below these folders; None is no inode."""

    def pretend(table):
        def statvfs(path):
            size = next((n for place, n in table.items() if Path(path).is_relative_to(place)), 9**9)
            inodes = {"f_files": 10, "f_favail": 0 if size is None else 5}
            return SimpleNamespace(f_bavail=size or 9**9, f_frsize=1, **inodes)

        monkeypatch.setattr(disk.os, "statvfs", statvfs)

    return pretend


def told(error: OSError, path: Path | None) -> str:
    with pytest.raises(StorageError) as caught, storage_errors(path):
        raise error
    return str(caught.value)


ADVICE = "free some space or choose another folder"


def test_what_is_free_is_that_of_the_file_that_found_no_room(tmp_path, free):
    free({tmp_path: 4321})
    path = tmp_path / "not" / "there" / "yet"
    words = f"{path}: No space left on device; 4,321 bytes are free there: {ADVICE}"
    assert told(FULL, path) == words
    assert room(path) == "4,321 bytes are free"


@pytest.mark.parametrize("kind", [0, 1])
def test_a_file_elsewhere_is_named_not_the_folder_that_was_being_written(tmp_path, free, kind):
    other, run = tmp_path / "tmp", tmp_path / "runs" / "x"
    other.mkdir()
    run.mkdir(parents=True)
    free({other: 7, run: 9**9})
    # As shutil spells it: from a file, to a file.
    names = [(str(other / "f"),), (str(run / "f"), None, str(other / "f"))][kind]
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)
    assert told(error, run) == (
        f"{other / 'f'}: No space left on device; 7 bytes are free there: {ADVICE}"
    )
    beside = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.with_name(".x.tmp")))
    assert told(beside, run).startswith(f"{run}: No space left on device; 387,420,489 bytes")


def test_a_quota_and_inodes_are_no_bytes(tmp_path, free):
    free({tmp_path: None})
    assert told(FULL, tmp_path / "a") == (
        f"{tmp_path / 'a'}: No space left on device; no inode is free there: {ADVICE}"
    )
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "a"))
    assert reason(error) == "No space left on device (no inode is free)"
    quota = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert told(quota, tmp_path / "a") == f"{tmp_path / 'a'}: {quota.strerror}; {ADVICE}"


@pytest.mark.parametrize("variable", ["TMPDIR", "SPANTUNE_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_a_full_disk_that_no_file_names_is_looked_for(tmp_path, free, monkeypatch, variable):
    for name in ("TMPDIR", "SPANTUNE_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    free({tmp_path / variable: 12})

    def library():
        try:
            raise FULL
        except OSError as error:
            raise RuntimeError("a library's own words") from error

    with pytest.raises(StorageError) as caught, full_disk_errors():
        library()
    assert str(caught.value) == (
        f"{tmp_path / variable}: No space left on device; 12 bytes are free there: {ADVICE}"
    )


def test_errors_without_a_full_disk_pass():
    for error in (DataError("x"), RuntimeError("y"), PermissionError(errno.EACCES, "z")):
        with pytest.raises(type(error), match=r"[xyz]$"), full_disk_errors():
            raise error


def test_of_a_whole_folder_the_first_failure_is_told(tmp_path):
    error = shutil.Error([("from", str(tmp_path / "a"), "[Errno 5] Input/output error")] * 2)
    assert told(error, tmp_path) == f"{tmp_path / 'a'}: [Errno 5] Input/output error"


def test_the_folder_of_temporary_files_is_named_where_it_is_full(tmp_path, free, monkeypatch):
    from runner.checkpoint.deepspeed_io import StoreCheckpointEngine

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    free({tmp_path: 65_536})

    def write_bytes(*_):
        raise FULL

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(StorageError) as caught:
        StoreCheckpointEngine(None).prepare()
    assert str(caught.value) == (
        f"{tmp_path}: No space left on device; a checkpoint needs 262,144 bytes for a moment in the"
        " folder of temporary files, where 65,536 bytes are free; free some space there or set"
        " TMPDIR to another folder"
    )
    assert list(tmp_path.iterdir()) == []
