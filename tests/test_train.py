"""Whole jobs on tiny models, through deepspeed with two ranks; ranks and ZeRO stages compared."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.rundir import RunDir

CHECKOUT = Path(__file__).resolve().parents[1]
DATA = CHECKOUT / "jobs" / "data"
FAMILIES = ("bert", "distilbert", "roberta", "electra", "albert")
CONTEXT = "The lantern folds flat; its battery lasts nine hours on the bright setting."

JOB = """
name = "tiny"
[data]
train = "{data}/product_qa_train.json[:40]"
validation = "{data}/product_qa_validation.json[:20]"
max_length = 128
stride = 32
[model]
name = "{model}"
{model_extra}
[train]
epochs = 2
batch_size = 8
learning_rate = 1e-2
warmup = 0.1
weight_decay = 0.01
log_every = 1
[[probe]]
question = "How long does the battery last?"
context = "{context}"
answer = "nine hours"
{extra}
"""


@pytest.fixture
def job_file(tmp_path: Path, tiny: Callable[[str], Path]) -> Callable[..., Path]:
    """Write a job on a tiny model; returns its path."""

    def write(kind: str = "bert", extra: str = "", model_extra: str = "") -> Path:
        path = tmp_path / f"{kind}.toml"
        text = JOB.format(
            data=DATA, model=tiny(kind), extra=extra, model_extra=model_extra, context=CONTEXT
        )
        path.write_text(text, encoding="utf-8")
        return path

    return write


def start(script: Path, *arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Start a script: alone for one rank, through deepspeed's launcher for more."""
    command = [sys.executable, str(script), *map(str, arguments)]
    if ranks > 1:
        port = 20000 + os.getpid() % 20000
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
        launcher += ["--log_level", "error"]
        command = [*launcher, "--master_port", str(port), *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )


def main_script(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return start(CHECKOUT / "runner" / "main.py", *arguments, ranks=ranks)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_two_ranks_walk_a_whole_job(job_file, tmp_path, tiny):
    job = job_file(model_extra='freeze = ["embeddings", "encoder.layer.0"]')
    done = main_script(job, "--run-dir", tmp_path / "run", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    run = RunDir(tmp_path / "run")
    for path in (
        run.job, run.provenance, run.deepspeed, run.train_table, run.eval_table, run.probe_table,
        run.predictions, run.curves_svg, run.curves_png, run.report, run.log, run.result,
    ):  # fmt: skip
        assert path.stat().st_size > 0, path
    result = json.loads(run.result.read_text())
    assert len(rows(run.train_table)) == result["step"]
    evals = rows(run.eval_table)
    assert [row["epoch"] for row in evals] == ["1", "2"]
    assert float(evals[-1]["f1_percent"]) == result["metrics"]["f1"]
    assert float(evals[1]["train_loss_nats"]) < float(evals[0]["train_loss_nats"])
    assert [row["epoch"] for row in rows(run.probe_table)] == ["0", "1", "2"]
    for row in rows(run.probe_table):
        begin, end = int(row["start_character"]), int(row["end_character"])
        assert CONTEXT[begin:end] == row["answer"]
    steps = [int(row["step"]) for row in evals]
    names = [f"step-{step:06d}-scored-a0001" for step in steps]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == names
    assert not list(run.checkpoints.rglob("*.py"))  # DeepSpeed leaves programs beside its data
    predictions = [json.loads(line) for line in run.predictions.read_text().splitlines()]
    assert len(predictions) == 20
    assert result["export_difference"] < 1e-4
    assert len(result["peak_memory_bytes"]) == 2
    assert result["seconds"]["total"] >= result["seconds"]["training"] > 0
    # Every line fits a terminal of 80 columns but those that hold a path.
    mine = [line for line in done.stdout.splitlines() if not line.startswith("[20")]  # DeepSpeed's
    wide = [line for line in mine if len(line) > 80 and "/" not in line]
    assert not wide
    assert "nine hours" in run.report.read_text() or "epoch 2" in run.report.read_text()

    from safetensors.torch import load_file
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    AutoTokenizer.from_pretrained(run.model)
    AutoModelForQuestionAnswering.from_pretrained(run.model)
    before = load_file(tiny("bert") / "model.safetensors")
    after = load_file(run.model / "model.safetensors")
    assert before.keys() == after.keys()
    # Where the machine trains in bf16, frozen weights are the pretrained ones rounded to it.
    unchanged = {name for name in before if before[name].to(after[name].dtype).equal(after[name])}
    frozen = {n for n in before if n.startswith(("bert.embeddings", "bert.encoder.layer.0."))}
    # The key's bias shifts all scores of a query alike: its gradient is zero in theory, noise here.
    assert frozen <= unchanged
    assert not {n for n in unchanged - frozen if "key.bias" not in n}

    # The record runs as it is; what is finished is told at once, what is another job refused.
    assert main_script("check", run.job).returncode == 0
    again = main_script(run.job, "--run-dir", run.path)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == f"{run.path}: finished already; --restart begins anew\n"
    other = main_script(run.job, "--run-dir", run.path, "--set", "seed=7")
    assert other.returncode == 65
    assert "another job: seed is 42 there and 7 now" in other.stderr


def test_ranks_and_zero_stages_take_the_same_steps(job_file, tmp_path):
    """20 steps without dropout: the loss agrees to float32 rounding for the same global batch."""
    still = 'dropout = 0.0\nattention_dropout = 0.0\nprecision = "fp32"'
    job = job_file(model_extra=still)
    # A few windows in steps of 6: an epoch's last step is a short one, which ranks and
    # micro-batches share unequally.
    train = f"data.train={DATA}/product_qa_train.json[:5]"
    setting = f"{train}::train.batch_size=6::train.epochs=5::train.learning_rate=1e-3"
    losses = {}
    accumulated = "train.micro_batch_size=1"
    variants = {
        "accumulated, flat 1": ("zero.stage=1", accumulated),
        "accumulated, flat 2": ("zero.stage=2", accumulated),
        "accumulated, 3": ("zero.stage=3", accumulated),
        "DeepSpeed's 1": ("zero.stage=1", "zero.optimizer=deepspeed"),
        "DeepSpeed's 2": ("zero.stage=2", "zero.optimizer=deepspeed"),
        "padded": ("zero.stage=2", "model.packing=off"),
        "fused": ("zero.stage=2", "model.span_loss=fused"),
    }
    for ranks, stages in ((1, (0, 1, 3)), (2, (0, 1, 2, 3))):
        runs = tmp_path / f"ranks{ranks}"
        kinds = {stage: (f"zero.stage={stage}",) for stage in stages}
        kinds |= variants if ranks == 2 else {"accumulated, flat 2": ("zero.stage=2", accumulated)}
        jobs = ["::".join([str(job), setting, *kind]) for kind in kinds.values()]
        worker = CHECKOUT / "tests" / "workers" / "train_jobs.py"
        done = start(worker, runs, *jobs, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        for number, kind in enumerate(kinds):
            table = rows(runs / str(number) / "train.csv")
            losses[ranks, kind] = [float(row["loss_nats"]) for row in table][:20]
            choices = json.loads((runs / str(number) / "provenance.json").read_text())["computing"]
            flat = kind in (1, 2, "padded", "fused") or "flat" in str(kind)
            assert choices["step"]["choice"] == ("flat" if flat else "deepspeed"), kind
            assert choices["batches"]["choice"] == ("padded" if kind == "padded" else "packed")
    windows = json.loads((tmp_path / "ranks1" / "0" / "result.json").read_text())["step"] // 5
    assert windows < 20, "the first 20 steps must cross an epoch's end"
    reference = losses[1, 0]
    assert len(reference) == 20
    assert reference[-1] < 0.9 * reference[0]
    for key, found in losses.items():
        assert found == pytest.approx(reference, rel=2e-6), key


def test_kept_outputs_of_frozen_layers_train_and_score_the_same(job_file, tmp_path):
    """Without dropout there is nothing that keeping them changes; two ranks share one copy."""
    still = 'dropout = 0.0\nattention_dropout = 0.0\nprecision = "fp32"'
    job = job_file(model_extra=still + '\nfreeze = ["embeddings", "encoder.layer.0"]')
    worker = CHECKOUT / "tests" / "workers" / "train_jobs.py"
    ways = (f"{job}", f"{job}::model.cache_frozen=true", f"{job}::model.packing=off")
    kept = ("model.cache_frozen=true", "model.packing=off", "zero.stage=0")
    done = start(worker, tmp_path / "runs", *ways, "::".join([str(job), *kept]), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = [tmp_path / "runs" / str(n) for n in range(4)]
    losses, scores = (
        [[float(row[column]) for row in rows(run / name)] for run in tables]
        for name, column in (
            ("train.csv", "loss_nats"),
            ("eval.csv", "validation_loss_nats"),
        )
    )
    for found, score in zip(losses[1:], scores[1:], strict=True):
        assert found == pytest.approx(losses[0], rel=1e-4)
        assert score == pytest.approx(scores[0], rel=1e-4)
    assert "outputs of frozen layers: " in (tables[1] / "log.txt").read_text()
    assert not [*Path("/dev/shm").glob(".spantune-*")]


def test_every_family_trains(job_file, tmp_path):
    worker = CHECKOUT / "tests" / "workers" / "train_jobs.py"
    runs = tmp_path / "runs"
    done = start(worker, runs, *(f"{job_file(kind)}::train.epochs=1" for kind in FAMILIES))
    assert done.returncode == 0, done.stderr[-3000:]
    for number, kind in enumerate(FAMILIES):
        result = json.loads((runs / str(number) / "result.json").read_text())
        assert result["export_difference"] < 1e-4, kind


def test_training_stops_when_the_metric_does_not_improve(job_file, tmp_path):
    job = job_file(extra='[stop]\nmetric = "loss"\npatience = 1\n[expect]\nf1 = 100.0\n')
    # So small a learning rate changes nothing: epoch 1 stays the best, 2 is tolerated, 3 ends it.
    still = ("train.epochs=6", "train.learning_rate=1e-30", "model.dropout=0.0")
    overrides = [arg for item in (*still, "model.attention_dropout=0.0") for arg in ("--set", item)]
    done = main_script(job, "--run-dir", tmp_path / "run", *overrides)
    run = RunDir(tmp_path / "run")
    assert [row["epoch"] for row in rows(run.eval_table)] == ["1", "2", "3"]
    assert json.loads(run.result.read_text())["epoch"] == 1
    # And the job's [expect] was missed: the run is finished, the code says so.
    assert done.returncode == 78
    assert re.search(
        r"f1 is [\d.]+, [\d.]+ from the expected 100.00 \(tolerance 0.5\)", done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("train.batch_size=7", 64, "do not divide over 2 ranks"),
        ("model.freeze=['encoder.layer.9']", 64, "encoder.layer.0-1"),
        ("zero.deepspeed={zero_optimization={stag=1}}", 64, "DeepSpeed refuses"),
        ("data.train=BAD", 65, "answer text not at answer_start"),
    ],
)
def test_what_cannot_run_ends_all_ranks_with_one_sentence(
    job_file, tmp_path, override, code, words
):
    bad = tmp_path / "bad.jsonl"
    row = {"question": "q?", "context": CONTEXT, "answer": "nine hours", "answer_start": 3}
    bad.write_text(json.dumps(row) + "\n", encoding="utf-8")
    override = override.replace("BAD", str(bad))
    done = main_script(job_file(), "--run-dir", tmp_path / "run", "--set", override, ranks=2)
    assert done.returncode == code, done.stderr[-2000:]
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert sum(words in line for line in done.stderr.splitlines()) <= 2  # the sentence, one row
    assert not done.stdout.count(words)
    assert not (tmp_path / "run" / "result.json").exists()
