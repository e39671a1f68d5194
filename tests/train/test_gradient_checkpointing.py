"""train.gradient_checkpointing: activations are computed twice, and not a bit is another."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from span_kernels import reference_span_loss

from runner.cli.command import main
from runner.data.collate import collate
from runner.data.loader import pack, pad
from runner.job.load import load_job
from runner.job.schema import Model, Zero
from runner.model.attention import FAMILIES
from runner.model.dropout import DropoutMasks
from runner.model.forward import span_logits
from runner.model.freeze import freeze
from runner.train.plan import choose_plan
from tests.interruptions import CONTEXT, DATA, SMALL_JOB, at_step, outcome, place, sets
from tests.small_models import gradients_of, model_of, takes_types, windows_of

CPU = torch.device("cpu")
WINDOWS = windows_of((7, 1, 23, 12, 40))
BOTTOM = ("embeddings", "encoder.layer.0")
ABLE = tuple(family for family in FAMILIES if family != "albert")
ON = sets("train.gradient_checkpointing=true")


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "job.toml"
    path.write_text(SMALL_JOB.format(data=DATA, model=tiny("bert"), context=CONTEXT, extra=""))
    return path


def step(family: str, section: Model, *, recompute: bool, torchs_dropout: bool = False):
    """Loss, gradients and what autograd kept of one training step, in bytes."""
    model, masks = model_of(family, layers=4).train(), DropoutMasks(1, 0)
    freeze(model, section.freeze)
    plan = choose_plan(
        section, Zero(), model, CPU, "fp32", longest=40, tokens=1,
        dropout=masks, recompute=recompute,
    )  # fmt: skip
    assert plan.recomputed == (4 if recompute else 0)
    if torchs_dropout:  # as on a GPU
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, torch.nn.Dropout):
                    parent.register_module(name, torch.nn.Dropout(child.p))
    batch = collate(WINDOWS, np.arange(5))
    fed = pad(batch, 0) if plan.packing is None else pack(batch, 0, plan.packing)
    masks.reseed(0, 1, 0)
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits_T2 = span_logits(model, fed, segment_ids=takes_types(family))
    loss = reference_span_loss(logits_T2, fed.segments_B2, fed.starts_B, fed.ends_B)
    loss.backward()
    after = masks.keep_mask((64,), 0.5)
    return loss.detach(), gradients_of(model), sum(kept.values()), after


@pytest.mark.parametrize("torchs_dropout", [False, True])
@pytest.mark.parametrize(
    "section",
    [
        Model(name="x"),
        Model(name="x", packing="off"),
        Model(name="x", fused_qkv="on"),
        Model(name="x", freeze=BOTTOM),
        Model(name="x", freeze=("encoder.layer.1",)),
    ],
    ids=["packed", "padded", "fused", "frozen below", "frozen between"],
)
def test_a_step_has_the_same_bits(section, torchs_dropout):
    plain, twice = (
        step("bert", section, recompute=how, torchs_dropout=torchs_dropout) for how in (False, True)
    )
    assert torch.equal(plain[0], twice[0])
    assert plain[1].keys() == twice[1].keys()
    assert all(torch.equal(gradient, twice[1][name]) for name, gradient in plain[1].items())
    assert np.array_equal(plain[3], twice[3]), "the generator goes on from where it was"


@pytest.mark.parametrize("family", ABLE)
def test_every_family_keeps_less(family):
    section = Model(name="x", attention_dropout=0.2)
    plain, twice = (step(family, section, recompute=how) for how in (False, True))
    assert torch.equal(plain[0], twice[0])
    assert all(torch.equal(gradient, twice[1][name]) for name, gradient in plain[1].items())
    assert twice[2] < 0.6 * plain[2]


def test_what_has_no_such_layers_is_refused_in_one_line(zygote, job, tiny, tmp_path, capsys):
    name = f"model.name={tiny('albert')}"
    assert main(["check", str(job), "--data", *ON, *sets(name)]) == 64
    said = capsys.readouterr()
    [line] = [line for line in (said.out + said.err).splitlines() if "gradient_check" in line]
    assert "albert has no layers that transformers can compute again" in line
    codes, text = zygote.run(job, "--run-dir", tmp_path, *ON, *sets(name))
    assert codes == [64], text
    assert text.count("albert has no layers that transformers can compute again") == 1


def test_it_is_not_for_a_compiled_encoder(job, capsys):
    assert main(["check", str(job), *ON, *sets("model.compile=on")]) == 64
    said = capsys.readouterr()
    assert "model.compile" in said.err
    assert "train.gradient_checkpointing, which computes layers twice" in said.err
    plan = choose_plan(
        Model(name="x"), Zero(), model_of("bert"), torch.device("meta"), "bf16",
        longest=40, tokens=10**15, dropout=DropoutMasks(1, 0), recompute=True,
    )  # fmt: skip
    assert plan.choices["compile"] == ("off", "train.gradient_checkpointing computes layers twice")


def test_what_belongs_to_a_checkpoint_is_as_without():
    plans = [
        choose_plan(
            Model(name="x"), Zero(), model_of("bert"), CPU, "fp32",
            longest=40, tokens=1, dropout=DropoutMasks(1, 0), recompute=how,
        )
        for how in (False, True)
    ]  # fmt: skip
    assert plans[0].choice() == plans[1].choice()
    assert plans[0].record().keys() == plans[1].record().keys()
    assert plans[1].lines()[-1] == "activations: of 2 layers computed twice (as the job says)"
    assert not [line for line in plans[0].lines() if "activations" in line]


CELLS = [
    # ZeRO stage, precision, ranks, further options
    (3, "fp32", 2, ()),
    pytest.param(1, "bf16", 2, ("model.packing=off",), marks=pytest.mark.slow),
    (2, "fp32", 1, ("model.cache_frozen=true", 'model.freeze=["embeddings", "encoder.layer.0"]')),
    pytest.param(0, "fp32", 2, (), marks=pytest.mark.slow),
    pytest.param(2, "bf16", 2, ("zero.optimizer=deepspeed",), marks=pytest.mark.slow),
    pytest.param(2, "fp32", 1, ("model.fused_qkv=on",), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("stage", "precision", "ranks", "besides"), CELLS)
def test_a_run_that_takes_it_up_half_way_ends_with_the_same_bits(
    zygote, job, tmp_path, stage, precision, ranks, besides
):
    """Begun without, stopped, gone on with: the run that was never disturbed and never had it. So
    two starts may differ in it, such as the first that had too little memory."""
    options = sets(f"zero.stage={stage}", f"model.precision={precision}", *besides)
    codes, text = zygote.run(job, "--run-dir", tmp_path / "full", *options, ranks=ranks)
    assert codes == [0] * ranks, text
    assert "computed twice" not in text
    expected = outcome(tmp_path / "full")
    stop, cut = place("mid-epoch", int(expected["step"])), tmp_path / "cut"
    codes, text = zygote.run(job, "--run-dir", cut, *options, code=stop, ranks=ranks)
    assert codes == [75] * ranks, text
    codes, text = zygote.run(job, "--run-dir", cut, *options, *ON, ranks=ranks)
    assert codes == [0] * ranks, text
    assert "goes on after step" in text
    assert "other than at the beginning" not in text
    assert outcome(cut) == expected
    assert load_job(cut / "job.toml").train.gradient_checkpointing


def test_a_run_with_it_that_is_killed_goes_on_to_the_same_bits(zygote, job, tmp_path):
    codes, text = zygote.run(job, "--run-dir", tmp_path / "full", *ON)
    assert codes == [0], text
    assert "of 2 layers computed twice" in (tmp_path / "full" / "log.txt").read_text()
    expected = outcome(tmp_path / "full")
    cut = tmp_path / "cut"
    code = at_step(8, 0, "os.kill(os.getpid(), signal.SIGKILL)")
    codes, text = zygote.run(job, "--run-dir", cut, *ON, code=code)
    assert codes == [-signal.SIGKILL], text
    codes, text = zygote.run(job, "--run-dir", cut, *ON)
    assert codes == [0], text
    assert outcome(cut) == expected
