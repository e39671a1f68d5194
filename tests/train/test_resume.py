"""Runs that are killed or stopped go on to the very bits of a run that was never disturbed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.cli.command import main
from runner.run.folder import RunDir, committed_steps
from runner.run.reproduce import check_reproduction, reproduce
from tests.interruptions import (
    CONTEXT,
    DATA,
    SMALL_JOB,
    STOP,
    TORCH_DROPOUT,
    at_step,
    outcome,
    place,
    saved_at,
    sets,
    steps_of,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def job_file(tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a job on a tiny model; returns its path."""

    def write(extra: str = "") -> Path:
        path = tmp_path_factory.mktemp("job") / "job.toml"
        model = tiny("bert")
        path.write_text(SMALL_JOB.format(data=DATA, model=model, context=CONTEXT, extra=extra))
        return path

    return write


@pytest.fixture(scope="module")
def job(job_file: Callable[..., Path]) -> Path:
    return job_file()


@pytest.fixture(scope="module")
def undisturbed(zygote, job, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a run of `job` with these options that nothing disturbs, the same for all tests."""
    done: dict[tuple, Path] = {}

    def run(*options: str, ranks: int = 1, code: str = "") -> Path:
        key = (options, ranks, code)
        if key not in done:
            folder = tmp_path_factory.mktemp("full") / "run"
            codes, text = zygote.run(job, "--run-dir", folder, *options, ranks=ranks, code=code)
            assert codes == [0] * ranks, text
            done[key] = folder
        return done[key]

    return run


CELLS = [
    # ZeRO stage, precision, micro-batches, ranks, place
    (1, "bf16", 2, 2, "scoring"),
    pytest.param(1, "fp32", 1, 2, "warm-up", marks=pytest.mark.slow),
    pytest.param(2, "bf16", 1, 2, "epoch edge", marks=pytest.mark.slow),
    (2, "fp32", 2, 1, "last step"),
    (3, "bf16", 1, 1, "scored"),
    (3, "fp32", 2, 2, "mid-epoch"),
]


@pytest.mark.parametrize(("stage", "precision", "several", "ranks", "where"), CELLS)
def test_a_stopped_run_goes_on_to_the_same_bits(
    zygote, job, undisturbed, tmp_path, stage, precision, several, ranks, where
):
    """Cells of the resume grid; `make soak` runs all 120."""
    micro = 8 // ranks // several
    options = sets(
        f"zero.stage={stage}", f"model.precision={precision}", f"train.micro_batch_size={micro}"
    )
    cut = tmp_path / "cut"
    expected = outcome(undisturbed(*options, ranks=ranks))
    steps = int(expected["step"])
    code = place(where, steps)
    codes, text = zygote.run(job, "--run-dir", cut, *options, ranks=ranks, code=code)
    assert codes == [75] * ranks, text
    assert not (cut / "result.json").exists()
    assert "the same command goes on from there" in text
    assert text.count("stopped by") == 1
    assert max(committed_steps(RunDir(cut))) == saved_at(where, steps, ranks)
    codes, text = zygote.run(job, "--run-dir", cut, *options, ranks=ranks)
    assert codes == [0] * ranks, text
    assert "goes on after step" in text
    assert outcome(cut) == expected


@pytest.mark.slow
def test_a_compiled_run_goes_on_to_the_same_bits(zygote, job, undisturbed, tmp_path):
    """The process that goes on compiles anew."""
    options = sets("model.compile=on", "model.fused_qkv=on")
    expected = outcome(undisturbed(*options))
    code = place("mid-epoch", int(expected["step"]))
    codes, text = zygote.run(job, "--run-dir", tmp_path, *options, code=code)
    assert codes == [75], text
    codes, text = zygote.run(job, "--run-dir", tmp_path, *options)
    assert codes == [0], text
    assert "goes on after step" in text
    assert outcome(tmp_path) == expected


TUNING = """
import runner.train.trainer, runner.utils.signals
read = runner.train.trainer.predict_windows
def read_windows(*arguments, **options):
    if options.get("n_listed") == 1:
        runner.utils.signals.request_stop("SIGTERM")
    return read(*arguments, **options)
runner.train.trainer.predict_windows = read_windows
"""


def test_what_a_job_may_ask_for_besides_is_resumed_too(zygote, job_file, tmp_path):
    """Early stopping with a best evaluation that is older than the newest checkpoint, a tuned
    threshold, evaluations every other epoch, kept frozen layers, fused projections, strict
    determinism."""
    # No gain is large enough: the first evaluation stays the best one.
    job = job_file('[stop]\nmetric = "loss"\npatience = 3\nmin_delta = 100.0\n')
    options = sets(
        "train.epochs=4",
        "train.eval_every=2",
        "train.deterministic=true",
        "model.cache_frozen=true",
        "model.fused_qkv=on",
        'model.freeze=["embeddings", "encoder.layer.0"]',
        "data.unanswerable=true",
        f"data.tuning={DATA}/product_qa_validation.json[8:16]",
    )
    codes, text = zygote.run(job, "--run-dir", tmp_path / "full", *options)
    assert codes == [0], text
    expected = outcome(tmp_path / "full")
    assert "outputs of frozen layers: " in text
    steps = int(expected["train.csv"][-1]["step"])
    assert int(expected["step"]) == steps // 2
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
import runner.checkpoint.manager
runner.train.state.restore_random_state = lambda *_: None
""",
    "moments": """
import runner.checkpoint.deepspeed_io
runner.checkpoint.deepspeed_io._differences = lambda *_: []
load = runner.checkpoint.deepspeed_io.load_tensors
def forgetful(path):
    found = load(path)
    if "optim_states" in path.name:
        for state in found["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            state["exp_avg"].zero_()
    return found
runner.checkpoint.deepspeed_io.load_tensors = forgetful
""",
    "place": """
import runner.train.state
restore = runner.train.state.TrainState.load_state_dict
def late(self, state, rank_state):
    restore(self, state, rank_state)
    self.done += 1
runner.train.state.TrainState.load_state_dict = late
""",
    "nothing": "",
}


# Dropout on a CPU draws from our own generator, whose state is the place in training alone.
NO_PLACE = """
import runner.model.dropout
restart = runner.model.dropout.DropoutMasks.reseed
runner.model.dropout.DropoutMasks.reseed = lambda self, *place: None if place else restart(self)
"""


def test_a_broken_promise_is_seen(zygote, job, undisturbed, tmp_path):
    """Guards the tests above: without one part of what is restored, the bits are others."""
    for dropout, breaches in ((TORCH_DROPOUT, BREACHES), ("", {"place in training": NO_PLACE})):
        expected = outcome(undisturbed(code=dropout))
        cut, stop = tmp_path / f"cut{len(breaches)}", place("mid-epoch", int(expected["step"]))
        codes, text = zygote.run(job, "--run-dir", cut, code=dropout + stop)
        assert codes == [75], text
        for broken, code in breaches.items():
            folder = tmp_path / broken
            shutil.copytree(cut, folder)
            codes, text = zygote.run(job, "--run-dir", folder, code=dropout + code)
            assert codes == [0], text
            same = outcome(folder)["weights"] == expected["weights"]
            assert same is (broken == "nothing"), broken


# What kills a process of the run from within a step; the rank that has killed the launcher waits
# until it is told, as the others then wait for it.
FATAL = {
    "rank 0": (0, "os.kill(os.getpid(), signal.SIGKILL)"),
    "rank 1": (1, "os.kill(os.getpid(), signal.SIGKILL)"),
    "launcher": (
        0,
        "import runner.utils.signals; os.kill(os.getppid(), signal.SIGKILL)\n"
        "        while not runner.utils.signals.stop_reason(): time.sleep(0.01)",
    ),
}


@pytest.mark.parametrize(
    "victim", ["rank 0", pytest.param("rank 1", marks=pytest.mark.slow), "launcher"]
)
def test_a_run_that_loses_a_process_goes_on_to_the_same_bits(
    zygote, job, undisturbed, tmp_path, victim
):
    rank, what = FATAL[victim]
    folder, expected = tmp_path / "run", outcome(undisturbed(ranks=2))
    code = at_step(8, rank, what)
    codes, text = zygote.run(job, "--run-dir", folder, ranks=2, code=code)
    check_loss(folder, victim, codes, text)
    if victim == "launcher":  # and rank 0 has seen it
        assert "stopped by the end of its launcher; step 9 of 12 is saved" in text
    codes, text = zygote.run(job, "--run-dir", folder, ranks=2)
    assert codes == [0, 0], text
    assert f"goes on after step {9 if victim == 'launcher' else 6} " in text
    assert outcome(folder) == expected


def check_loss(folder: Path, victim: str, codes: list[int], text: str) -> None:
    """How a run ends of which one process was killed."""
    assert not (folder / "result.json").exists()
    assert "Traceback" not in text
    if victim == "launcher":
        assert codes == []
        # Rank 0 says it; the other one may have seen it first.
        assert re.search(r"stopped by (the end of its launcher|a signal to another rank);", text)
    else:
        assert sorted(codes) == [-signal.SIGKILL, 71], text
        assert f"{victim} (" in text
        assert text.count("died without a word at") == 1


REAL = """
name = "real"
[data]
train = "{train}"
sample = 8
validation = "{validation}[:3]"
max_length = 128
stride = 32
[model]
name = "{model}"
freeze = ["embeddings", "encoder.layer.0-4"]
[train]
epochs = 2
batch_size = 4
learning_rate = 3e-4
log_every = 1
checkpoint_minutes = 0.005
"""


@pytest.fixture(scope="module")
def real(zygote, minilm, tmp_path_factory, request) -> tuple[Path, dict[str, object]]:
    """A job on real weights and real questions, and what it comes to undisturbed."""
    try:
        questions = request.getfixturevalue("real_data")
        data = (questions / "squadshifts_new_wiki_v1.0.json", questions / "xquad_en_v1.1.json")
    except pytest.skip.Exception:
        data = (DATA / "product_qa_train.json", DATA / "product_qa_validation.json")
    folder = tmp_path_factory.mktemp("real")
    job = folder / "job.toml"
    job.write_text(REAL.format(train=data[0], validation=data[1], model=minilm))
    codes, text = zygote.run(job, "--run-dir", folder / "run", ranks=2)
    assert codes == [0, 0], text
    return job, outcome(folder / "run")


@pytest.mark.parametrize(
    "victim",
    [
        "rank 1",
        pytest.param("rank 0", marks=pytest.mark.slow),
        pytest.param("launcher", marks=pytest.mark.slow),
    ],
)
@pytest.mark.xdist_group("real weights")
def test_a_killed_run_goes_on_to_the_same_bits(zygote, real, tmp_path, victim):
    """Real weights and real questions, a checkpoint every few steps; a process is killed from
    outside, in the midst of training."""
    (job, expected), folder = real, tmp_path / "run"
    rows = {"rank 0": int(expected["step"]) // 2 + 2, "rank 1": 3, "launcher": 2}[victim]
    started = zygote.start(job, "--run-dir", folder, ranks=2)
    deadline = time.monotonic() + 120
    while steps_of(folder) < rows or not committed_steps(RunDir(folder)):
        assert time.monotonic() < deadline, started.text()
        time.sleep(0.005)
    started.kill("launcher" if victim == "launcher" else int(victim[-1]))
    codes = started.wait(60)
    check_loss(folder, victim, codes, started.text())
    codes, text = zygote.run(job, "--run-dir", folder, ranks=2)
    assert codes == [0, 0], text
    assert "goes on after step" in text
    assert outcome(folder) == expected


def test_a_run_that_is_stopped_again_and_again(zygote, job, undisturbed, tmp_path):
    """A chain of resumes, one every few steps (`make soak`: 10 of them for each ZeRO stage)."""
    folder, expected = tmp_path / "run", outcome(undisturbed())
    starts = 0
    for step in range(2, int(expected["step"]), 3):
        codes, text = zygote.run(job, "--run-dir", folder, code=STOP.format(step=step, rank=-1))
        assert codes == [75], text
        starts += 1
    # Which a start may say anew.
    codes, text = zygote.run(job, "--run-dir", folder, "--set", "train.keep_checkpoints=all")
    assert codes == [0], text
    assert starts >= 3
    assert outcome(folder) == expected
    ledger = sorted(path.name for path in (folder / "attempts").glob("[0-9]*.end.json"))
    assert len(ledger) == starts + 1
    kept = [path.name for path in (folder / "checkpoints").iterdir()]
    assert len(kept) <= 3
    assert not [name for name in kept if name.startswith((".", "damaged"))]


def test_a_run_is_reproduced_to_the_bit(zygote, undisturbed, tmp_path):
    folder = undisturbed("--threads", "1", ranks=2)

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


def test_an_interrupt_at_the_keyboard_saves_and_goes_on(zygote, job, undisturbed, tmp_path, capfd):
    """`spantune run`, as somebody at a terminal stops it; what goes on from there comes to the bits
    of a run whose ranks were forks."""
    folder = tmp_path / "run"
    # Long enough not to be over before it is stopped.
    options = ("--threads", "1", *sets("train.epochs=8", "train.eval_every=8", "train.log_every=1"))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "runner", "run", str(job), "--ranks", "2"),
            *("--run-dir", str(folder), *options),
        ],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while steps_of(folder) < 1:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 75, text
    assert "stopped by SIGINT; step " in text
    codes, text = zygote.run(job, "--run-dir", folder, *options, ranks=2)
    assert codes == [0, 0], text
    assert "goes on after step" in text
    assert outcome(folder) == outcome(undisturbed(*options, ranks=2))
    capfd.readouterr()
    again = ["run", str(job), "--ranks", "2", "--run-dir", str(folder), *options]
    assert main(again) == 0
    assert capfd.readouterr() == (f"{folder}: finished already; --restart begins anew\n", "")
