"""Runs that are killed or stopped go on to the very bits of a run that was never disturbed."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.rundir import RunDir
from runner.sameness import is_time
from runner.tables import read_rows

DATA = Path(__file__).resolve().parents[1] / "jobs" / "data"
CONTEXT = "The lantern folds flat; its battery lasts nine hours on the bright setting."
JOB = """
name = "tiny"
[data]
train = "{data}/product_qa_train.json[:16]"
validation = "{data}/product_qa_validation.json[:8]"
max_length = 96
stride = 24
[model]
name = "{model}"
freeze = ["embeddings"]
precision = "fp32"
[train]
epochs = 2
batch_size = 8
learning_rate = 1e-2
warmup = 0.3
weight_decay = 0.01
log_every = 3
[score]
batch_size = 8
[[probe]]
question = "How long does the battery last?"
context = "{context}"
answer = "nine hours"
{extra}
"""
# Stops a rank, as SIGUSR2 does, when it has done so many steps; the ranks agree one step later.
STOP = """
import runner.epoch, runner.signals
step_taken = runner.epoch.take_step
def take_step(engine, step):
    step_taken(engine, step)
    if step == {step} and {rank} in (rank, -1):
        runner.signals.ask("SIGUSR2")
runner.epoch.take_step = take_step
"""
# Stops every rank in its evaluation after epoch 1.
STOP_SCORING = """
import runner.train, runner.signals
read = runner.train.read_windows
def read_windows(*arguments, **options):
    if options.get("step"):
        runner.signals.ask("SIGTERM")
    return read(*arguments, **options)
runner.train.read_windows = read_windows
"""
# Stops every rank right after its first evaluation was committed.
STOP_SCORED = """
import runner.checkpoint, runner.signals
save = runner.checkpoint.Checkpoints.save
def save_and_stop(self, memory, best=None, *, required=False):
    save(self, memory, best, required=required)
    if memory.progress.scored:
        runner.signals.ask("SIGUSR1")
runner.checkpoint.Checkpoints.save = save_and_stop
"""


@pytest.fixture
def job_file(tmp_path: Path, tiny: Callable[[str], Path]) -> Callable[..., Path]:
    """Write a job on a tiny model; returns its path."""

    def write(extra: str = "", name: str = "job.toml") -> Path:
        path = tmp_path / name
        path.write_text(JOB.format(data=DATA, model=tiny("bert"), context=CONTEXT, extra=extra))
        return path

    return write


def outcome(folder: Path) -> dict[str, object]:
    """All that two runs must share: the hashes of weights and answers, scores, and every cell of
    the tables that does not tell of time."""
    run = RunDir(folder)
    result = json.loads(run.result.read_text())
    tables = {
        path.name: [{k: v for k, v in row.items() if not is_time(k)} for row in read_rows(path)]
        for path in run.tables
    }
    return {
        "weights": hashlib.sha256((run.model / "model.safetensors").read_bytes()).hexdigest(),
        "predictions": hashlib.sha256(run.predictions.read_bytes()).hexdigest(),
        "metrics": result["metrics"],
        "epoch": result["epoch"],
        "step": result["step"],
        **tables,
    }


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def steps_of(folder: Path) -> int:
    """Rows of train.csv that are there already."""
    try:
        return len((folder / "train.csv").read_text().splitlines()) - 1
    except FileNotFoundError:
        return 0


# Where a run is stopped, and by what; of 2 epochs with some 18 steps each, 10 of them warm-up.
PLACES = {
    "mid-epoch": STOP.format(step=13, rank=0),
    "epoch edge": STOP.format(step=-1, rank=-1),  # the last step of an epoch; see `place`
    "warm-up": STOP.format(step=2, rank=-1),
    "last step": STOP.format(step=-2, rank=-1),
    "scoring": STOP_SCORING,
    "scored": STOP_SCORED,
}
CELLS = [
    # ZeRO stage, precision, micro-batches, ranks, place
    (0, "fp32", 1, 1, "mid-epoch"),
    (1, "bf16", 2, 2, "scoring"),
    (1, "fp32", 1, 2, "warm-up"),
    (2, "bf16", 1, 2, "epoch edge"),
    (2, "fp32", 2, 1, "last step"),
    (3, "bf16", 1, 1, "scored"),
    (3, "fp32", 2, 2, "mid-epoch"),
]


def place(name: str, steps: int) -> str:
    """Code that stops a run of `steps` steps in 2 epochs at a place."""
    code = PLACES[name]
    return code.replace("== -1", f"== {steps // 2 - 1}").replace("== -2", f"== {steps - 1}")


@pytest.mark.parametrize(("stage", "precision", "several", "ranks", "where"), CELLS)
def test_a_stopped_run_goes_on_to_the_same_bits(
    zygote, job_file, tmp_path, stage, precision, several, ranks, where
):
    """Cells of the resume grid; `make soak` runs all 120."""
    micro = 8 // ranks // several
    options = sets(
        f"zero.stage={stage}", f"model.precision={precision}", f"train.micro_batch_size={micro}"
    )
    job = job_file()
    full, cut = tmp_path / "full", tmp_path / "cut"
    codes, text = zygote.run(job, "--run-dir", full, *options, ranks=ranks)
    assert codes == [0] * ranks, text
    expected = outcome(full)
    code = place(where, int(expected["step"]))
    codes, text = zygote.run(job, "--run-dir", cut, *options, ranks=ranks, code=code)
    assert codes == [75] * ranks, text
    assert not (cut / "result.json").exists()
    assert "the same command goes on from there" in text
    assert text.count("stopped by") == 1
    codes, text = zygote.run(job, "--run-dir", cut, *options, ranks=ranks)
    assert codes == [0] * ranks, text
    assert "goes on after step" in text
    assert outcome(cut) == expected


# Resumes that leave something out.
BREACHES = {
    "place in training": """
import runner.noise
restart = runner.noise.Noise.restart
runner.noise.Noise.restart = lambda self, *place: None if place else restart(self)
""",
    "moments": """
import runner.shards
runner.shards._differences = lambda *_: []
load = runner.shards.load_plain
def forgetful(path):
    found = load(path)
    if "optim_states" in path.name:
        for state in found["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            state["exp_avg"].zero_()
    return found
runner.shards.load_plain = forgetful
""",
    "place": """
import runner.progress
restore = runner.progress.Progress.restore
def late(self, facts, own):
    restore(self, facts, own)
    self.done += 1
runner.progress.Progress.restore = late
""",
}


def test_a_broken_promise_is_seen(zygote, job_file, tmp_path):
    """Guards the tests above: without one part of what is restored, the bits are others."""
    job = job_file()
    codes, text = zygote.run(job, "--run-dir", tmp_path / "full")
    assert codes == [0], text
    codes, text = zygote.run(job, "--run-dir", tmp_path / "cut", code=PLACES["mid-epoch"])
    assert codes == [75], text
    for broken, code in BREACHES.items():
        folder = tmp_path / broken
        shutil.copytree(tmp_path / "cut", folder)
        codes, text = zygote.run(job, "--run-dir", folder, code=code)
        assert codes == [0], text
        assert outcome(folder)["weights"] != outcome(tmp_path / "full")["weights"], broken


REAL = """
name = "real"
[data]
train = "{train}"
sample = 12
validation = "{validation}[:6]"
max_length = 192
stride = 64
[model]
name = "{model}"
freeze = ["embeddings", "encoder.layer.0-3"]
[train]
epochs = 2
batch_size = 4
learning_rate = 3e-4
log_every = 1
checkpoint_minutes = 0.005
"""


def test_a_killed_run_goes_on_to_the_same_bits(zygote, minilm, tmp_path, request):
    """Real weights and real questions, a checkpoint every few steps; rank 0, rank 1 and the
    launcher are killed in the midst of training."""
    try:
        real = request.getfixturevalue("real_data")
        data = (real / "squadshifts_new_wiki_v1.0.json", real / "xquad_en_v1.1.json")
    except pytest.skip.Exception:
        data = (DATA / "product_qa_train.json", DATA / "product_qa_validation.json")
    job = tmp_path / "job.toml"
    job.write_text(REAL.format(train=data[0], validation=data[1], model=minilm))
    codes, text = zygote.run(job, "--run-dir", tmp_path / "full", ranks=2)
    assert codes == [0, 0], text
    expected = outcome(tmp_path / "full")
    for victim, rows in ((0, int(expected["step"]) // 2 + 2), (1, 4), ("launcher", 2)):
        folder = tmp_path / str(victim)
        started = zygote.start(job, "--run-dir", folder, ranks=2)
        deadline = time.monotonic() + 120
        while steps_of(folder) < rows:
            assert time.monotonic() < deadline, started.text()
            time.sleep(0.005)
        started.kill(victim)
        codes, text = started.wait(60), started.text()
        assert not (folder / "result.json").exists()
        assert "Traceback" not in text
        if victim == "launcher":
            assert "stopped by the end of its launcher" in text
        else:
            assert sorted(codes) == [-signal.SIGKILL, 71]
            assert f"rank {victim} (" in text
            assert text.count("died without a word at") == 1
        codes, text = zygote.run(job, "--run-dir", folder, ranks=2)
        assert codes == [0, 0], text
        assert "goes on after step" in text
        assert outcome(folder) == expected, victim


def test_a_run_that_is_stopped_again_and_again(zygote, job_file, tmp_path):
    """A chain of resumes, one every few steps (`make soak`: 10 of them for each ZeRO stage)."""
    job, folder = job_file(), tmp_path / "run"
    codes, text = zygote.run(job, "--run-dir", tmp_path / "full")
    assert codes == [0], text
    expected = outcome(tmp_path / "full")
    starts = 0
    for step in range(5, int(expected["step"]), 7):
        codes, text = zygote.run(job, "--run-dir", folder, code=STOP.format(step=step, rank=-1))
        assert codes == [75], text
        starts += 1
    codes, text = zygote.run(job, "--run-dir", folder)
    assert codes == [0], text
    assert starts >= 3
    assert outcome(folder) == expected
    ledger = sorted(path.name for path in (folder / "attempts").glob("[0-9]*.end.json"))
    assert len(ledger) == starts + 1
    kept = [path.name for path in (folder / "checkpoints").iterdir()]
    assert len(kept) <= 3
    assert not [name for name in kept if name.startswith((".", "damaged"))]
