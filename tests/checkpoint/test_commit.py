"""The commit protocol of two ranks: killed, failing, damaged and frozen at every point.

tests/workers/store_sessions.py does the work in a process of its own, without torch: it forks.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.checkpoint.commit import adopt_checkpoints, newest
from runner.checkpoint.files import Entry, Files
from runner.checkpoint.store import CheckpointStore, DamagedError, Manifest
from runner.errors import DataError, RunDirError, StorageError
from runner.run.folder import RunDir
from runner.run.lease import Lease

SESSIONS = Path(__file__).parents[1] / "workers" / "store_sessions.py"


def counts(*arguments: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(SESSIONS), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


BOTH_PARTS = pytest.mark.parametrize("part", ["once", pytest.param("rest", marks=pytest.mark.slow)])


@BOTH_PARTS
def test_a_kill_before_or_after_any_operation_costs_no_checkpoint(part):
    """SIGKILL of either rank at each operation of save, rotate and resume; whatever was committed
    by then is whole, is what the next start goes on from, and leads to the same end. Once after
    each of them; the rest is before each."""
    found = counts("kill", part)
    operations = [value for name, value in found.items() if name.startswith("operations")]
    assert len(operations) == 4
    assert sum(operations) >= 60
    assert found["kills"] == sum(operations)


@pytest.mark.parametrize(
    ("times", "seed"), [("20", "7"), pytest.param("80", "8", marks=pytest.mark.slow)]
)
def test_kills_at_random_times(times, seed):
    assert counts("random", times, seed)["kills"] >= int(times)


@BOTH_PARTS
def test_a_failed_operation_costs_no_checkpoint(part):
    """The Nth operation of a new run and of a resume fails, N = 1, 2, ... to the last, on either
    rank: all ranks agree, say what is needed, and what was committed stays whole where it is. Once
    each in one of its ways, in turn; the rest is in the others, of which a resume has none."""
    found = counts("fail", part)
    operations = {name: found.pop(name) for name in [*found] if name.startswith("operations")}
    assert len(operations) == 4
    new, resume = found.pop("new"), found.pop("resume", 0)
    assert found.pop("lasting") >= 25
    assert set(found) == {"ENOSPC", "EDQUOT", "EIO", "EACCES", "short write"}
    assert sum(found.values()) == new + resume
    if part == "once":
        assert min(found.values()) >= 5
        assert new + resume == sum(operations.values()) >= 400
    else:
        assert min(found.values()) >= 20
        assert new >= 400


@BOTH_PARTS
def test_damage_is_never_loaded(part):
    found = counts("damage", part)
    others = [found.pop(how, 0) for how in ("deleted", "emptied", "linked", "swapped")]
    if part == "once":
        assert sum(others) >= 15
        assert found == {"flips": 50, "truncations": 12, "foreign": 1, "refused": 3}
    else:
        assert found == {"flips": 150, "truncations": 38}


def test_what_a_thawed_start_commits_is_never_loaded():
    found = counts("zombies")
    assert found["zombies"] >= 10
    assert found["noticed"] > 0
    assert found["late commits that nobody loads"] > 0


# ---- the store alone


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """One checkpoint of one rank."""
    made = CheckpointStore(tmp_path / "checkpoints", 0)
    commit(made, "step-000010-a0001")
    return made


def commit(store: CheckpointStore, name: str, content: bytes = b"weights") -> Manifest:
    store.begin(name)
    stage = store.stage(name)
    stage.put("folder/rank-0000.pt", lambda file: file.write(content) and None)
    return store.commit(name, stage.entries, {"step": 0.1 + 0.2, "text": "\u4e2d"})


def test_a_manifest_comes_back(store):
    found = store.manifest("step-000010-a0001")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert found.files == {"folder/rank-0000.pt": Entry(7, sha256, 0)}
    assert found.bytes == 7
    assert found.facts == {"step": 0.1 + 0.2, "text": "\u4e2d"}
    store.check(found, found.files)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"step"', '"stop"'),
        lambda text: text.replace("0.30000000000000004", "0.3"),
        lambda text: text + " ",
        lambda text: text.replace(": ", ":  ", 1),
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: "[" * 100_000,
        lambda text: "{}",
        lambda text: "[]",
        lambda text: '{"checkpoint": {"files": {"a": {}}}}',
        lambda text: "",
    ],
)
def test_any_other_manifest_is_refused(store, damage):
    path = store.folder / "step-000010-a0001" / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        store.manifest("step-000010-a0001")
    assert issubclass(DamagedError, DataError)


def test_a_manifest_counts_in_its_own_folder_only(store):
    (store.folder / "step-000010-a0001").rename(store.folder / "step-000020-a0001")
    with pytest.raises(DamagedError, match="belongs to step-000010-a0001"):
        store.manifest("step-000020-a0001")


def test_a_stage_that_somebody_thawed_still_writes_into_is_removed(tmp_path):
    """Such a start knows the stage by its name alone: it must not fill it while it is emptied."""
    stage = tmp_path / "checkpoints" / ".stage-step-000020-a0001"

    class WithALateWriter(Files):
        def remove(self, path: Path) -> None:
            super().remove(path)
            with contextlib.suppress(FileNotFoundError):
                (stage / "late").write_bytes(b"x")

    stage.mkdir(parents=True)
    (stage / "rank-0000.pt").write_bytes(b"x")
    store = CheckpointStore(tmp_path / "checkpoints", 0, WithALateWriter())
    store.clean()
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", ".hidden", "a//b", "a\n", ""])
def test_files_outside_of_a_checkpoint_cannot_be_named(store, name):
    commit_with = {name: Entry(1, "00", 0)}
    store.begin("step-000030-a0001")
    stage = store.folder / ".stage-step-000030-a0001"
    try:
        store.commit("step-000030-a0001", commit_with, {})
    except OSError:  # no such folder to sync; the manifest is there
        stage.rename(store.folder / "step-000030-a0001")
    with pytest.raises(DamagedError, match="names the file"):
        store.manifest("step-000030-a0001")


def test_which_checkpoints_count(store):
    for name in ("step-000020-a0001", "step-000020-scored-a0001", "step-000020-a0002"):
        commit(store, name)
    commit(store, "step-000030-a0001")  # late, by a start that was succeeded
    (store.folder / "notes").mkdir()
    assert store.names(0, []) == []
    listed = ["step-000010-a0001", "step-000020-a0001"]
    assert store.names(2, listed) == ["step-000020-a0002", "step-000020-a0001", listed[0]]
    assert store.names(1, []) == [
        "step-000030-a0001",
        "step-000020-scored-a0001",
        "step-000020-a0002",
        "step-000020-a0001",
        "step-000010-a0001",
    ]


def test_a_checkpoint_put_aside_twice_keeps_both(store):
    assert store.quarantine("step-000010-a0001") == "damaged-step-000010-a0001"
    commit(store, "step-000010-a0001")
    assert store.quarantine("step-000010-a0001") == "damaged-step-000010-a0001-2"
    assert store.names(1, []) == []


class Unreadable(Files):
    """A disk on which one file cannot be read for a moment."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number

    def open(self, path: Path) -> int:
        if path.name == self.name:
            raise OSError(self.number, os.strerror(self.number))
        return super().open(path)


class Alone:
    """One rank that talks to itself."""

    index = 0

    def all_gather(self, value):
        return [value]


@pytest.mark.parametrize("file", ["manifest.json", "rank-0000.pt"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_what_cannot_be_read_for_a_moment_is_not_damaged(store, file, number):
    """It ends the start; the next one finds every checkpoint where it was."""
    commit(store, "step-000020-a0001")
    names, warnings = ["step-000020-a0001", "step-000010-a0001"], []
    away = CheckpointStore(store.folder, 0, Unreadable(file, number))
    with pytest.raises(StorageError, match=rf"{file}: .*; no checkpoint was touched") as caught:
        newest(away, Alone(), names, lambda _: None, warnings.append)
    assert os.strerror(number) in str(caught.value)
    assert store.names(1, []) == names
    found = newest(store, Alone(), names, lambda _: None, warnings.append)
    assert found is not None
    assert (found.name, warnings) == (names[0], [])


def test_a_run_folder_that_cannot_be_tidied_is_a_sentence(store, monkeypatch):
    """What an earlier start left behind lies where nothing may be removed."""
    attempt = Lease.acquire(RunDir(store.folder.parent))
    attempt.seal(["step-000010-a0001"])
    (store.folder / ".stage-step-000020-a0001").mkdir()
    monkeypatch.setattr(Files, "remove_folder", denied)
    with pytest.raises(StorageError, match="stage-step-000020-a0001: Permission denied"):
        adopt_checkpoints(store, Alone(), attempt)
    attempt.release(74)


def denied(_: Files, path: Path) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_the_folder_of_checkpoints_is_synced_into_its_parent(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(Files, "sync_folder", lambda _, path: synced.append(path))
    commit(CheckpointStore(tmp_path / "checkpoints", 0), "step-000010-a0001")
    assert tmp_path in synced


class Remembering(Files):
    """Files that know what the disk does not have yet: what was written and not synced since, and
    the folders whose names are newer than their last sync."""

    def __init__(self) -> None:
        self.unsynced: set[Path] = set()
        self.paths: dict[int, Path] = {}
        self.renamed: list[Path] = []

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self.unsynced |= {path, path.parent}

    def create(self, path: Path) -> int:
        file = super().create(path)
        self.paths[file] = path
        self.unsynced |= {path, path.parent}
        return file

    def write(self, file: int, data: memoryview) -> int:
        self.unsynced.add(self.paths[file])
        return super().write(file, data)

    def open(self, path: Path) -> int:
        file = super().open(path)
        self.paths[file] = path
        return file

    def sync(self, file: int) -> None:
        super().sync(file)
        self.unsynced.discard(self.paths[file])

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self.unsynced.discard(path)

    def rename(self, old: Path, new: Path) -> None:
        inside = sorted(path for path in self.unsynced if path.is_relative_to(old))
        assert not inside, "a power cut after the rename would take these"
        super().rename(old, new)
        self.renamed.append(new)
        self.unsynced |= {old.parent, new.parent}


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path):
    """And the name itself, once the checkpoint counts."""
    files = Remembering()
    store = CheckpointStore(tmp_path / "checkpoints", 0, files)
    for name in ("step-000010-a0001", "step-000020-a0001"):
        store.begin(name)
        stage = store.stage(name)
        stage.put("folder/rank-0000.pt", lambda file: file.write(b"weights") and None)
        model = stage.folder / "model" / "weights"  # as a library writes it, which syncs nothing
        model.parent.mkdir()
        model.write_bytes(b"weights")
        files.unsynced |= {model, model.parent, stage.folder}
        stage.adopt("model")
        store.commit(name, stage.entries, {})
        assert files.renamed.pop() == store.folder / name
        assert not files.unsynced
    store.quarantine("step-000020-a0001")
    store.remove(["step-000010-a0001"])
    assert len(files.renamed) == 2
    assert not files.unsynced


def test_a_sync_reaches_the_disk(tmp_path, monkeypatch):
    """The tests above watch the order of operations; this is what two of them do."""
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}"))
    )
    files = Files()
    file = files.create(tmp_path / "a")
    files.sync(file)
    files.close(file)
    files.sync_folder(tmp_path)
    assert synced == [str(tmp_path / "a"), str(tmp_path)]


@pytest.mark.parametrize("attempt", [1, 2])
def test_checkpoints_of_which_none_counts_are_no_beginning(tmp_path, attempt):
    run = RunDir(tmp_path)
    store = CheckpointStore(run.checkpoints, 0)
    for _ in range(attempt):
        lease = Lease.acquire(run)
        lease.release(75)
    name = "step-000010-a0001"
    (run.checkpoints / name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"none of its 1 checkpoints counts: .*--restart"):
        adopt_checkpoints(store, Alone(), lease)
    assert store.names(1, ()) == [name]
    # Begun anew, and killed before the earlier run was put aside.
    anew = Lease.acquire(run, anew=True)
    assert adopt_checkpoints(store, Alone(), anew) == []


# ---- what counts


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("name", ["0001.sealed", "attempts"])
def test_what_cannot_be_read_is_not_taken_for_absent(store, monkeypatch, number, name):
    run = RunDir(store.folder.parent)
    first = Lease.acquire(run)
    first.seal([])
    first.release(75)
    attempt = Lease.acquire(run)
    failing_once(monkeypatch, number, name)
    with pytest.raises(StorageError, match=rf"{name}: {os.strerror(number)}"):
        adopt_checkpoints(store, Alone(), attempt)
    assert not (run.attempts / "0002.sealed").exists()
    assert adopt_checkpoints(store, Alone(), attempt) == ["step-000010-a0001"]


def failing_once(monkeypatch, number: int, name: str) -> None:
    """Let the system refuse, once, whatever asks for a file or folder of this name."""
    left = [1]

    def refusing(function):
        def call(path, *arguments, **options):
            if isinstance(path, str | os.PathLike) and os.path.basename(path) == name and left:
                left.clear()
                raise OSError(number, os.strerror(number), os.fspath(path))
            return function(path, *arguments, **options)

        return call

    for operation in ("stat", "listdir", "open"):
        monkeypatch.setattr(os, operation, refusing(getattr(os, operation)))


def test_a_start_that_was_succeeded_removes_nothing_of_its_heirs(store):
    run = RunDir(store.folder.parent)
    first = Lease.acquire(run)
    late = CheckpointStore(store.folder, 0, fence=first.verify)
    first.release(75)
    heir = Lease.acquire(run)
    (store.folder / ".stage-step-000020-a0002").mkdir()
    before = sorted(store.folder.iterdir())
    for act in (
        late.clean,
        lambda: late.remove(["step-000010-a0001"]),
        lambda: late.quarantine("step-000010-a0001"),
        lambda: late.abandon("step-000020-a0002"),
        lambda: late.begin("step-000030-a0001"),
        lambda: late.commit("step-000020-a0002", {}, {}),
    ):
        with pytest.raises(RunDirError, match="was taken over"):
            act()
    assert sorted(store.folder.iterdir()) == before
    heir.release(0)
