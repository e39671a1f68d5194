"""Runs that are killed or stopped go on to the very bits of a run that was never disturbed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.reproduce import check_reproduction, reproduce
from tests.interruptions import (
    CONTEXT,
    DATA,
    JOB,
    PLACES,
    STOP,
    TORCH_DROPOUT,
    outcome,
    place,
    sets,
    steps_of,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def job_file(tmp_path: Path, tiny: Callable[[str], Path]) -> Callable[..., Path]:
    """Write a job on a tiny model; returns its path."""

    def write(extra: str = "", name: str = "job.toml") -> Path:
        path = tmp_path / name
        path.write_text(JOB.format(data=DATA, model=tiny("bert"), context=CONTEXT, extra=extra))
        return path

    return write


CELLS = [
    # ZeRO stage, precision, micro-batches, ranks, place
    (1, "bf16", 2, 2, "scoring"),
    (1, "fp32", 1, 2, "warm-up"),
    (2, "bf16", 1, 2, "epoch edge"),
    (2, "fp32", 2, 1, "last step"),
    (3, "bf16", 1, 1, "scored"),
    (3, "fp32", 2, 2, "mid-epoch"),
]


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


TUNING = """
import runner.train, runner.signals
read = runner.train.read_windows
def read_windows(*arguments, **options):
    if options.get("keep") == 1:
        runner.signals.ask("SIGTERM")
    return read(*arguments, **options)
runner.train.read_windows = read_windows
"""


def test_what_a_job_may_ask_for_besides_is_resumed_too(zygote, job_file, tmp_path):
    """Early stopping with a best evaluation that is older than the newest checkpoint, a tuned
    threshold, evaluations every other epoch, kept frozen layers, strict determinism."""
    job = job_file('[stop]\nmetric = "loss"\npatience = 3\n')
    options = sets(
        "train.epochs=4",
        "train.eval_every=2",
        "train.deterministic=true",
        "model.cache_frozen=true",
        'model.freeze=["embeddings", "encoder.layer.0"]',
        "data.unanswerable=true",
        f"data.tuning={DATA}/product_qa_validation.json[8:16]",
    )
    codes, text = zygote.run(job, "--run-dir", tmp_path / "full", *options)
    assert codes == [0], text
    expected = outcome(tmp_path / "full")
    assert "outputs of frozen layers: " in text
    steps = int(expected["train.csv"][-1]["step"])
    for where, code in (("training", STOP.format(step=steps - 4, rank=0)), ("tuning", TUNING)):
        cut = tmp_path / where
        codes, text = zygote.run(job, "--run-dir", cut, *options, code=code)
        assert codes == [75], text
        codes, text = zygote.run(job, "--run-dir", cut, *options)
        assert codes == [0], text
        assert "goes on after step" in text
        assert outcome(cut) == expected, where


# Resumes that leave something out.
BREACHES = {
    "generators": """
import runner.checkpoint
runner.checkpoint.restore_random_state = lambda *_: None
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
    "nothing": "",
}


# Dropout on a CPU draws from our own generator, whose state is the place in training alone.
NO_PLACE = """
import runner.noise
restart = runner.noise.Noise.restart
runner.noise.Noise.restart = lambda self, *place: None if place else restart(self)
"""


def test_a_broken_promise_is_seen(zygote, job_file, tmp_path):
    """Guards the tests above: without one part of what is restored, the bits are others."""
    job = job_file()
    for dropout, breaches in ((TORCH_DROPOUT, BREACHES), ("", {"place in training": NO_PLACE})):
        full, cut = tmp_path / f"full{len(breaches)}", tmp_path / f"cut{len(breaches)}"
        codes, text = zygote.run(job, "--run-dir", full, code=dropout)
        assert codes == [0], text
        codes, text = zygote.run(job, "--run-dir", cut, code=dropout + PLACES["mid-epoch"])
        assert codes == [75], text
        for broken, code in breaches.items():
            folder = tmp_path / broken
            shutil.copytree(cut, folder)
            codes, text = zygote.run(job, "--run-dir", folder, code=dropout + code)
            assert codes == [0], text
            same = outcome(folder)["weights"] == outcome(full)["weights"]
            assert same is (broken == "nothing"), broken


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


def test_a_run_is_reproduced_to_the_bit(zygote, job_file, tmp_path):
    job, folder = job_file(), tmp_path / "run"
    codes, text = zygote.run(job, "--run-dir", folder, "--threads", 1, ranks=2)
    assert codes == [0, 0], text

    def start(arguments: list[str], ranks: int) -> int:
        codes, text = zygote.run(*arguments[1:], ranks=ranks)
        assert codes == [0] * ranks, text
        return codes[0]

    found = reproduce(folder, into=tmp_path / "again", ranks=None, start=start)
    assert found.environment == []
    assert found.results == []
    check_reproduction(found)
    # One rank instead of two: other sums, so other bits; named, and held to the tolerance.
    other = reproduce(folder, into=tmp_path / "alone", ranks=1, start=start)
    assert [line.split(":")[0] for line in other.environment] == ["machine.devices", "ranks"]
    assert any("weights_sha256" in line for line in other.results)
    assert any(line.startswith("train.csv: row ") for line in other.results)


def test_an_interrupt_at_the_keyboard_saves_and_goes_on(job_file, tmp_path):
    """`spantune run`, as somebody at a terminal stops it and starts it again."""
    job, folder = job_file(), tmp_path / "run"
    command = [sys.executable, "-m", "runner", "run", str(job), "--ranks", "2", "--run-dir"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(folder)], env=environment, **options)
    deadline = time.monotonic() + 120
    while steps_of(folder) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 75, text
    assert "stopped by SIGINT; step " in text
    done = subprocess.run([*command, str(folder)], env=environment, check=False, **options)
    assert done.returncode == 0, done.stdout
    assert "goes on after step" in done.stdout
    done = subprocess.run([*command, str(folder)], env=environment, check=False, **options)
    assert (done.returncode, done.stdout) == (
        0,
        f"{folder}: finished already; --restart begins anew\n",
    )
