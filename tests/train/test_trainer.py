"""Whole jobs on tiny models, one of them through deepspeed with two ranks; ranks and ZeRO stages
compared."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from runner.cli.command import main
from runner.run.folder import RunDir
from runner.utils.ranks import free_port
from tests.interruptions import DATA, SIX, outcome, sets

CHECKOUT = Path(__file__).resolve().parents[2]
CONTEXT = "The lantern folds flat; its battery lasts nine hours on the bright setting."

JOB = (
    SIX
    + """\
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
)


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


def deepspeed(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Start `deepspeed runner/main.py ARGUMENTS` with two ranks, as a user does."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    command += ["--log_level", "error", "--master_port", str(free_port())]
    return subprocess.run(
        [*command, str(CHECKOUT / "runner" / "main.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_two_ranks_walk_a_whole_job(zygote, job_file, tmp_path, tiny, capsys):
    job = job_file(model_extra='freeze = ["embeddings", "encoder.layer.0"]')
    keep = ("--set", "train.keep_checkpoints=all")
    done = deepspeed(job, "--run-dir", tmp_path / "run", *keep)
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
    assert len(predictions) == 6
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

    # Ranks that are forks, as in the other tests, come to the same bits.
    codes, text = zygote.run(job, "--run-dir", tmp_path / "forks", ranks=2)
    assert codes == [0, 0], text
    assert outcome(tmp_path / "forks") == outcome(run.path)

    # The record runs as it is; what is finished is told at once, what is another job refused.
    assert main(["check", str(run.job)]) == 0
    capsys.readouterr()
    again = [str(run.job), "--run-dir", str(run.path)]
    assert main(again) == 0
    assert capsys.readouterr() == (f"{run.path}: finished already; --restart begins anew\n", "")
    assert main([*again, "--set", "seed=7"]) == 65
    assert "another job: seed is 42 there and 7 now" in capsys.readouterr().err


STILL = 'dropout = 0.0\nattention_dropout = 0.0\nprecision = "fp32"'


@dataclass
class Steps:
    """The first 20 steps of a run, and how it took them."""

    losses: list[float]
    grad_norms: list[float]  # none in ZeRO-0, where DeepSpeed computes none in float32
    choices: dict[str, str]


@pytest.fixture(scope="module")
def steps(zygote, tiny, tmp_path_factory) -> Callable[..., Steps]:
    """`steps(ranks, "zero.stage=1", ...)` trains without dropout, each setting once."""
    folder = tmp_path_factory.mktemp("grid")
    job = folder / "job.toml"
    text = JOB.format(data=DATA, model=tiny("bert"), extra="", model_extra=STILL, context=CONTEXT)
    job.write_text(text)
    # A few windows in steps of 6: an epoch's last step is a short one, which ranks and
    # micro-batches share unequally.
    setting = (
        *(f"data.train={DATA}/product_qa_train.json[:5]", "train.batch_size=6"),
        *("train.learning_rate=1e-3", "train.epochs=3", "train.eval_every=3"),
        f"data.validation={DATA}/product_qa_validation.json[:1]",
    )

    @cache
    def train(ranks: int, *overrides: str) -> Steps:
        run = RunDir(folder / "-".join([str(ranks), *overrides]))
        options = sets(*setting, *overrides)
        codes, text = zygote.run(job, "--run-dir", run.path, *options, ranks=ranks)
        assert codes == [0] * ranks, text
        per_epoch = json.loads(run.result.read_text())["step"] // 3
        assert per_epoch < 20, "the first 20 steps must cross an epoch's end"
        table = rows(run.train_table)[:20]
        made = json.loads(run.provenance.read_text())
        choices = {name: made["computing"][name]["choice"] for name in ("step", "batches")}
        return Steps(
            [float(row["loss_nats"]) for row in table],
            [float(row["grad_norm"]) for row in table if row["grad_norm"]],
            choices | {"span loss": made["span_loss"]["path"]},
        )

    return train


ACCUMULATED = "train.micro_batch_size=1"
OWN = "zero.optimizer=deepspeed"
FUSED = "model.fused_qkv=on"
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "stage", "overrides"),
    [
        (1, 1, ()),
        (1, 2, (ACCUMULATED,)),
        (1, 3, ()),
        (2, 0, ()),
        pytest.param(2, 1, (), marks=slow),
        (2, 1, (ACCUMULATED,)),
        pytest.param(2, 1, (OWN,), marks=slow),
        pytest.param(2, 2, (), marks=slow),
        pytest.param(2, 2, (ACCUMULATED,), marks=slow),
        (2, 2, (OWN,)),
        (2, 2, ("model.packing=off",)),
        (2, 2, ("model.span_loss=fused",)),
        (2, 2, (FUSED,)),
        pytest.param(1, 0, (FUSED,), marks=slow),
        pytest.param(2, 1, (FUSED, ACCUMULATED), marks=slow),
        pytest.param(1, 2, (FUSED, OWN), marks=slow),
        pytest.param(1, 2, ("model.compile=on",), marks=slow),
        pytest.param(2, 1, ("model.compile=on", FUSED), marks=slow),
        (2, 3, ()),
        pytest.param(2, 3, (ACCUMULATED,), marks=slow),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(value) or "plain",
)
def test_ranks_and_zero_stages_take_the_same_steps(steps, ranks, stage, overrides):
    """20 steps without dropout: the loss agrees to float32 rounding for the same global batch, with
    that of one rank without ZeRO. So does the gradients' norm: Adam divides a wrong scale away."""
    reference, normed = steps(1, "zero.stage=0"), steps(1, "zero.stage=1")
    assert len(reference.losses) == len(normed.grad_norms) == 20
    assert reference.losses[-1] < 0.9 * reference.losses[0]
    found = steps(ranks, f"zero.stage={stage}", *overrides)
    flat = stage in (1, 2) and OWN not in overrides
    assert found.choices == {
        "step": "flat" if flat else "deepspeed",
        "batches": "padded" if "model.packing=off" in overrides else "packed",
        "span loss": "fused head" if "model.span_loss=fused" in overrides else "reference",
    }
    assert found.losses == pytest.approx(reference.losses, rel=2e-6)
    if stage:
        assert found.grad_norms == pytest.approx(normed.grad_norms, rel=2e-6)


WARM_UP = """
import runner.train.trainer
def warm_up(device, dtype, **shape):
    print("kernels:", device, dtype, shape, flush=True)
runner.train.trainer.warm_up = warm_up
"""


def test_kernels_are_compiled_before_the_first_step(zygote, job_file, tmp_path):
    job = job_file(model_extra='span_loss = "fused"\nprecision = "bf16"')
    options = sets("train.epochs=1", "train.micro_batch_size=4")
    codes, text = zygote.run(job, "--run-dir", tmp_path / "run", *options, code=WARM_UP)
    assert codes == [0], text
    told = re.search(
        r"kernels: cpu torch.bfloat16 {'rows': 4, 'longest': (\d+), 'width': 32}", text
    )
    assert told
    assert 32 < int(told[1]) <= 128
    assert told.start() < text.index("epoch 1/1")


def test_kept_outputs_of_frozen_layers_train_and_score_the_same(zygote, job_file, tmp_path):
    """Without dropout there is nothing that keeping them changes; two ranks share one copy."""
    job = job_file(model_extra=STILL + '\nfreeze = ["embeddings", "encoder.layer.0"]')
    kept, padded = "model.cache_frozen=true", "model.packing=off"
    ways = ((), (kept,), (padded,), (kept, padded, "zero.stage=0"))
    losses, scores = [], []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        code = (
            f"import pathlib, runner.model.frozen as m; m._SHARED_MEMORY = pathlib.Path({memory!r})"
        )
        for number, way in enumerate(ways):
            run = RunDir(tmp_path / str(number))
            codes, text = zygote.run(job, "--run-dir", run.path, *sets(*way), ranks=2, code=code)
            assert codes == [0, 0], text
            assert ("outputs of frozen layers: " in text) is (kept in way)
            losses.append([float(row["loss_nats"]) for row in rows(run.train_table)])
            scores.append([float(row["validation_loss_nats"]) for row in rows(run.eval_table)])
        assert not [*Path(memory).iterdir()]
    for found, score in zip(losses[1:], scores[1:], strict=True):
        assert found == pytest.approx(losses[0], rel=1e-4)
        assert score == pytest.approx(scores[0], rel=1e-4)


# Leaves another model in model/ than the one that was scored.
SPOILT = """
import runner.train.trainer
publish = runner.train.trainer.publish_model
def spoil(exported, folder, *fence):
    from safetensors.torch import load_file, save_file
    publish(exported, folder, *fence)
    path = folder / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    weights["qa_outputs.bias"] += 1
    save_file(weights, path, {"format": "pt"})
runner.train.trainer.publish_model = spoil
"""


@pytest.mark.xdist_group("verified")
def test_a_model_that_is_not_the_scored_one_is_no_result(zygote, job_file, tmp_path):
    run, options = RunDir(tmp_path / "run"), sets("train.epochs=1")
    codes, text = zygote.run(job_file(), "--run-dir", run.path, *options, whole=True, code=SPOILT)
    assert codes == [70], text
    assert "the export is not the model that was scored" in text
    assert not run.result.exists()


def test_training_stops_when_the_metric_does_not_improve(zygote, job_file, tmp_path):
    job = job_file(extra='[stop]\nmetric = "loss"\npatience = 1\n[expect]\nf1 = 100.0\n')
    # So small a learning rate changes nothing: epoch 1 stays the best, 2 is tolerated, 3 ends it.
    still = ("train.epochs=6", "train.learning_rate=1e-30", "model.dropout=0.0")
    options = sets(*still, "model.attention_dropout=0.0")
    codes, text = zygote.run(job, "--run-dir", tmp_path / "run", *options)
    run = RunDir(tmp_path / "run")
    assert [row["epoch"] for row in rows(run.eval_table)] == ["1", "2", "3"]
    assert json.loads(run.result.read_text())["epoch"] == 1
    # And the job's [expect] was missed: the run is finished, the code says so.
    assert codes == [78], text
    assert re.search(r"f1 is [\d.]+, [\d.]+ from the expected 100.00 \(tolerance 0.5\)", text)
    assert "Traceback" not in text


REFUSED = [
    ("train.batch_size=7", 64, "do not divide over 2 ranks"),
    ("model.freeze=['encoder.layer.9']", 64, "encoder.layer.0-1"),
    ("zero.deepspeed={zero_optimization={reduce_bucket_size=1.5}}", 64, "DeepSpeed refuses"),
    ("data.train=BAD", 65, "answer text not at answer_start"),
]


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Data with a wrong row."""
    path = tmp_path / "bad.jsonl"
    row = {"question": "q?", "context": CONTEXT, "answer": "nine hours", "answer_start": 3}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def check_refusal(run: Path, words: str, said: str, complained: str) -> None:
    assert words in complained
    assert "Traceback" not in complained
    assert sum(words in line for line in complained.splitlines()) <= 2  # the sentence, one row
    assert not said.count(words)
    assert not (run / "result.json").exists()


@pytest.mark.parametrize(("override", "code", "words"), REFUSED)
def test_what_cannot_run_ends_all_ranks_with_one_sentence(
    zygote, job_file, bad, tmp_path, override, code, words
):
    run, errors = tmp_path / "run", tmp_path / "stderr"
    apart = (
        f"import os; os.dup2(os.open({str(errors)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)"
    )
    options = sets(override.replace("BAD", str(bad)))
    codes, text = zygote.run(job_file(), "--run-dir", run, *options, ranks=2, code=apart)
    assert codes == [code, code], text
    check_refusal(run, words, text, errors.read_text())


@pytest.mark.slow
def test_deepspeeds_launcher_passes_on_what_cannot_run(job_file, bad, tmp_path):
    """It ends the other ranks at the first failure: rank 0 has to have spoken by then."""
    override, code, words = REFUSED[-1]
    options = sets(override.replace("BAD", str(bad)))
    done = deepspeed(job_file(), "--run-dir", tmp_path / "run", *options)
    assert done.returncode == code, done.stderr[-2000:]
    check_refusal(tmp_path / "run", words, done.stdout, done.stderr)
