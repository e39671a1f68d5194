"""What goes wrong in training ends all ranks with one sentence, one code, and the last checkpoint
as it was."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.rundir import RunDir, checkpoint_place
from runner.store import Store

DATA = Path(__file__).resolve().parents[1] / "jobs" / "data"
JOB = """
name = "tiny"
[data]
train = "{data}/product_qa_train.json[:16]"
validation = "{data}/product_qa_validation.json[:8]"
max_length = 96
stride = 24
[model]
name = "{model}"
precision = "fp32"
[train]
epochs = 3
batch_size = 8
learning_rate = 1e-2
log_every = 3
"""
# Does something on a rank when it is about to take a step.
AT_STEP = """
import os, signal, sys, time
import torch
import runner.epoch
step_taken = runner.epoch.take_step
def take_step(engine, step):
    if step == {step} and rank == {rank}:
        {what}
    step_taken(engine, step)
runner.epoch.take_step = take_step
"""


@pytest.fixture
def job_file(tmp_path: Path, tiny: Callable[[str], Path]) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(data=DATA, model=tiny("bert")))
    return path


def at_step(step: int, rank: int, what: str) -> str:
    return AT_STEP.format(step=step, rank=rank, what=what)


def intact(folder: Path) -> list[int]:
    """Steps of the run's checkpoints, each of which must be whole."""
    store = Store(RunDir(folder).checkpoints, 0)
    names = [path.name for path in store.folder.iterdir() if checkpoint_place(path.name)]
    for name in names:
        manifest = store.manifest(name)
        store.check(manifest, manifest.files)
    return sorted(checkpoint_place(name)[0] for name in names)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("what", "words", "code"),
    [
        ("raise KeyError('x')", "KeyError: 'x'", 70),
        ("raise runner.errors.StorageError('train.csv: disk full')", "train.csv: disk full", 74),
        ("os.kill(os.getpid(), signal.SIGKILL)", "died without a word at step 3", 71),
        ("os._exit(0)", "died without a word at step 3", 71),
        ("raise torch.OutOfMemoryError('CUDA out of memory. Tried to')", "out of memory at", 71),
    ],
)
def test_a_rank_that_fails_ends_all(zygote, job_file, tmp_path, rank, what, words, code):
    started = time.monotonic()
    codes, text = zygote.run(
        job_file, "--run-dir", tmp_path / "run", ranks=2, code=at_step(30, rank, what)
    )
    assert time.monotonic() - started < 60
    other = codes[1 - rank]
    assert other == code, text
    assert codes[rank] in (code, -signal.SIGKILL, 0)
    assert words in text
    assert text.count(words) == 1, text
    assert text.count("Traceback") == (code == 70), text
    assert text.count("a mistake in spantune") == (code == 70), text
    assert "step 30" in text or code in (70, 74)
    assert intact(tmp_path / "run") == [23]
    ended = tmp_path / "run" / "attempts" / "0001.end.json"
    if codes[0] == code:
        assert json.loads(ended.read_text())["exit_code"] == code
    else:
        assert not ended.exists()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nap = lambda: time.sleep(600); nap()", r"rank 1 \(.* hangs in <lambda> \(<string>:\d+\)"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", r"rank 1 \(.* gives no sign of life"),
    ],
)
def test_a_rank_that_is_stuck_ends_all(zygote, job_file, tmp_path, what, words):
    options = ("--set", "train.timeout_minutes=0.05")
    run = zygote.start(
        job_file, "--run-dir", tmp_path / "run", *options, ranks=2, code=at_step(30, 1, what)
    )
    deadline = time.monotonic() + 60
    while "no progress" not in run.text():
        assert time.monotonic() < deadline, run.text()
        time.sleep(0.1)
    time.sleep(1)
    run.kill(1)  # one that is stopped cannot end by itself: the launcher does it
    codes = run.wait(30)
    text = run.text()
    assert codes[0] == 71, text
    said = [line for line in text.splitlines() if "no progress" in line]
    assert len(said) == 1, text
    assert re.search(words, said[0]), text
    assert "no progress at step 30 (epoch 2) for 3 s (train.timeout_minutes)" in said[0]
    assert "Traceback" not in text
    assert intact(tmp_path / "run")


HEAD = "engine.module.qa_outputs.bias"
MASTER = "engine.optimizer.single_partition_of_fp32_groups[0]"
INFINITE = "torch.tensor([float('inf'), 0])"
LOST = {
    # ZeRO stage, and what becomes no number on rank 0 when step 30 is about to be taken.
    "weights": (0, f"{HEAD}.data.fill_(float('nan'))"),
    "one weight": (2, f"{MASTER}.data[-40] = float('inf')"),
    "gradients": (1, f"{HEAD}.register_hook(lambda grad: grad * float('nan'))"),
    "one gradient": (3, f"{HEAD}.register_hook(lambda grad: grad + {INFINITE})"),
}


@pytest.mark.parametrize("name", LOST)
def test_lost_numbers_end_training_by_step_and_questions(zygote, job_file, tmp_path, name):
    """They are noticed at the next row of train.csv, and named by the step where they began."""
    stage, what = LOST[name]
    options = ("--set", f"zero.stage={stage}")
    codes, text = zygote.run(
        job_file, "--run-dir", tmp_path / "run", *options, code=at_step(30, 0, what)
    )
    assert codes == [76], text
    (said,) = [line for line in text.splitlines() if "checkpoints from before" in line]
    kind = "gradients' norm" if "grad" in name else "(loss|gradients' norm)"
    assert re.match(rf"the {kind} is (nan|inf) at step 3[01]", said), text
    assert re.search(r"over the questions \S+-\S+", said), text
    assert "Traceback" not in text
    assert intact(tmp_path / "run") == [23]


def test_lost_numbers_of_one_rank_end_both(zygote, job_file, tmp_path):
    code = (
        "import runner.epoch, runner.span_loss\n"
        "call = runner.span_loss.SpanLoss.__call__\n"
        "calls = []\n"
        "def lost(self, read):\n"
        "    calls.append(1)\n"
        "    return call(self, read) * (float('nan') if len(calls) == 30 and rank == 1 else 1)\n"
        "runner.span_loss.SpanLoss.__call__ = lost\n"
    )
    codes, text = zygote.run(job_file, "--run-dir", tmp_path / "run", ranks=2, code=code)
    assert codes == [76, 76], text
    (said,) = [line for line in text.splitlines() if "checkpoints from before" in line]
    assert said.startswith("the loss is nan at step 30 on rank 1, over the questions")


FULL = """
import errno, os
import runner.files
class Full(runner.files.Files):
    def write(self, file, data):
        if rank == {rank} and "a0001" in os.readlink(f"/proc/self/fd/{{file}}") and {when}:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(file, data)
import runner.store
runner.store.Files = Full
"""


# Notes where training is.
NOW = """
import runner.progress
now = []
init = runner.progress.Progress.__init__
def noted(self, *arguments, **options):
    init(self, *arguments, **options)
    now.append(self)
runner.progress.Progress.__init__ = noted
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_ends_all_with_what_is_needed(zygote, job_file, tmp_path, rank):
    folder = tmp_path / "run"
    code = FULL.format(rank=rank, when="now and now[-1].step > 30") + NOW
    codes, text = zygote.run(job_file, "--run-dir", folder, ranks=2, code=code)
    assert codes == [74, 74], text
    (said,) = [line for line in text.splitlines() if "a checkpoint needs" in line]
    assert re.search(
        rf"rank {rank}: \S+step-\d+\S*: No space left on device; a checkpoint needs [\d,]+ bytes;"
        r" [\d,]+ are free; checkpoints from before are untouched; free some space",
        said,
    )
    assert "Traceback" not in text
    assert len(intact(folder)) == 1


def test_a_checkpoint_that_fails_once_in_between_is_only_warned_of(zygote, job_file, tmp_path):
    """checkpoint_minutes makes one every step; the third of them finds the disk full."""
    code = FULL.format(rank=0, when="saves[0] == 3")
    code += (
        "\nimport runner.commit\nsaves = [0]\nsave = runner.commit.save\n"
        "def counted(*arguments):\n    saves[0] += 1\n    return save(*arguments)\n"
        "runner.commit.save = counted\n"
    )
    code += at_step(10, 0, "import runner.signals; runner.signals.ask('SIGUSR2')")
    options = ("--set", "train.checkpoint_minutes=0.00001")
    codes, text = zygote.run(job_file, "--run-dir", tmp_path / "run", *options, code=code)
    assert codes == [75], text
    assert text.count("no checkpoint after step") == 1
    assert "No space left on device; a checkpoint needs" in text
    assert "training goes on" in text
    assert len(intact(tmp_path / "run")) == 2


SIGNALS = {
    # Where the signal comes: before anything is read, in the model, and while scoring.
    "data": (
        "import runner.material, runner.signals\n"
        "load = runner.material.load_questions\n"
        "def asked(*a):\n    runner.signals.ask('SIGUSR1')\n    return load(*a)\n"
        "runner.material.load_questions = asked\n",
        "stopped by SIGUSR1 before training began; nothing was lost",
    ),
    "model": (
        "import runner.material, runner.signals\n"
        "load = runner.material.load_pretrained\n"
        "def asked(*a):\n"
        "    if rank == 1:\n        runner.signals.ask('SIGTERM')\n"
        "    return load(*a)\n"
        "runner.material.load_pretrained = asked\n",
        "stopped by SIGTERM before training began; nothing was lost",
    ),
}


@pytest.mark.parametrize("phase", SIGNALS)
def test_a_signal_before_training_ends_all_ranks(zygote, job_file, tmp_path, phase):
    code, words = SIGNALS[phase]
    codes, text = zygote.run(job_file, "--run-dir", tmp_path / "run", ranks=2, code=code)
    assert codes == [75, 75], text
    assert text.count(words) == 1
    assert "the same command goes on" in text


def test_what_a_run_leaves_behind_is_refused_by_another_start(zygote, job_file, tmp_path):
    """Another number of ranks, ZeRO stage or precision, changed data: said, and nothing is
    touched."""
    folder, data = tmp_path / "run", tmp_path / "train.json"
    data.write_bytes((DATA / "product_qa_train.json").read_bytes())
    options = ("--set", f"data.train={data}[:16]", "--set", "train.epochs=1")
    stop = at_step(5, 0, "import runner.signals; runner.signals.ask('SIGUSR2')")
    codes, text = zygote.run(job_file, "--run-dir", folder, *options, ranks=2, code=stop)
    assert codes == [75, 75], text

    codes, text = zygote.run(job_file, "--run-dir", folder, *options, ranks=1)
    assert codes == [65], text
    assert "was made by 2 ranks, this start has 1; start it with as many" in text
    changed = data.read_text().replace("How long", "For how long", 1)
    assert changed != data.read_text()
    data.write_text(changed)
    codes, text = zygote.run(job_file, "--run-dir", folder, *options, ranks=2)
    assert codes == [65, 65], text
    assert text.count("the content of data.train has changed") == 1
    other = ("--set", "zero.stage=1")
    codes, text = zygote.run(job_file, "--run-dir", folder, *options, *other, ranks=2)
    assert codes[0] == 65, text
    assert "another job: zero.stage is 2 there and 1 now" in text
    assert "Traceback" not in text
    assert len(intact(folder)) == 1


def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(zygote, job_file, tmp_path):
    folder = tmp_path / "run"
    stop = at_step(40, 0, "import runner.signals; runner.signals.ask('SIGUSR2')")
    codes, text = zygote.run(job_file, "--run-dir", folder, ranks=2, code=stop)
    assert codes == [75, 75], text
    newest = max((folder / "checkpoints").iterdir(), key=lambda p: checkpoint_place(p.name))
    shard = next(newest.glob("*zero_pp_rank_1*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    codes, text = zygote.run(job_file, "--run-dir", folder, ranks=2, code=stop)
    assert codes == [75, 75], text
    assert text.count("is not what was written (its sha256 differs); this checkpoint is put") == 1
    assert f"damaged-{newest.name}" in text
    assert (folder / "checkpoints" / f"damaged-{newest.name}").is_dir()
    assert "goes on after step 23 of 69" in text


@pytest.mark.parametrize("stops_early", [True, False])
def test_damaged_best_weights_are_refused_where_they_are_needed(
    zygote, job_file, tmp_path, stops_early
):
    """They stand in the checkpoint of the best evaluation. Early stopping may come back to them;
    without it the next evaluation takes their place."""
    if stops_early:
        job_file.write_text(job_file.read_text() + '[stop]\nmetric = "loss"\n')
    folder = tmp_path / "run"
    stop = at_step(30, 0, "import runner.signals; runner.signals.ask('SIGUSR2')")
    codes, text = zygote.run(job_file, "--run-dir", folder, code=stop)
    assert codes == [75], text
    (weights,) = folder.glob("checkpoints/step-*-scored-*/best/model/model.safetensors")
    weights.unlink()  # model/ has the same file, under another name
    stop = at_step(35, 0, "import runner.signals; runner.signals.ask('SIGUSR2')")
    codes, text = zygote.run(job_file, "--run-dir", folder, code=stop)
    if stops_early:
        assert codes == [65], text
        assert "holds the best weights so far, which [stop] needs; --restart begins anew" in text
    else:
        assert codes == [75], text
        assert "goes on after step 30" in text
    assert not list(folder.glob("checkpoints/damaged-*"))
