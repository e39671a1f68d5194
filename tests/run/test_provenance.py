"""Where numbers come from: the commit, the difference from it, versions, hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata

import pytest

from runner.errors import DataError, StorageError
from runner.run import provenance
from runner.run.provenance import read_record
from runner.utils.files import file_sha256

AS_SOMEONE = ("-c", "user.name=n", "-c", "user.email=e", "-c", "core.hooksPath=/dev/null")


def git(folder, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *AS_SOMEONE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit that takes the place of ours."""
    folder = (tmp_path / "checkout").resolve()
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "a.txt").write_text("one\n")
    git(folder, "add", "a.txt")
    git(folder, "commit", "-q", "-m", "one")
    monkeypatch.setattr(provenance, "CHECKOUT", folder)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_a_clean_checkout_is_its_commit(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert provenance.git_state() == {"commit": commit, "diff_sha256": None}


@pytest.mark.parametrize("change", [b"one\ntwo\n", "\u00e4\n".encode("latin-1"), b"\x00\x01\n"])
def test_a_changed_checkout_has_a_hash_of_the_change(checkout, change):
    (checkout / "a.txt").write_bytes(change)
    state = provenance.git_state()
    assert state["commit"] == git(checkout, "rev-parse", "HEAD")
    digest = state["diff_sha256"]
    assert digest is not None
    assert len(digest) == 64
    # the same for the same change, staged or not, whatever the settings of git
    git(checkout, "add", "a.txt")
    for setting in ("color.ui=always", "diff.external=false", "core.abbrev=4", "diff.context=0"):
        git(checkout, "config", *setting.split("="))
    assert provenance.git_state() == state
    (checkout / "a.txt").write_bytes(change + b"!")
    assert provenance.git_state()["diff_sha256"] not in (digest, None)


def test_outside_a_checkout_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    assert provenance.git_state() == {"commit": None, "diff_sha256": None}


def test_without_git_nothing_is_known(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state() == {"commit": None, "diff_sha256": None}


def test_a_repository_around_the_installed_package_is_not_ours(checkout, monkeypatch):
    site_packages = checkout / ".venv" / "site-packages"
    site_packages.mkdir(parents=True)
    monkeypatch.setattr(provenance, "CHECKOUT", site_packages)
    assert provenance.git_state() == {"commit": None, "diff_sha256": None}


def test_the_hash_of_a_file(tmp_path):
    content = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_versions_are_those_installed(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("pydantic", "no-such-package"))
    assert provenance.versions() == {"pydantic": metadata.version("pydantic")}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names the flags of x86-64")
def test_the_instruction_sets_of_the_processor():
    assert "sse2" in provenance.cpu_features()


def test_the_instruction_sets_of_an_arm_processor(monkeypatch):
    text = "processor\t: 0\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd4f\n"
    monkeypatch.setattr(provenance.Path, "read_text", lambda *_, **__: text)
    assert provenance.cpu_features() == {"fp", "asimd", "bf16"}


def test_what_is_collected(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "job.toml"])
    found = provenance.collect(seed=7, world=2, threads=3, devices=["a", "b"])
    assert found["command"] == ["main.py", "job.toml"]
    assert (found["seed"], found["ranks"], found["threads_per_rank"]) == (7, 2, 3)
    assert found["machine"]["devices"] == ["a", "b"]
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["machine"]["processor"].strip()
    assert set(found["git"]) == {"commit", "diff_sha256"}


def test_a_record_that_cannot_be_read_now_is_not_a_damaged_one(tmp_path, monkeypatch):
    path = tmp_path / "provenance.json"
    for text in (None, "", "{", "[]"):
        if text is not None:
            path.write_text(text)
        with pytest.raises(DataError, match=r"provenance\.json"):
            read_record(path)

    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        read_record(path)


def test_another_reason_for_the_same_choice_is_no_difference():
    def record(choice: str, reason: str) -> dict[str, object]:
        return {"command": [reason], "computing": {"batches": {"choice": choice, "reason": reason}}}

    one = record("packed", "compared")
    assert provenance.differing_fields(one, record("packed", "as the run began")) == []
    assert provenance.differing_fields(one, record("padded", "compared")) == [
        'computing.batches.choice: "packed", now "padded"'
    ]
