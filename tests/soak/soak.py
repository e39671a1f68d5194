"""Kills, stops, damages and mutates for as long as it takes, and writes a table of what held.

    python tests/soak/soak.py [--part PART ...] [--minutes N] [--folder DIR] [--seed N]

Parts: kills (60 end-to-end kills at random times over ZeRO 1, 2, 3), grid (120 cells of stops and
resumes), chains (10 resumes in a row at each stage), store (2,000 kills of the store alone), jobs
(10,000 mutated job files). What is done is kept in DIR/done.jsonl: started again, it goes on. At
the end it writes DIR/RESULTS.md; anything that did not hold ends it with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(CHECKOUT), str(CHECKOUT / "kernels")]

from runner.errors import JobError  # noqa: E402
from runner.job.load import load_job  # noqa: E402
from runner.run.provenance import git_state, processor_name, versions  # noqa: E402
from tests import conftest  # noqa: E402
from tests.interruptions import (  # noqa: E402
    CONTEXT,
    DATA,
    JOB,
    STOP,
    TORCH_DROPOUT,
    outcome,
    place,
    sets,
    steps_of,
)
from tests.workers.zygote import Zygote  # noqa: E402

PARTS = ("store", "jobs", "chains", "grid", "kills")
WHERE = ("mid-epoch", "epoch edge", "warm-up", "last step", "scoring")
GRID = [
    (stage, precision, several, ranks, where)
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16")
    for several in (1, 2)
    for ranks in (1, 2)
    for where in WHERE
]
VICTIMS = (0, 1, "launcher", "all")
KILLS = 60
CHAIN = 10
TRIES = 12  # starts that may end before a kill reaches them
STORE = (20, 100)  # rounds, kills in each
MUTATIONS = (20, 500)  # rounds, files in each
PROBLEM = r"(:[1-9]\d*)?: \S.*"  # of a job file, after its name (tests/job/test_load.py)


class Soak:
    """What is done so far, and what is needed to do more."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.seed = folder, seed
        self._log = folder / "done.jsonl"
        self.commit = commit_now()
        self.done = read_done(self._log)
        if others := {entry["commit"] for entry in self.done.values()} - {self.commit}:
            print(
                f"{self._log} holds trials of {', '.join(sorted(others))}, this is {self.commit};"
                " another --folder begins anew",
                file=sys.stderr,
            )
        self._zygote: Zygote | None = None
        self._references: dict[tuple, dict] = {}

    @property
    def zygote(self) -> Zygote:
        if self._zygote is None:
            (self.folder / "logs").mkdir(exist_ok=True)
            self._zygote = Zygote(self.folder / "logs")
        return self._zygote

    def note(self, key: str, part: str, *, held: bool, count: int, seconds: float, what: str = ""):
        entry = {"key": key, "part": part, "held": held, "count": count, "seconds": seconds}
        self.done[key] = entry | {"what": what, "commit": self.commit}
        with self._log.open("a") as file:
            file.write(json.dumps(self.done[key]) + "\n")
        sign = "ok  " if held else "LOST"
        print(f"{sign} {key} ({seconds:.1f} s) {what}", flush=True)

    def job(self) -> Path:
        """The job of all runs, on a tiny random model."""
        model, path = self.folder / "model", self.folder / "job.toml"
        if not path.exists():
            conftest._save_tiny("bert", model)
            path.write_text(JOB.format(data=DATA, model=model, context=CONTEXT, extra=""))
        return path

    def reference(self, options: tuple[str, ...], ranks: int, code: str = "") -> dict:
        """What an undisturbed run with these options comes to."""
        key = (options, ranks, code)
        if key not in self._references:
            folder = self.folder / "reference"
            shutil.rmtree(folder, ignore_errors=True)
            codes, text = self.zygote.run(
                self.job(), "--run-dir", folder, *sets(*options), ranks=ranks, code=code
            )
            assert codes == [0] * ranks, text
            self._references[key] = outcome(folder)
        return self._references[key]

    def fresh(self) -> Path:
        folder = self.folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        return folder


def commit_now() -> str:
    """The checkout's commit, and whether it was changed since."""
    state = git_state()
    changed = " with changes" if state["diff_sha256"] else ""
    return f"{(state['commit'] or 'no commit')[:12]}{changed}"


def read_done(log: Path) -> dict[str, dict]:
    """What was done by earlier starts. A last line that was cut short is no trial: it is taken off,
    so that the next one does not end up behind it."""
    if not log.exists():
        return {}
    done, whole = {}, b""
    for line in log.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
            done[entry["key"]] = {"commit": "an unknown commit"} | entry
            whole += line.rstrip(b"\n") + b"\n"
        except (ValueError, TypeError, KeyError):
            print(f"{log}: a line is no trial and is left out: {line[:80]!r}", file=sys.stderr)
    if log.read_bytes() != whole:
        aside = log.with_suffix(".new")
        aside.write_bytes(whole)
        aside.replace(log)
    return done


# ---- the parts: each yields after every piece of work


def grid(soak: Soak) -> Iterator[None]:
    for stage, precision, several, ranks, where in GRID:
        key = f"grid ZeRO-{stage} {precision} x{several} ranks={ranks} {where}"
        if key in soak.done:
            continue
        began = time.monotonic()
        options = (
            f"zero.stage={stage}",
            f"model.precision={precision}",
            f"train.micro_batch_size={8 // ranks // several}",
        )
        expected = soak.reference(options, ranks)
        folder, what = soak.fresh(), ""
        code = place(where, int(expected["step"]))
        arguments = (soak.job(), "--run-dir", folder, *sets(*options))
        codes, text = soak.zygote.run(*arguments, ranks=ranks, code=code)
        if codes != [75] * ranks:
            what = f"stopped with {codes}"
        codes, text = soak.zygote.run(*arguments, ranks=ranks)
        if codes != [0] * ranks or "goes on after step" not in text:
            what = what or f"resumed with {codes}"
        same = not what and outcome(folder) == expected
        note = what or ("" if same else "other bits")
        soak.note(key, "grid", held=same, count=1, seconds=time.monotonic() - began, what=note)
        yield


def chains(soak: Soak) -> Iterator[None]:
    for stage in (1, 2, 3):
        key = f"chain ZeRO-{stage}"
        if key in soak.done:
            continue
        began = time.monotonic()
        options = (f"zero.stage={stage}",)
        expected = soak.reference(options, 2, TORCH_DROPOUT)
        last = int(expected["step"])
        folder, what = soak.fresh(), ""
        arguments = (soak.job(), "--run-dir", folder, *sets(*options))
        for link in range(CHAIN):
            step = 1 + (last - 2) * link // CHAIN
            code = TORCH_DROPOUT + STOP.format(step=step, rank=link % 2)
            codes, _ = soak.zygote.run(*arguments, ranks=2, code=code)
            if codes != [75, 75]:
                what = what or f"link {link} ended with {codes}"
        codes, _ = soak.zygote.run(*arguments, ranks=2, code=TORCH_DROPOUT)
        what = what or ("" if codes == [0, 0] else f"ended with {codes}")
        same = not what and outcome(folder) == expected
        note = what or ("" if same else "other bits")
        soak.note(
            key, "chains", held=same, count=CHAIN, seconds=time.monotonic() - began, what=note
        )
        yield


def kills(soak: Soak) -> Iterator[None]:
    """Three kills in a row at random times, then a quiet end: each leaves the run where its last
    commit was, and the end is the undisturbed one's. A kill that comes after the result strikes
    nothing: that run is thrown away with its kills, and another one is begun."""
    often = ("train.checkpoint_minutes=0.002", "train.epochs=3")
    for number in range(KILLS // 3):
        stage = 1 + number % 3
        key = f"kills {number} ZeRO-{stage}"
        if key in soak.done:
            continue
        began = time.monotonic()
        draw = random.Random(f"{soak.seed} {number}")
        options = (f"zero.stage={stage}", *often)
        expected = soak.reference(options, 2)
        rows = int(expected["step"]) // 3
        folder, what, struck = soak.fresh(), "", 0
        arguments = (soak.job(), "--run-dir", folder, *sets(*options))
        for _ in range(TRIES):
            if struck == 3:
                break
            kill, victim = struck, VICTIMS[(number + struck) % len(VICTIMS)]
            started = soak.zygote.start(*arguments, ranks=2)
            # By a place in training, or by the time since the start: both reach all phases.
            target = draw.randint(0, rows * (kill + 1) // 4)
            deadline = time.monotonic() + draw.uniform(0.2, 20)
            while steps_of(folder) < target and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.1))
            started.kill(victim)
            codes = started.wait(90)  # longer than a launcher's grace
            if victim != "all" and not set(codes) <= {-9, 71, 75, 0}:
                what = what or f"kill of {victim}: {codes}"
            if "Traceback" in started.text():
                what = what or f"kill of {victim}: a traceback"
            struck += 1
            if (folder / "result.json").exists():
                folder, struck = soak.fresh(), 0
        what = what or ("" if struck == 3 else f"only {struck} of 3 kills in {TRIES} starts")
        codes, text = soak.zygote.run(*arguments, ranks=2)
        what = what or ("" if codes in ([0, 0],) else f"ended with {codes}: {text[-300:]}")
        same = not what and outcome(folder) == expected
        note = what or ("" if same else "other bits")
        seconds = time.monotonic() - began
        soak.note(key, "kills", held=same, count=struck, seconds=seconds, what=note)
        yield


def store(soak: Soak) -> Iterator[None]:
    sessions = CHECKOUT / "tests" / "workers" / "store_sessions.py"
    for number in range(STORE[0]):
        key = f"store {number}"
        if key in soak.done:
            continue
        began = time.monotonic()
        command = [sys.executable, str(sessions), "random", str(STORE[1]), str(soak.seed + number)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        count = json.loads(done.stdout)["kills"] if done.returncode == 0 else 0
        what = done.stderr.strip()[-300:]
        held = done.returncode == 0
        seconds = time.monotonic() - began
        soak.note(key, "store", held=held, count=count, seconds=seconds, what=what)
        yield


def jobs(soak: Soak) -> Iterator[None]:
    """A job file with one to four edits is read, or refused in lines of the promised form."""
    originals = [path.read_bytes() for path in sorted((CHECKOUT / "jobs").glob("*.toml"))]
    path = soak.folder / "mutated.toml"
    data = soak.folder / "data"
    if not data.exists():  # or every job would be refused for the files that it names
        data.symlink_to(CHECKOUT / "jobs" / "data")
    for number in range(MUTATIONS[0]):
        key = f"jobs {number}"
        if key in soak.done:
            continue
        began = time.monotonic()
        draw = random.Random(f"{soak.seed} jobs {number}")
        what = ""
        for _ in range(MUTATIONS[1]):
            content = bytearray(draw.choice(originals))
            for _ in range(draw.randint(1, 4)):
                mutate(content, draw)
            path.write_bytes(bytes(content))
            try:
                load_job(path)
            except JobError as error:
                if not error.problems or not all(is_promised(p, path) for p in error.problems):
                    what = what or f"not in the promised form: {error.problems!r}"
            except Exception as error:
                what = what or f"{type(error).__name__}: {error} for {bytes(content)!r}"
        seconds = time.monotonic() - began
        soak.note(key, "jobs", held=not what, count=MUTATIONS[1], seconds=seconds, what=what)
        yield


def is_promised(line: str, path: Path) -> bool:
    """Whether a problem is one printable line that begins with the file and the line in it."""
    return line.isprintable() and bool(re.fullmatch(re.escape(str(path)) + PROBLEM, line))


def mutate(content: bytearray, draw: random.Random) -> None:
    place = draw.randrange(len(content) + 1)
    kind = draw.randrange(4)
    if kind == 0:
        content[place:place] = bytes([draw.randrange(256)])
    elif kind == 1:
        del content[place : place + draw.randint(1, 20)]
    elif kind == 2:
        other = draw.randrange(len(content) + 1)
        content[place:place] = content[other : other + draw.randint(1, 40)]
    else:
        content[place : place + 1] = draw.choice((b"[", b"]", b'"', b"=", b"\n", b"-", b"1e999"))


# ---- the table


TITLES = {
    "kills": "SIGKILL of rank 0, rank 1, the launcher or all at random times, over ZeRO 1, 2, 3;"
    " then the end of the undisturbed run",
    "grid": "stops and resumes over ZeRO 1, 2, 3 x fp32, bf16 x 1, 2 micro-batches x 1, 2 ranks x"
    f" {', '.join(WHERE)}",
    "chains": f"resumes in chains of {CHAIN}, dropout from torch's generators",
    "store": "SIGKILL of one or both ranks of the store alone, at random times",
    "jobs": "mutated job files: read, or refused in lines",
}


def results(soak: Soak) -> str:
    """The summary as Markdown."""
    rows = defaultdict(lambda: [0, 0, 0.0])
    for entry in soak.done.values():
        row = rows[entry["part"]]
        row[0] += entry["count"]
        row[1] += entry["count"] if entry["held"] else 0
        row[2] += entry["seconds"]
    found = versions()
    made_by = defaultdict(int)
    for entry in soak.done.values():
        made_by[entry["commit"]] += 1
    made_by = made_by or {soak.commit: 0}
    commits = f"commit {next(iter(made_by))}"
    if len(made_by) > 1:
        parts = (f"{commit} ({count} entries)" for commit, count in made_by.items())
        commits = f"MIXED commits: {', '.join(parts)}"
    lines = [
        "# What held",
        "",
        f"`make soak`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores of {processor_name()},"
        f" {platform.system()} {platform.release()}, torch {found['torch']}, deepspeed"
        f" {found['deepspeed']}, {commits}.",
        "Equal means: sha256 of weights and of predictions, scores, and every cell of the tables"
        " that does not tell of time.",
        "",
        "| part | what | held | of | minutes |",
        "|---|---|---:|---:|---:|",
    ]
    for part in PARTS[::-1]:
        if part in rows:
            count, held, seconds = rows[part]
            lines.append(f"| {part} | {TITLES[part]} | {held} | {count} | {seconds / 60:.1f} |")
    lost = [entry for entry in soak.done.values() if not entry["held"]]
    lines += [""] + [f"- LOST: {entry['key']}: {entry['what']}" for entry in lost]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--folder", type=Path, default=CHECKOUT / ".soak")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    soak = Soak(arguments.folder.absolute(), arguments.seed)
    deadline = time.monotonic() + 60 * arguments.minutes
    work = {"kills": kills, "grid": grid, "chains": chains, "store": store, "jobs": jobs}
    for part in arguments.part or PARTS:
        for _ in work[part](soak):
            if time.monotonic() > deadline:
                break
    table = results(soak)
    (soak.folder / "RESULTS.md").write_text(table)
    print(table)
    return 0 if all(entry["held"] for entry in soak.done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
