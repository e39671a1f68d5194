"""The comparison driver, run as its users run it, on commands that take no time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="reads Linux's /proc")

DRIVER = Path(__file__).with_name("compare_training.py")

# Writes a result and appends to a log which side ran with which seed.
PROGRAM = """
import json, pathlib, sys
side, seed, out, journal = sys.argv[1:5]
with open(journal, "a") as lines:
    lines.write(f"{side} {seed}\\n")
scores = {"exact_match": 30.0 + int(seed), "f1": 40.0 + int(seed)}
folder = pathlib.Path(out, "stamp")
folder.mkdir(parents=True)
result = {"seconds": {"training": 1.5}}
if side == "peer":
    result |= scores | {"versions": {"thing": "1.2"}}
else:  # a spantune run keeps its versions in a file of their own
    result["metrics"] = scores
    folder.joinpath("provenance.json").write_text(json.dumps({"versions": {"thing": "3.4"}}))
folder.joinpath("result.json").write_text(json.dumps(result))
"""


class Comparison:
    """The driver on two stand-in programs, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = folder / "journal"
        self.table = folder / "table.md"
        self.program = folder / "program.py"
        self.program.write_text(PROGRAM)

    def run(self, *arguments: str, ours: str | None = None) -> subprocess.CompletedProcess[str]:
        tail = f"{{seed}} {{out}} {self.journal}"
        sides = ["--ours", ours or f"$PYTHON $PROGRAM ours {tail}"]
        sides += ["--ours-result", "{out}/*/result.json"]
        sides += ["--peer", f"$PYTHON $PROGRAM peer {tail}"]
        sides += ["--peer-result", "{out}/stamp/result.json"]
        paths = ["--table", str(self.table), "--work", str(self.folder / "work")]
        return subprocess.run(
            [sys.executable, str(DRIVER), *sides, *paths, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PROGRAM": str(self.program), "PYTHON": sys.executable},
            cwd=self.folder,
            timeout=60,
        )


@pytest.fixture
def compare(tmp_path: Path) -> Comparison:
    return Comparison(tmp_path)


def test_order_alternates_and_extra_seeds_follow(compare):
    done = compare.run("--pairs", "2", "--first-seed", "5", "--extra-ours-seeds", "8", "9")
    assert done.returncode == 0, done.stderr
    order = compare.journal.read_text().splitlines()
    assert order == ["peer 5", "ours 5", "ours 6", "peer 6", "ours 8", "ours 9"]


def test_table_holds_scores_medians_and_the_command_without_machine_paths(compare):
    assert compare.run("--pairs", "1", "--extra-ours-seeds", "2", "6").returncode == 0
    table = compare.table.read_text()
    assert "| 31.00 / 41.00 | 31.00 / 41.00 |" in table
    assert "32.00 (31.00 to 36.00) / 42.00 (41.00 to 46.00)" in table
    assert "training 1.5" in table
    assert "- Versions, peer: thing 1.2" in table
    assert "- Versions, ours: thing 3.4" in table
    assert "$PYTHON $PROGRAM ours {seed} {out}" in table
    assert sys.executable not in table


def test_ours_alone_needs_no_peer(compare):
    assert compare.run("--only-ours", "--pairs", "2").returncode == 0
    assert compare.journal.read_text().splitlines() == ["ours 1", "ours 2"]


def test_exit_zero_without_a_result_is_a_failure_and_keeps_the_finished_runs(compare):
    done = compare.run("--pairs", "1", ours="echo all is well")
    assert done.returncode == 1
    assert "0 files match" in done.stderr
    assert "all is well" in done.stderr  # the failed run's log
    assert "Unfinished: 1 of 2 runs" in compare.table.read_text()


def test_unset_variable_is_named(compare):
    done = compare.run("--only-ours", ours="$NO_SUCH_VARIABLE {out}")
    assert done.returncode == 1
    assert "NO_SUCH_VARIABLE is not set" in done.stderr


# The driver, whose samples are counted in a file, one character as each begins.
COUNTED = """
import sys
driver, samples, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, driver)
import compare_training
found = compare_training.find_descendants
def counted(root):
    with open(samples, "a") as file:
        file.write("x")
    return found(root)
compare_training.find_descendants = counted
compare_training.SAMPLE_SECONDS = 0.05
sys.exit(compare_training.main())
"""
# The first seed's run holds 200 MiB in each of two processes, the second's next to nothing, until
# a whole sample has seen both of them.
HUNGRY = """
import json, multiprocessing, os, pathlib, sys, time
seed, out, samples = sys.argv[1:]
def hold(other_holds, holding):
    block = bytearray(b"x") * ((200 if seed == "1" else 1) << 20)
    holding.set()
    other_holds.wait()
    begun = os.path.getsize(samples)
    while os.path.getsize(samples) < begun + 2:
        time.sleep(0.02)
if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    mine, its = spawn.Event(), spawn.Event()
    child = spawn.Process(target=hold, args=(mine, its))
    child.start()
    hold(its, mine)
    child.join()
    pathlib.Path(out).write_text(json.dumps({"exact_match": 1, "f1": 1}))
"""


def test_peak_memory_belongs_to_its_own_run_and_counts_children(tmp_path):
    program, samples = tmp_path / "hungry.py", tmp_path / "samples"
    program.write_text(HUNGRY)
    command = [sys.executable, "-c", COUNTED, str(DRIVER.parent), str(samples)]
    command += ["--only-ours", "--pairs", "2", "--ours-result", "{out}"]
    command += ["--ours", f"{sys.executable} {program} {{seed}} {{out}} {samples}"]
    command += ["--table", str(tmp_path / "table.md"), "--work", str(tmp_path / "work")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    rows = [
        [cell.strip() for cell in line.split("|")]
        for line in (tmp_path / "table.md").read_text().splitlines()
        if line.startswith("| pair") and "| ours |" in line
    ]
    (largest_1, all_1), (largest_2, all_2) = [(float(r[6]), float(r[7])) for r in rows]
    assert 200 < largest_1 < 300
    assert 400 < all_1 < 500
    assert largest_2 < 100
    assert all_2 < 100


def test_stopping_the_driver_stops_what_the_run_started(tmp_path):
    program = tmp_path / "forever.py"
    program.write_text(
        "import json, os, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],\n"
        "                         start_new_session=True)\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "path.with_suffix('.new').write_text(json.dumps([os.getpid(), child.pid]))\n"
        "path.with_suffix('.new').rename(path)\n"
        "time.sleep(600)\n"
    )
    pids = tmp_path / "pids"
    command = [sys.executable, str(DRIVER), "--only-ours", "--table", str(tmp_path / "table.md")]
    command += ["--ours", f"{sys.executable} {program} {pids}", "--work", str(tmp_path / "work")]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not pids.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        started = json.loads(pids.read_text())
    finally:
        driver.terminate()
        assert driver.wait(timeout=30) == 143
    for process in started:
        status = Path(f"/proc/{process}/stat")
        # The orphan may still wait to be reaped by whatever adopted it.
        assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX"
