"""A model that is not known is packed only after its own weights have shown that it may be."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

import runner.model.attention
from runner.errors import JobError
from runner.job.schema import Model, Zero
from runner.model.attention import FAMILIES, PACKED_ATTENTION, choose_packing
from runner.model.dropout import DropoutMasks
from runner.run.folder import RunDir
from runner.train.plan import choose_plan, compare_packing
from tests.interruptions import CONTEXT, DATA, SMALL_JOB, outcome, place, sets
from tests.small_models import model_of, takes_types, windows_of

CPU = torch.device("cpu")
WINDOWS = windows_of((9, 40, 12, 31, 17, 6, 25))
SHAPE = {
    **{"vocab_size": 60, "max_position_embeddings": 100, "pad_token_id": 0, "hidden_size": 32},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2},
}
# What no list names and reads windows as it should; what each of the others does besides.
ALIKE = {
    "data2vec-text": {},
    "roberta-prelayernorm": {},
    "xlm-roberta-xl": {},
    "jina_embeddings_v3": {},
}
OTHER = {
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 8},  # landmarks of the row
    "convbert": {"embedding_size": 32, "conv_kernel_size": 3},  # convolutions
    "big_bird": {"block_size": 4, "num_random_blocks": 1},  # blocks and global tokens
    "longformer": {"attention_window": 4},
    "squeezebert": {"embedding_size": 32, "q_groups": 1},
    "mpnet": {},  # biases by distances in the row
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roformer": {"embedding_size": 16},  # positions of the row
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},  # a token sees those before it
}


def unknown(family: str):
    """A random model of a family by another list."""
    shape = SHAPE | (ALIKE | OTHER)[family]
    if family in ALIKE:
        shape |= {"pad_token_id": 1, "type_vocab_size": 1}
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model(family, **shape))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def compared(model, *, segment_ids=False, precision="fp32", windows=WINDOWS) -> str | None:
    return compare_packing(model, windows, CPU, precision, pad_id=0, segment_ids=segment_ids)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_known_families_stand_the_comparison(family, precision):
    found = compared(model_of(family), segment_ids=takes_types(family), precision=precision)
    assert found is None


@pytest.mark.parametrize("family", ALIKE)
def test_a_family_that_nobody_has_listed_is_packed(family):
    assert compared(unknown(family)) is None


@pytest.mark.parametrize("family", OTHER)
def test_a_family_that_reads_a_row_otherwise_is_padded(family):
    """Whatever it does with a row of windows: it is found on the weights, not by a name."""
    model = unknown(family)
    kind, said = model.config.model_type, compared(model)
    assert said is not None
    implementation = model.config._attn_implementation
    assert implementation != PACKED_ATTENTION
    packing, reason = choose_packing("auto", model, CPU, "fp32", 40, compare=lambda: said)
    assert packing is None
    # Only where the layers would read packed batches at all it is compared.
    assert reason in (f"{kind} takes no attention but its own", _unlisted(kind, said))
    assert model.config._attn_implementation == implementation
    with pytest.raises(JobError, match=r'model\.packing: "on" is not possible') as refused:
        choose_packing("on", model, CPU, "fp32", 40, compare=lambda: said)
    assert refused.value.exit_code == 64


def _unlisted(kind: str, said: str) -> str:
    return f"{kind} is not among {', '.join(FAMILIES)}; {said}"


def leaks(model) -> None:
    """Its first layer adds a little of the mean of the row."""
    layer = model.bert.encoder.layer[0]
    layer.register_forward_hook(
        lambda module, inputs, out: out + 1e-3 * out.mean(dim=1, keepdim=True)
    )


def looks_one_further(model) -> None:
    """A token gets something of the one after it, as by a convolution."""
    layer = model.bert.encoder.layer[1]
    layer.register_forward_hook(lambda module, inputs, out: out + 1e-3 * out.roll(-1, dims=1))


def counts_on(model) -> None:
    """It takes positions from the row, whatever it is given."""

    def forget(module, arguments, options):
        return arguments, options | {"position_ids": None}

    model.bert.embeddings.register_forward_pre_hook(forget, with_kwargs=True)


def sees_nothing(model) -> None:
    """Attention adds nothing: windows that see each other have the same logits."""
    for layer in model.bert.encoder.layer:
        torch.nn.init.zeros_(layer.attention.output.dense.weight)


def answers_alike(model) -> None:
    torch.nn.init.zeros_(model.qa_outputs.weight)


def is_no_number(model) -> None:
    torch.nn.init.constant_(model.qa_outputs.bias, float("nan"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (leaks, "see each other when they are packed"),
        (looks_one_further, "see each other when they are packed"),
        (counts_on, "packed windows have logits"),
        (sees_nothing, "could not be told from others"),
        (answers_alike, "could not be told from others"),
        (is_no_number, "see each other"),
    ],
)
def test_each_way_to_be_another_is_seen(damage, words, monkeypatch):
    model = model_of("bert", max_position_embeddings=100)
    monkeypatch.setattr(runner.model.attention, "FAMILIES", ())
    assert compared(model, segment_ids=True) is None
    damage(model)
    said = compared(model, segment_ids=True)
    assert said is not None
    assert words in said


def test_a_known_family_of_another_kind_is_compared_too():
    """A decoder sees what came before a token alone."""
    model = model_of("bert", is_decoder=True)
    said = compared(model, segment_ids=True)
    assert said == "a packed window has other logits, on a CPU, than by its own attention"
    found = choose_packing("auto", model, CPU, "fp32", 40, compare=lambda: said)
    assert found[0] is None


@pytest.mark.parametrize("lengths", [(9,), (5, 5), (12, 12, 12)])
def test_few_windows_are_enough(lengths):
    assert compared(model_of("bert"), segment_ids=True, windows=windows_of(lengths)) is None


def test_a_comparison_leaves_no_trace():
    """Weights, attention, modes and random numbers: a run that was not compared has the same."""
    model = model_of("bert").train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = []
    for compare in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if compare:
            assert compared(model, segment_ids=True) is None
        drawn.append((random.random(), np.random.random(), float(torch.rand(1))))
    assert drawn[0] == drawn[1]
    assert model.training
    assert model.config._attn_implementation != PACKED_ATTENTION
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_known_family_is_not_compared():
    def never():
        raise AssertionError

    assert choose_packing("auto", model_of("bert"), CPU, "fp32", 40, compare=never)[0] is not None


@pytest.mark.parametrize("before", [True, False])
def test_what_a_run_began_with_it_keeps(before, monkeypatch):
    def never():
        raise AssertionError

    for families in (FAMILIES, ()):
        monkeypatch.setattr(runner.model.attention, "FAMILIES", families)
        plan = choose_plan(
            Model(name="x"), Zero(), model_of("bert"), CPU, "fp32", longest=40, tokens=1,
            dropout=DropoutMasks(1, 0), compare=never, packed_before=before,
        )  # fmt: skip
        assert (plan.packing is not None) is before


# A library in which this family is not known, or comes out otherwise than it is.
UNKNOWN = "import runner.model.attention; runner.model.attention.FAMILIES = ()\n"
REFUSED = UNKNOWN + (
    "import runner.train.setup\n"
    "runner.train.setup.compare_packing = lambda *_, **__: 'it is another'\n"
)
# What two starts know of the family and find, the ranks, and whether both pack.
HISTORIES = [
    pytest.param(UNKNOWN, REFUSED, 1, True, id="compared, then refused"),
    # As when a version learns of a family.
    pytest.param(REFUSED, "", 1, False, id="refused, then known"),
    pytest.param(UNKNOWN, REFUSED, 2, True, id="on two ranks", marks=pytest.mark.slow),
    pytest.param(REFUSED, UNKNOWN, 1, False, id="refused, then compared", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "job.toml"
    path.write_text(SMALL_JOB.format(data=DATA, model=tiny("bert"), context=CONTEXT, extra=""))
    return path


@pytest.mark.parametrize(("first", "second", "ranks", "packs"), HISTORIES)
def test_every_later_start_computes_as_the_first(
    zygote, job, tmp_path, first, second, ranks, packs
):
    """Whatever a later version knows of the model, and however the comparison comes out there."""
    full, cut = tmp_path / "full", RunDir(tmp_path / "cut")
    plain = () if packs else sets("model.packing=off")
    codes, text = zygote.run(job, "--run-dir", full, *plain, ranks=ranks)
    assert codes == [0] * ranks, text
    expected = outcome(full)
    stop = place("mid-epoch", int(expected["step"]))
    codes, text = zygote.run(job, "--run-dir", cut.path, code=first + stop, ranks=ranks)
    assert codes == [75] * ranks, text
    choice = json.loads(cut.provenance.read_text())["computing"]["batches"]
    assert choice["choice"] == ("packed" if packs else "padded")
    assert ("was compared" if packs else "it is another") in choice["reason"]
    codes, text = zygote.run(job, "--run-dir", cut.path, code=second, ranks=ranks)
    assert codes == [0] * ranks, text
    assert "goes on after step" in text
    assert "other than at the beginning" not in text
    assert outcome(cut.path) == expected


def test_what_is_asked_for_and_is_not_equal_is_refused(zygote, job, tmp_path):
    options = sets("model.packing=on")
    run = ("--run-dir", tmp_path / "run", *options)
    codes, text = zygote.run(job, *run, code=REFUSED, ranks=2)
    assert codes == [64, 64], text
    assert 'model.packing: "on" is not possible: bert is not among' in text
    assert "it is another" in text
    assert "Traceback" not in text
