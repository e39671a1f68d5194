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

from runner.run.folder import checkpoint_place
from tests.interruptions import DATA, FAULT, FAULT_JOB, SCORED, STEPS, at_step, intact
from tests.workers.zygote import lives


@pytest.fixture
def job_file(tmp_path: Path, tiny: Callable[[str], Path]) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(FAULT_JOB.format(data=DATA, model=tiny("bert")))
    return path


FAILURES = [
    # What a rank does, what is said, the code of the run.
    ("raise KeyError('x')", "KeyError: 'x'", 70),
    ("raise runner.errors.StorageError('train.csv: disk full')", "train.csv: disk full", 74),
    ("raise OSError(5, 'Input/output error', 'x')", "x: Input/output error", 74),
    ("os.kill(os.getpid(), signal.SIGKILL)", "died without a word at step {step}", 71),
    ("os._exit(0)", "died without a word at step {step}", 71),
    (
        "raise torch.OutOfMemoryError('CUDA out of memory. Tried to')",
        "out of memory on rank {rank} at step {step} (epoch 2), over the questions ",
        71,
    ),
]
# Each on both ranks; the fast tier has it on one of them, in turn.
CELLS = [
    pytest.param(rank, *failure, marks=[pytest.mark.slow] if (number + rank) % 2 else [])
    for number, failure in enumerate(FAILURES)
    for rank in (0, 1)
]


@pytest.mark.parametrize(("rank", "what", "words", "code"), CELLS)
def test_a_rank_that_fails_ends_all(zygote, job_file, tmp_path, rank, what, words, code):
    words = words.format(rank=rank, step=FAULT)
    codes, text = zygote.run(
        job_file, "--run-dir", tmp_path / "run", ranks=2, code=at_step(FAULT, rank, what)
    )
    other = codes[1 - rank]
    assert other == code, text
    assert codes[rank] in (code, -signal.SIGKILL, 0)
    assert text.count(words) == 1, text
    assert text.count("Traceback") == (code == 70), text
    assert text.count("a mistake in spantune") == (code == 70), text
    assert f"step {FAULT} " in text or code in (70, 74)
    if "OutOfMemory" in what:
        assert re.search(re.escape(words) + r"\S+", text), text
    assert intact(tmp_path / "run") == [SCORED]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert words in log, log
    assert ("Traceback" in log) == (code == 70), log
    ended = tmp_path / "run" / "attempts" / "0001.end.json"
    if codes[0] == code:
        end = json.loads(ended.read_text())
        assert end["exit_code"] == code
        assert words in end["message"]
        assert "Traceback" not in end["message"]
    else:
        assert not ended.exists()


# What a shell or a terminal does to a run's stdout and stderr.
STREAMS = {
    "head": "r, w = os.pipe(); os.close(r); os.dup2(w, 1)",
    "full": "os.dup2(os.open('/dev/full', 1), 1)",
    "gone": "r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.dup2(os.open('/dev/full', 1), 2)",
}


@pytest.mark.parametrize(("streams", "ranks"), [("head", 1), ("full", 2), ("gone", 2)])
def test_a_run_goes_on_without_its_stdout_and_its_end_is_noted(
    zygote, job_file, tmp_path, streams, ranks
):
    folder = tmp_path / "run"
    code = f"import os; {STREAMS[streams]}\n"
    code += at_step(FAULT, 0, "os.kill(os.getpid(), 15)")
    codes, _ = zygote.run(job_file, "--run-dir", folder, ranks=ranks, code=code)
    assert codes == [75] * ranks
    assert json.loads((folder / "attempts" / "0001.end.json").read_text())["exit_code"] == 75
    log = (folder / "log.txt").read_text()
    assert "standard output: " in log
    end = json.loads((folder / "attempts" / "0001.end.json").read_text())
    assert f"stopped by SIGTERM; step {FAULT + (ranks > 1)} of {STEPS} is saved" in end["message"]
    assert log.endswith(f" {end['message']}\n")
    assert len(intact(folder)) == 2  # the scored one, and what the signal asked for


# A rank that gives no sign of life is given less time to give one.
IMPATIENT = "import runner.distributed.watchdog; runner.distributed.watchdog.SIGN_OF_LIFE_S = 2.0\n"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nap = lambda: time.sleep(600); nap()", r"rank 1 \(.* hangs in <lambda> \(<string>:\d+\)"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", r"rank 1 \(.* gives no sign of life"),
    ],
)
def test_a_rank_that_is_stuck_ends_all(zygote, job_file, tmp_path, what, words):
    options = ("--set", "train.timeout_minutes=0.05")
    code = IMPATIENT + at_step(FAULT, 1, what)
    run = zygote.start(job_file, "--run-dir", tmp_path / "run", *options, ranks=2, code=code)
    deadline = time.monotonic() + 60
    while lives(run.ranks[0]):
        assert time.monotonic() < deadline, run.text()
        time.sleep(0.05)
    run.kill(1)  # one that is stopped cannot end by itself: the launcher does it
    codes = run.wait(30)
    text = run.text()
    assert codes[0] == 71, text
    said = [line for line in text.splitlines() if "no progress" in line]
    assert len(said) == 1, text
    assert re.search(words, said[0]), text
    assert f"no progress at step {FAULT} (epoch 2) for 3 s (train.timeout_minutes)" in said[0]
    assert "Traceback" not in text
    assert intact(tmp_path / "run") == [SCORED]
    end = json.loads((tmp_path / "run" / "attempts" / "0001.end.json").read_text())
    assert end["message"] == said[0]
    assert (tmp_path / "run" / "log.txt").read_text().endswith(f" {said[0]}\n")


HANGS = {
    # The phase, and what never returns in it on rank 1.
    "saving after step": (
        "import runner.checkpoint.deepspeed_io as m; m.StoreCheckpointEngine.write = nap"
    ),
    "loading the checkpoint": "import runner.checkpoint.commit as m; m.newest = nap",
}


@pytest.mark.parametrize("phase", HANGS)
def test_a_rank_that_hangs_between_the_steps_ends_all(zygote, job_file, tmp_path, phase):
    """Such work may take longer than a step, but not forever."""
    code = (
        "import time, runner.distributed.watchdog\n"
        "def nap(*_):\n    runner.distributed.watchdog.LONG_WORK_FACTOR = 1\n    time.sleep(600)\n"
        f"if rank == 1:\n    {HANGS[phase]}\n"
    )
    options = ("--set", "train.timeout_minutes=0.05")
    codes, text = zygote.run(job_file, "--run-dir", tmp_path / "run", *options, ranks=2, code=code)
    assert codes == [71, 71], text
    (said,) = [line for line in text.splitlines() if "no progress" in line]
    assert said.startswith(f"no progress at {phase}")
    assert re.search(r"rank 1 \(.* hangs in nap", said), text
    assert "Traceback" not in text


HEAD = "engine.module.qa_outputs.bias"
MASTER = "engine.optimizer.single_partition_of_fp32_groups[0]"
INFINITE = "torch.tensor([float('inf'), 0])"
LOST = {
    # ZeRO stage, and what becomes no number on rank 0 when step FAULT is about to be taken.
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
        job_file, "--run-dir", tmp_path / "run", *options, code=at_step(FAULT, 0, what)
    )
    assert codes == [76], text
    (said,) = [line for line in text.splitlines() if "checkpoints from before" in line]
    kind = "gradients' norm" if "grad" in name else "(loss|gradients' norm)"
    assert re.match(rf"the {kind} is (nan|inf) at step ({FAULT}|{FAULT + 1})\b", said), text
    assert re.search(r"over the questions \S+-\S+", said), text
    assert "Traceback" not in text
    assert intact(tmp_path / "run") == [SCORED]


def test_lost_numbers_of_one_rank_end_both(zygote, job_file, tmp_path):
    code = (
        "import runner.train.trainer, runner.model.loss\n"
        "call = runner.model.loss.SpanLoss.__call__\n"
        "calls = []\n"
        "def lost_once(self, read):\n"
        "    calls.append(1)\n"
        f"    lost = len(calls) == {FAULT} and rank == 1\n"
        "    return call(self, read) * (float('nan') if lost else 1)\n"
        "runner.model.loss.SpanLoss.__call__ = lost_once\n"
    )
    codes, text = zygote.run(job_file, "--run-dir", tmp_path / "run", ranks=2, code=code)
    assert codes == [76, 76], text
    (said,) = [line for line in text.splitlines() if "checkpoints from before" in line]
    assert said.startswith(f"the loss is nan at step {FAULT} on rank 1, over the questions")


SIGNALS = {
    # Where the signal comes: before anything is read, in the model, and while scoring.
    "data": (
        "import runner.train.setup, runner.utils.signals\n"
        "load = runner.train.setup.load_splits\n"
        "def asked(*a):\n    runner.utils.signals.request_stop('SIGUSR1')\n    return load(*a)\n"
        "runner.train.setup.load_splits = asked\n",
        "stopped by SIGUSR1 before training began; nothing was lost",
    ),
    "model": (
        "import runner.train.setup, runner.utils.signals\n"
        "load = runner.train.setup.load_pretrained\n"
        "def asked(*a):\n"
        "    if rank == 1:\n        runner.utils.signals.request_stop('SIGTERM')\n"
        "    return load(*a)\n"
        "runner.train.setup.load_pretrained = asked\n",
        "stopped by SIGTERM before training began; nothing was lost",
    ),
}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_finds_no_room_for_its_file_says_so(zygote, job_file, tmp_path, rank):
    """It has none then to leave word in, and would seem to have died."""
    code = (
        "import os, resource\n"
        f"if os.environ['RANK'] == '{rank}':\n"
        "    import runner.distributed.heartbeat as module\n"
        "    register = module.RankHeartbeats.register\n"
        "    def full(self):\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "        try:\n"
        "            register(self)\n"
        "        finally:\n"
        "            resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (resource.RLIM_INFINITY,))\n"
        "    module.RankHeartbeats.register = full\n"
    )
    codes, text = zygote.run(job_file, "--run-dir", tmp_path / "run", ranks=2, code=code)
    assert codes == [74, 74], text
    said = [line for line in text.splitlines() if "0001.rank" in line]
    assert len(said) == 1, text
    assert f"rank {rank}: " in said[0]
    assert "File too large" in said[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_folder_is_renamed_says_it_once(zygote, job_file, tmp_path, ranks):
    run = tmp_path / "run"
    away = f"import os; os.rename({str(run)!r}, {str(tmp_path / 'moved')!r})"
    options = ("--run-dir", run)
    codes, text = zygote.run(job_file, *options, ranks=ranks, code=at_step(FAULT, 0, away))
    assert codes == [74] * ranks, text
    assert text.count("No such file or directory") == 1, text
    assert "died without a word" not in text
    # Under its new name it goes on, once it is known that nobody runs there.
    codes, text = zygote.run(job_file, "--run-dir", tmp_path / "moved", ranks=ranks)
    assert codes == [0] * ranks, text


@pytest.mark.parametrize("phase", SIGNALS)
def test_a_signal_before_training_ends_all_ranks(zygote, job_file, tmp_path, phase):
    code, words = SIGNALS[phase]
    codes, text = zygote.run(job_file, "--run-dir", tmp_path / "run", ranks=2, code=code)
    assert codes == [75, 75], text
    assert text.count(words) == 1
    assert "the same command goes on" in text
    end = json.loads((tmp_path / "run" / "attempts" / "0001.end.json").read_text())
    assert words in end["message"]


def test_a_signal_before_ranks_meet_is_noted_with_its_words(zygote, job_file, tmp_path):
    code = (
        "import os, signal, runner.cli.run\n"
        "runner.cli.run.check_assets = lambda _: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    codes, text = zygote.run(job_file, "--run-dir", tmp_path / "run", code=code)
    words = "stopped by SIGTERM before training began; the same command begins again"
    assert (codes, text) == ([75], f"{words}\n")
    end = json.loads((tmp_path / "run" / "attempts" / "0001.end.json").read_text())
    assert (end["exit_code"], end["message"]) == (75, words)
    assert (tmp_path / "run" / "log.txt").read_text()[9:] == f"{words}\n"


def test_what_a_run_leaves_behind_is_refused_by_another_start(zygote, job_file, tmp_path):
    """Another number of ranks or ZeRO stage, data that changed while the run went on (it keeps to
    what it has read): said, and nothing is touched. test_checkpoint has all that must be alike."""
    folder, data = tmp_path / "run", tmp_path / "train.json"
    data.write_bytes((DATA / "product_qa_train.json").read_bytes())
    options = ("--set", f"data.train={data}[:2]", "--set", "train.epochs=1")
    changed = data.read_text().replace("?", ", then?", 1)
    assert changed != data.read_text()
    (tmp_path / "changed.json").write_text(changed)
    swap = f"os.rename({str(tmp_path / 'changed.json')!r}, {str(data)!r})"
    stop = f"{swap}; import runner.utils.signals; runner.utils.signals.request_stop('SIGUSR2')"
    codes, text = zygote.run(
        job_file, "--run-dir", folder, *options, ranks=2, code=at_step(2, 0, stop)
    )
    assert codes == [75, 75], text

    codes, text = zygote.run(job_file, "--run-dir", folder, *options, ranks=1)
    assert codes == [65], text
    assert "was made by 2 ranks, this start has 1; start it with as many" in text
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
    stop = at_step(
        FAULT, 0, "import runner.utils.signals; runner.utils.signals.request_stop('SIGUSR2')"
    )
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
    assert f"goes on after step {SCORED} of {STEPS}" in text


@pytest.mark.parametrize("stops_early", [True, False])
def test_damaged_best_weights_are_refused_where_they_are_needed(
    zygote, job_file, tmp_path, stops_early
):
    """They stand in the checkpoint of the best evaluation. Early stopping may come back to them;
    without it the next evaluation takes their place."""
    if stops_early:
        job_file.write_text(job_file.read_text() + '[stop]\nmetric = "loss"\n')
    folder = tmp_path / "run"
    stop = at_step(
        FAULT, 0, "import runner.utils.signals; runner.utils.signals.request_stop('SIGUSR2')"
    )
    codes, text = zygote.run(job_file, "--run-dir", folder, code=stop)
    assert codes == [75], text
    (weights,) = folder.glob("checkpoints/step-*-scored-*/best/model/model.safetensors")
    weights.unlink()  # model/ has the same file, under another name
    stop = at_step(
        FAULT + 1, 0, "import runner.utils.signals; runner.utils.signals.request_stop('SIGUSR2')"
    )
    codes, text = zygote.run(job_file, "--run-dir", folder, code=stop)
    if stops_early:
        assert codes == [65], text
        assert "holds the best weights so far, which [stop] needs; --restart begins anew" in text
    else:
        assert codes == [75], text
        assert f"goes on after step {FAULT} of" in text
    assert not list(folder.glob("checkpoints/damaged-*"))
