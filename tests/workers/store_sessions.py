"""Two ranks that save, rotate and resume without torch, so that every one of their file operations
can fail or be their last.

    store_sessions.py kill PART       SIGKILL before and after every operation of either rank
    store_sessions.py random N SEED   SIGKILL of a rank, or of both, at a random time, N times
    store_sessions.py fail PART       each operation in turn fails, a read too, in every way
    store_sessions.py damage PART     flipped bytes, truncations, deleted, swapped and foreign files
    store_sessions.py zombies         starts that freeze in the midst of saving and thaw too late

PART is `once`, a pass over all there is, or `rest`: what that leaves out of the whole. `kill once`
kills after each operation, the rest before it; `fail once` lets each fail in one way, the rest in
the others that it has; `damage once` has a quarter of the flips and truncations and all else.
Each prints one JSON object of counts; anything broken ends the program with an assertion.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(CHECKOUT)]

from runner.checkpoint.commit import adopt_checkpoints, newest, rotate, save
from runner.checkpoint.files import Files
from runner.checkpoint.store import CheckpointStore, DamagedError, Manifest
from runner.errors import DataError, RunnerError, StorageError
from runner.run.attempts import attempt_numbers
from runner.run.folder import RunDir, checkpoint_name, checkpoint_place
from runner.run.lease import Lease

STEPS, EVERY, BEST = 10, 2, 4  # steps of a session, steps between commits, the best until the last
WRITING = ("make_folder", "create", "write", "sync", "close", "rename", "sync_folder")
REMOVING = ("remove", "remove_folder")
READING = ("open", "read", "names")
SECONDS = 30  # after which a rank that hangs is ended, which no trial takes for an end of its own
RANKS = 2
PADDING = b"x" * 999


class Pipes:
    """The ranks' talk over two pipes; a peer that is gone is an EOFError."""

    def __init__(self, index: int, reads: int, writes: int) -> None:
        self.index, self._reads, self._writes = index, reads, writes

    def all_gather(self, value):
        data = repr_bytes(value)
        os.write(self._writes, struct.pack("<I", len(data)) + data)
        theirs = from_bytes(self._take(struct.unpack("<I", self._take(4))[0]))
        return [value, theirs] if self.index == 0 else [theirs, value]

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = os.read(self._reads, size - len(data))
            if not part:
                raise EOFError("the other rank is gone")
            data += part
        return data


def repr_bytes(value) -> bytes:
    import pickle  # both ends of the pipe are this program

    return pickle.dumps(value)


def from_bytes(data: bytes):
    import pickle

    return pickle.loads(data)


class Watched:
    """Files whose operations are counted, and of which one can be made special."""

    def __init__(self, act: Callable[[int, str, Callable], object] | None = None) -> None:
        self._files, self._act = Files(), act
        self.log: list[str] = []

    def __getattr__(self, name: str):
        operation = getattr(self._files, name)

        def counted(*arguments):
            self.log.append(name)
            number = len(self.log)
            if self._act is None:
                return operation(*arguments)
            return self._act(number, name, lambda *given: operation(*(given or arguments)))

        return counted

    def mark(self, name: str) -> None:
        """An operation that is not one of Files, such as sealing."""
        self.log.append(name)
        if self._act is not None:
            self._act(len(self.log), name, lambda: None)


def state_after(state: bytes, rank: int) -> bytes:
    """One step of training."""
    return hashlib.sha256(state + bytes([rank])).digest()


def session(path: Path, talk: Pipes, files: Watched) -> dict:
    """One start: resume from what is there, go on to the end, commit and rotate on the way."""
    run, main = RunDir(path), talk.index == 0
    attempt = Lease.acquire(run) if main else None
    fence = attempt.verify if attempt else lambda: None
    store = CheckpointStore(run.checkpoints, talk.index, files, fence)
    if main:
        files.mark("claimed")
    names = adopt_checkpoints(store, talk, attempt)
    if main:
        files.mark("sealed")
    number = talk.all_gather(attempt.number if attempt else 0)[0]
    warnings: list[str] = []

    def examine(manifest: Manifest) -> None:
        """As early stopping needs it, with the weights that were the best by then."""
        best = manifest.facts["best"]
        if main and best not in (None, manifest.name):
            try:
                holder = store.manifest(best)
                store.check(holder, [file for file in holder.files if file.startswith("model/")])
            except DamagedError as error:
                raise DataError(f"{error}; it was the best") from None

    manifest = newest(store, talk, names, examine, warnings.append)
    step, state = 0, bytes(32)
    if manifest is not None:
        step = manifest.facts["step"]
        state = (run.checkpoints / manifest.name / f"rank-{talk.index}").read_bytes()[:32]
        assert state == expected(step, talk.index), f"loaded step {step} is damaged"
    if attempt:
        attempt.note_resumed_step(step)
    best = manifest.facts["best"] if manifest else None
    began, failures = step, []

    def tidied() -> None:
        if attempt:
            try:
                rotate(store, attempt, best, lambda manifest: manifest.facts["best"])
            except (OSError, StorageError) as error:
                failures.append(f"rotation: {error}")

    tidied()
    while step < STEPS:
        step, state = step + 1, state_after(state, talk.index)
        if step % EVERY:
            continue
        name = checkpoint_name(step, number, scored=False)
        before, best = best, name if step in (BEST, STEPS) else best

        def write(stage, state=state):
            stage.put(
                f"rank-{talk.index}", lambda file: (file.write(state), file.write(b"x" * 999))
            )
            if main:
                (stage.folder / "model").mkdir()
                (stage.folder / "model" / "weights").write_bytes(state)
                stage.adopt("model")

        try:
            save(store, talk, name, write, {"step": step, "best": best})
        except StorageError as error:
            failures.append(str(error))
            best = before
            continue
        tidied()
    if attempt:
        attempt.release(0)
    return {
        "state": state.hex(),
        "began": began,
        "log": files.log,
        "warnings": warnings,
        "failures": failures,
    }


def expected(step: int, rank: int) -> bytes:
    state = bytes(32)
    for _ in range(step):
        state = state_after(state, rank)
    return state


def start(path: Path, acts: dict[int, Callable] | None = None, after: Callable | None = None):
    """Run a session of two ranks; returns what each returned, None for one that died."""
    pipes = [os.pipe() for _ in range(RANKS)]
    answers = [os.pipe() for _ in range(RANKS)]
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            for number, ends in enumerate(pipes):
                os.close(ends[1] if number == rank else ends[0])
            talk = Pipes(rank, pipes[rank][0], pipes[1 - rank][1])
            code = 71
            try:
                found = session(path, talk, Watched((acts or {}).get(rank)))
                os.write(answers[rank][1], json.dumps(found).encode())
                code = 0
            except AssertionError as error:
                print(f"rank {rank}: {error}", file=sys.stderr)
                code = 99
            except RunnerError as error:
                os.write(answers[rank][1], json.dumps({"error": str(error)}).encode())
                code = error.exit_code
            except (EOFError, BrokenPipeError):
                pass
            except Exception:
                traceback.print_exc()
                code = 70
            finally:
                os._exit(code)
        children.append(child)
    for ends in pipes:
        os.close(ends[0])
        os.close(ends[1])
    if after is not None:
        after(children)
    found = []
    for rank, child in enumerate(children):
        os.close(answers[rank][1])
        with os.fdopen(answers[rank][0], "rb") as file:
            text = file.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code != 99, "a rank found something broken"
        found.append((code, json.loads(text) if text else None))
    return found


def finished(found, *, began: int | None = None) -> None:
    """Both ranks ended well, with the state of an undisturbed session."""
    for rank, (code, answer) in enumerate(found):
        assert code == 0, (rank, code, answer)
        assert answer["state"] == expected(STEPS, rank).hex()
        assert began is None or answer["began"] == began


def standing(path: Path) -> list[str]:
    """The checkpoints under their final names, oldest first."""
    try:
        names = os.listdir(path / "checkpoints")
    except FileNotFoundError:
        return []
    return sorted((n for n in names if checkpoint_place(n)), key=lambda n: checkpoint_place(n))


def whole(path: Path, but: str = "") -> int:
    """Step of the newest whole checkpoint; every one that stands must be whole, `but` one."""
    newest_step = 0
    for rank in range(RANKS):
        store = CheckpointStore(path / "checkpoints", rank)
        for name in standing(path):
            if name == but:
                continue
            manifest = store.manifest(name)
            store.check(manifest, manifest.files)
            newest_step = max(newest_step, manifest.facts["step"])
    return newest_step


def tidy(path: Path) -> None:
    """After an undisturbed end: the newest two and the best, nothing else."""
    steps = [checkpoint_place(name)[0] for name in standing(path)]
    assert steps == [BEST, STEPS - EVERY, STEPS], steps
    names = os.listdir(path / "checkpoints")
    assert not [name for name in names if name.startswith(".")], names


def halfway(path: Path) -> None:
    """A folder in which a session was killed after step 6, its newest checkpoint then damaged, a
    stage left behind: what a resume may find."""

    def die(number: int, name: str, operation: Callable) -> object:
        result = operation()
        if (
            name == "rename"
            and (path / "checkpoints" / checkpoint_name(6, 1, scored=False)).exists()
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    start(path, {0: die})
    newest_file = path / "checkpoints" / checkpoint_name(6, 1, scored=False) / "rank-1"
    newest_file.write_bytes(newest_file.read_bytes()[:-1])
    (path / "checkpoints" / ".stage-step-000008-a0001").mkdir()
    (path / "checkpoints" / ".stage-step-000008-a0001" / "rank-0").write_bytes(b"half")


def scenarios(root: Path) -> dict[str, Callable[[Path], None]]:
    """Ways to prepare a folder: a new run, and a resume that has to put a checkpoint aside."""
    made = root / "halfway"
    made.mkdir()
    halfway(made)
    return {
        "new": lambda path: path.mkdir(),
        "resume": lambda path: shutil.copytree(made, path, symlinks=True) and None,
    }


def kill_everywhere(root: Path, part: str) -> dict[str, int]:
    """SIGKILL before ("rest") or after ("once") every operation of either rank."""
    when = "after" if part == "once" else "before"
    counts: Counter[str] = Counter()
    for title, prepare in scenarios(root).items():
        path = root / f"{title}-undisturbed"
        prepare(path)
        found = start(path)
        finished(found, began=0 if title == "new" else BEST)
        tidy(path)
        for rank, (_, answer) in enumerate(found):
            for number in range(1, len(answer["log"]) + 1):

                def die(n, _, operation, number=number):
                    if n == number and when == "before":
                        os.kill(os.getpid(), signal.SIGKILL)
                    result = operation()
                    if n == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return result

                path = root / f"{title}-{rank}-{number}"
                prepare(path)
                killed = start(path, {rank: die})
                assert killed[rank][0] == -signal.SIGKILL
                assert killed[1 - rank][0] in (0, 71), killed
                if title == "new":
                    whole(path)
                before = standing(path)
                found = start(path)
                finished(found)
                good = [checkpoint_place(n)[0] for n in before if keeps(path, n)]
                assert found[0][1]["began"] == max(good, default=0), (before, found)
                tidy(path)
                shutil.rmtree(path)
                counts["kills"] += 1
            counts[f"operations_{title}_rank{rank}"] = len(answer["log"])
    return counts


def keeps(path: Path, name: str) -> bool:
    """Whether a checkpoint was not put aside as damaged."""
    return not (path / "checkpoints" / f"damaged-{name}").exists()


def kill_at_random(root: Path, times: int, seed: int) -> dict[str, int]:
    """SIGKILL of one rank or both at a random time, up to three times in a row, then a quiet
    end."""
    counts: Counter[str] = Counter()
    generator = random.Random(seed)
    number = 0
    path = root / "timed"
    path.mkdir()
    began = time.monotonic()
    finished(start(path))
    usual = time.monotonic() - began
    while counts["kills"] < times:
        number += 1
        path = root / f"random-{number}"
        path.mkdir()
        for _ in range(generator.randint(1, 3)):
            victims = generator.choice(([0], [1], [0, 1], [1, 0]))
            delay = generator.uniform(0, usual)

            def strike(children, victims=victims, delay=delay):
                time.sleep(delay)
                for rank in victims:
                    os.kill(children[rank], signal.SIGKILL)

            found = start(path, after=strike)
            counts["kills"] += any(code == -signal.SIGKILL for code, _ in found)
            whole(path)
        found = start(path)
        finished(found)
        tidy(path)
        shutil.rmtree(path)
        counts["sessions"] += 1
    return counts


ERRORS = {
    "ENOSPC": errno.ENOSPC,
    "EDQUOT": errno.EDQUOT,
    "EIO": errno.EIO,
    "EACCES": errno.EACCES,
    "short write": None,
}


def fail_everywhere(root: Path, part: str) -> dict[str, int]:
    """The Nth operation fails, N = 1, 2, ... until none is left, on each rank; for each kind of
    error, once, and, as a full disk stays full, from then on. A pass over all operations takes the
    kinds in turn, so that every operation meets one and every name of an operation all of its."""
    counts: Counter[str] = Counter()
    for title, prepare in scenarios(root).items():
        path = root / f"{title}-undisturbed"
        prepare(path)
        logs = [answer["log"] for _, answer in start(path)]
        turns: Counter[str] = Counter()
        for rank in range(RANKS):
            for number, name in enumerate(logs[rank], 1):
                ways = ways_to_fail(title, name)
                if not ways:
                    continue
                now = ways[turns[name] % len(ways)]
                turns[name] += 1
                for kind, lasting in ways:
                    if ((kind, lasting) == now) is (part == "rest"):
                        continue
                    code = ERRORS[kind]

                    def fail(n, name, operation, number=number, code=code, lasting=lasting):
                        due = n == number or (lasting and n > number)
                        if not due or (lasting and name not in (*WRITING, *REMOVING)):
                            return operation()
                        if code is None:
                            return short(operation)
                        if name == "close":
                            operation()
                        raise OSError(code, os.strerror(code))

                    path = root / f"{title}-{rank}-{number}"
                    prepare(path)
                    found = start(path, {rank: fail})
                    check_failed(path, found, kind, title, lasting=lasting)
                    finished(start(path))
                    shutil.rmtree(path)
                    counts[kind] += 1
                    counts[title] += 1
                    counts["lasting"] += lasting
            counts[f"operations_{title}_rank{rank}"] = sum(
                bool(ways_to_fail(title, name)) for name in logs[rank]
            )
    return counts


# Which operations fail in which way: EIO all of them, of a resume too; the others where they occur.
FAILS = {
    "ENOSPC": (*WRITING, *REMOVING),
    "EDQUOT": ("make_folder", "create", "write", "sync", "close"),
    "EIO": (*WRITING, *REMOVING, *READING),
    "EACCES": ("make_folder", "create", "open", "rename", *REMOVING),
    "short write": ("write",),
}


def ways_to_fail(title: str, name: str) -> list[tuple[str, bool]]:
    """How an operation of a scenario is to fail: the kind of error, and whether it lasts."""
    kinds = [kind for kind in ERRORS if name in FAILS[kind] and (title == "new" or kind == "EIO")]
    return [
        (kind, lasting) for kind in kinds for lasting in (False, True)[: 1 + (kind == "ENOSPC")]
    ]


def short(operation: Callable) -> int:
    """Write half of what was asked, as a full pipe or disk may."""
    frame = operation.__closure__
    arguments = next(c.cell_contents for c in frame if isinstance(c.cell_contents, tuple))
    file, data = arguments
    return operation(file, data[: max(1, len(data) // 2)])


def check_failed(path: Path, found, kind: str, title: str, *, lasting: bool) -> None:
    """Whatever failed: no rank hangs or dies, both end alike, what stands is whole, nothing whole
    is put aside, and a sentence says what happened and what is needed."""
    codes = [code for code, _ in found]
    assert codes in ([0, 0], [StorageError.exit_code] * 2), found
    saving = [text for _, answer in found for text in answer.get("failures", [])]
    ending = [answer["error"] for _, answer in found if "error" in answer]
    if kind == "short write":
        assert not saving + ending, found  # the rest was written after it
    else:
        assert saving or ending, (found, "nobody said anything")
    for text in saving + ending:
        assert os.strerror(ERRORS[kind]) in text, text
    for text in saving:
        # What a rank could not begin to write has no size yet.
        nothing_written = text.endswith(os.strerror(ERRORS[kind]))
        assert text.startswith("rotation") or "a checkpoint needs" in text or nothing_written, text
    damaged = checkpoint_name(6, 1, scored=False) if title == "resume" else ""
    whole(path, but=damaged)
    aside = [name for name in Files().names(path / "checkpoints") if name.startswith("damaged-")]
    assert set(aside) <= {f"damaged-{damaged}"}, aside
    if not lasting and kind != "short write" and codes[0] == 0:
        assert standing(path), "one failure cost every checkpoint"


def damage_everywhere(root: Path, part: str) -> dict[str, int]:
    """Damage the newest checkpoint in every way; nothing damaged is ever loaded."""
    once = part == "once"
    counts: Counter[str] = Counter()
    made = root / "made"
    made.mkdir()
    finished(start(made))
    generator = random.Random(5)
    newest_name = standing(made)[-1]
    files = sorted(p for p in (made / "checkpoints" / newest_name).rglob("*") if p.is_file())
    places = [(f.relative_to(made), n) for f in files for n in range(f.stat().st_size)]
    cases: list[tuple[str, Callable[[Path], None]]] = []
    flips, truncations = generator.sample(places, 200), generator.sample(places, 50)
    for file, place in flips[:50] if once else flips[50:]:
        bit = 1 << generator.randrange(8)
        cases.append(("flips", lambda p, f=file, n=place, b=bit: flip(p / f, n, b)))
    for file, place in truncations[:12] if once else truncations[12:]:
        cases.append(("truncations", lambda p, f=file, n=place: os.truncate(p / f, n)))
    folder = Path("checkpoints", newest_name)
    if once:
        other = standing(made)[0]
        for file in [file.relative_to(made) for file in files]:
            cases.append(("deleted", lambda p, f=file: (p / f).unlink()))
            cases.append(("emptied", lambda p, f=file: os.truncate(p / f, 0)))
            cases.append(("linked", lambda p, f=file: link(p / f)))
            swapped = Path(*file.parts[:1], other, *file.parts[2:])
            cases.append(("swapped", lambda p, f=file, s=swapped: shutil.copy(p / s, p / f)))
        cases.append(("deleted", lambda p: shutil.rmtree(p / folder / "model")))
        cases.append(("swapped", lambda p: swap(p / folder / "rank-0", p / folder / "rank-1")))
    for kind, damage in cases:
        path = root / "case"
        shutil.copytree(made, path, symlinks=True)
        damage(path)
        found = start(path)
        finished(found, began=STEPS - EVERY)  # the one before
        assert found[0][1]["warnings"], kind
        assert not keeps(path, newest_name)
        assert "damaged-" in found[0][1]["warnings"][0]
        shutil.rmtree(path)
        counts[kind] += 1
    if not once:
        return counts
    # What is not of the checkpoint is not looked at.
    path = root / "case"
    shutil.copytree(made, path, symlinks=True)
    (path / folder / "zero_to_fp32.py").write_text("raise SystemExit('ran')")
    finished(start(path), began=STEPS)
    shutil.rmtree(path)
    counts["foreign"] += 1
    # All of them damaged: refused, never begun anew in silence.
    shutil.copytree(made, path, symlinks=True)
    for name in standing(path):
        flip(path / "checkpoints" / name / "rank-1", 0, 1)
    found = start(path)
    assert [code for code, _ in found] == [DataError.exit_code] * 2, found
    assert "none of its 3 checkpoints is whole" in found[0][1]["error"]
    # ... nor by the same command again, which finds them put aside; nor if they are gone.
    for again in range(2):
        found = start(path)
        assert [code for code, _ in found] == [DataError.exit_code] * 2, found
        assert "none of its 3 checkpoints is whole" in found[0][1]["error"]
        if not again:
            assert len(os.listdir(path / "checkpoints")) == 3
            shutil.rmtree(path / "checkpoints")
    counts["refused"] += 3
    return counts


def thaw_zombies(root: Path) -> dict[str, int]:
    """A start freezes (SIGSTOP of both ranks) in the midst of saving, is succeeded, and thaws when
    its heir has just begun, when it has sealed what counts, or after it has finished: nothing of
    what it does then is ever loaded, and once the heir has cleaned up, nothing is committed."""
    counts: Counter[str] = Counter()
    path = root / "undisturbed"
    path.mkdir()
    log = start(path)[0][1]["log"]
    renames = [n for n, name in enumerate(log, 1) if name == "rename"]
    # Right before a rename (after the fence was asked), and at operations all over the session.
    moments = [*renames[:5], *range(20, len(log), len(log) // 6)][:12]
    trials = [(number, when) for number in moments for when in ("begun", "finished")]
    # The one moment at which a commit comes too late for sure: its heir has yet to clean up.
    for number, when in [*trials, (renames[1], "sealed")]:
        path = root / f"zombie-{number}-{when}"
        path.mkdir()
        found, heir, earlier = succeed_frozen(path, number, when)
        finished(heir)
        # The zombie has noticed, or had nothing left to write.
        assert found[0][0] in (0, 71, 73), found
        assert len(attempt_numbers(RunDir(path))) == 2
        finished(start(path), began=STEPS)
        late = [n for n in standing(path) if checkpoint_place(n)[2] == 1 and n not in earlier]
        assert when != "finished" or not late, late
        assert when != "sealed" or late == [checkpoint_name(BEST, 1, scored=False)]
        shutil.rmtree(path)
        counts["noticed"] += found[0][0] == 73
        counts["late commits that nobody loads"] += len(late) > 0
        counts["zombies"] += when != "sealed"
    return counts


def succeed_frozen(path: Path, number: int, when: str) -> tuple[list, list, list[str]]:
    """Freeze a start before an operation of rank 0, begin another, and thaw the first when the
    other has "begun", "sealed" what counts, or "finished"; returns what each of the two returned,
    and the checkpoints that stood before the other began."""
    heirs: list = []
    earlier: list[str] = []
    paused: list[bool] = []

    def freeze(n, _, operation):
        if n == number:
            os.kill(os.getpid(), signal.SIGSTOP)
        return operation()

    def pause(_n, _name, operation):
        if not paused and (path / "attempts" / "0002.sealed").exists():
            paused.append(True)
            os.kill(os.getpid(), signal.SIGSTOP)
        return operation()

    def succeed(children):
        os.waitpid(children[0], os.WUNTRACED)
        os.kill(children[1], signal.SIGSTOP)
        earlier.extend(standing(path))
        # As on another machine: on this one, who lives is not succeeded.
        entry = path / "attempts" / "0001.json"
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"machine": "another"}))
        for kind in ("alive", "json"):
            os.utime(path / "attempts" / f"0001.{kind}", (1, 1))

        def thaw(heir):
            if when == "sealed":
                os.waitpid(heir[0], os.WUNTRACED)
            for child in children:
                os.kill(child, signal.SIGCONT)
            if when == "sealed":
                for child in children:
                    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
                os.kill(heir[0], signal.SIGCONT)

        heirs.append(
            start(
                path,
                {0: pause} if when == "sealed" else None,
                after=thaw if when != "finished" else None,
            )
        )
        if when == "finished":
            thaw(None)

    found = start(path, {0: freeze}, after=succeed)
    return found, heirs[0], earlier


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(bytes(data))


def link(path: Path) -> None:
    moved = path.with_name("moved-" + path.name)
    path.rename(moved)
    path.symlink_to(moved)


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


class Alone:
    """A rank whose only peer is itself."""

    index = 0

    def all_gather(self, value):
        return [value] * RANKS


def main() -> None:
    verb, *rest = sys.argv[1:]
    memory = Path("/dev/shm")  # where nothing is slow, unless the disk is to be tried too
    place = memory if memory.is_dir() and verb != "random" else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        root = Path(folder)
        # Once here, so that what a session loads and compiles is there in all that are forked.
        (root / "first").mkdir()
        session(root / "first", Alone(), Watched())
        if verb == "kill":
            counts = kill_everywhere(root, *rest)
        elif verb == "random":
            counts = kill_at_random(root, int(rest[0]), int(rest[1]))
        elif verb == "fail":
            counts = fail_everywhere(root, *rest)
        elif verb == "zombies":
            counts = thaw_zombies(root)
        else:
            counts = damage_everywhere(root, *rest)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
