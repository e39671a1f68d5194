"""Loading, refusing, freezing and running models of five families, tiny and random."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
)

import runner.model.load
from runner.data.collate import collate
from runner.data.dataset import Example
from runner.data.loader import pad
from runner.data.windows import build_windows
from runner.errors import AssetError, DataError, JobError
from runner.job.schema import Model
from runner.model.config import empty_model
from runner.model.forward import span_logits, takes_segment_ids
from runner.model.freeze import freeze, optimiser_groups, parameter_table
from runner.model.load import (
    ModelFiles,
    check_forward,
    choose_precision,
    emulation_warning,
    load_finetuned,
    load_pretrained,
    load_tokenizer,
)
from runner.model.structure import longest_input

FAMILIES = ("bert", "distilbert", "roberta", "electra", "albert")
CONTEXT = "The river folds battery before beech; the old guide was printed in Paris. "


@pytest.fixture
def copy(tiny, tmp_path):
    """`copy(kind, key=value, ...)`: a tiny model's folder to spoil, config.json changed."""

    def make(kind="bert", **config):
        folder = tmp_path / kind
        shutil.copytree(tiny(kind), folder)
        table = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(table | config))
        return folder

    return make


@pytest.fixture(scope="module")
def model_of(tiny):
    """`model_of(family)`: a new model without weights, for freezing."""
    return lambda family: empty_model(
        ModelFiles.locate(Model(name=str(tiny(family)))).config, family
    )


def pretrained(folder, seed=0, **section):
    return loaded(Model(name=str(folder), **section), seed)


def loaded(section, seed=0):
    files = ModelFiles.locate(section)
    return SimpleNamespace(
        files=files, tokenizer=load_tokenizer(files), model=load_pretrained(files, seed)
    )


# ---- logits


@pytest.mark.parametrize("family", [*FAMILIES, "bert-left"])
@pytest.mark.parametrize("layout", ["padded", "multiple of 8", "one length"])
def test_logits_are_those_of_plain_transformers(tiny, family, layout):
    """Each window's logits are what the model says to that window alone, as its own tokenizer
    writes it down: padding, its side and segment ids change nothing."""
    ours = pretrained(tiny(family))
    ours.model.eval()
    plain = AutoModelForQuestionAnswering.from_pretrained(tiny(family)).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny(family))
    asked = [
        Example(str(n), "Who wrote the guide?", CONTEXT * repeats, (), ())
        for n, repeats in enumerate([1] * 2 if layout == "one length" else [2, 1, 3])
    ]
    windows = build_windows(asked, ours.tokenizer, 60, 8)
    rows = np.flatnonzero(windows.lengths_N == windows.lengths_N[0])
    rows = rows if layout == "one length" else np.arange(len(windows))
    padded = pad(collate(windows, rows), ours.tokenizer.pad_token_id, 8 if layout[0] == "m" else 1)
    assert (padded.mask_RL is None) == (layout == "one length")
    with torch.no_grad():
        logits_T2 = span_logits(ours.model, padded, segment_ids=takes_segment_ids(ours.tokenizer))
    assert logits_T2.shape == (padded.ids_RL.numel(), 2)
    encoded = tokenizer(
        [e.question for e in asked],
        [e.context for e in asked],
        truncation="only_second",
        max_length=60,
        stride=8,
        return_overflowing_tokens=True,
        return_token_type_ids=plain.config.model_type in ("bert", "electra", "albert"),
    )
    for row, (offset, length) in zip(rows, padded.segments_B2.tolist(), strict=True):
        inputs = {
            key: torch.tensor([encoded[key][row]])
            for key in ("input_ids", "token_type_ids")
            if key in encoded
        }
        with torch.no_grad():
            output = plain(**inputs)
        expected_L2 = torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)
        assert expected_L2.std() > 0.1
        torch.testing.assert_close(
            logits_T2[offset : offset + length], expected_L2, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("family", ["bert", "electra", "albert"])
def test_segment_ids_reach_the_models_that_have_them(tiny, family):
    ours = pretrained(tiny(family))
    ours.model.eval()
    assert takes_segment_ids(ours.tokenizer)
    windows = build_windows([Example("q", "Who?", CONTEXT, (), ())], ours.tokenizer, 100, 8)
    assert set(windows.types_T.tolist()) == {0, 1}
    padded = pad(collate(windows, np.array([0])), 0)
    with torch.no_grad():
        with_ids, without = (
            span_logits(ours.model, padded, segment_ids=flag) for flag in (True, False)
        )
    assert (with_ids - without).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "config", "takes"),
    [
        ("bert", {}, True),
        ("distilbert", {}, False),
        ("roberta", {}, False),
        ("roberta", {"type_vocab_size": 2}, True),
        ("electra", {}, True),
        ("albert", {}, True),
        ("bert", {"type_vocab_size": 1}, False),
    ],
)
@pytest.mark.parametrize("says", [True, False, None])
def test_the_model_decides_on_segment_ids_not_its_tokenizer(copy, family, config, takes, says):
    folder = copy(family, **config)
    if says is not None:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        names = ["input_ids", "attention_mask", *["token_type_ids"] * says]
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings | {"model_input_names": names})
        )
    tokenizer = load_tokenizer(ModelFiles.locate(Model(name=str(folder))))
    assert takes_segment_ids(tokenizer) is takes
    tokenizer.save_pretrained(folder)
    # A plain transformers user of the exported folder feeds the same inputs.
    assert ("token_type_ids" in AutoTokenizer.from_pretrained(folder)("a", "b")) is takes


@pytest.mark.parametrize(
    ("family", "positions"),
    [("bert", 130), ("distilbert", 130), ("roberta", 129), ("electra", 130), ("albert", 130)],
)
def test_the_tokenizer_knows_the_longest_window(tiny, family, positions):
    ours = pretrained(tiny(family))
    assert ours.tokenizer.model_max_length == positions
    ids = torch.full((1, positions), 7)
    assert ours.model(input_ids=ids).start_logits.shape == (1, positions)
    with pytest.raises((IndexError, RuntimeError)):
        ours.model(input_ids=torch.full((1, positions + 1), 7))


# ---- loading


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_head_comes_from_the_seed_and_the_body_from_the_file(copy, family):
    folder = copy(family)
    weights = load_file(folder / "model.safetensors")
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("qa_outputs")}
    assert len(body) == len(weights) - 2
    save_file(body, folder / "model.safetensors", metadata={"format": "pt"})
    one, same, other = (pretrained(folder, seed).model.state_dict() for seed in (1, 1, 2))
    for name, tensor in body.items():
        assert torch.equal(one[name], tensor), name
    assert torch.equal(one["qa_outputs.weight"], same["qa_outputs.weight"])
    assert not torch.equal(one["qa_outputs.weight"], other["qa_outputs.weight"])
    assert one["qa_outputs.weight"].dtype == torch.float32


def test_weights_are_trained_in_float32_whatever_the_file_holds(copy):
    folder = copy("bert", dtype="bfloat16")
    weights = load_file(folder / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    assert {p.dtype for p in pretrained(folder).model.parameters()} == {torch.float32}


@pytest.mark.parametrize("labels", [1, 3])
def test_a_checkpoint_of_a_classifier_gets_a_span_head(copy, labels):
    names = {str(n): f"L{n}" for n in range(labels)}
    folder = copy("bert", id2label=names, label2id={v: int(k) for k, v in names.items()})
    weights = load_file(folder / "model.safetensors")
    del weights["qa_outputs.weight"], weights["qa_outputs.bias"]
    weights["classifier.weight"] = torch.zeros(labels, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = pretrained(folder).model
    assert model.config.num_labels == 2
    assert model(input_ids=torch.tensor([[2, 5, 3]])).end_logits.shape == (1, 3)


def test_a_package_is_found_by_its_name(monkeypatch, tiny, tmp_path):
    package = tmp_path / "weights_of_a_package"
    shutil.copytree(tiny("bert"), package / "model")
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    section = Model(name="package:weights_of_a_package/model")
    assert loaded(section).files.folder == package / "model"
    for missing in ("package:weights_of_a_package/other", "package:no_such_package/model"):
        with pytest.raises(AssetError, match=f"{missing} is not installed"):
            ModelFiles.locate(Model(name=missing))


def test_minilm_is_a_bert_with_a_new_head(minilm):
    sha256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    found = loaded(Model(name=minilm, sha256=sha256), 42)
    assert found.files.weights_sha256 == sha256
    assert (found.model.config.model_type, len(found.tokenizer)) == ("bert", 30522)
    assert found.tokenizer.model_max_length == 512
    assert parameter_table(found.model)[-1]["parameters"] == 22_566_146


def test_the_hash_of_the_weights_is_checked_before_they_are_read(copy):
    folder = copy()
    weights = folder / "model.safetensors"
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert pretrained(folder, sha256=sha256).files.weights_sha256 == sha256
    assert pretrained(folder).files.weights_sha256 == sha256
    weights.write_bytes(b"spoiled")
    told = f"sha256 is {hashlib.sha256(b'spoiled').hexdigest()}, the job declares {sha256}"
    with pytest.raises(DataError, match=told):
        pretrained(folder, sha256=sha256)
    weights.rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="there are 2 files"):
        pretrained(folder, sha256=sha256)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nobody/nothing", "nobody/nothing: not in the local cache, .*hf download nobody/nothing"),
        ("nothing", "nothing: not in the local cache, .*hf download nothing"),
        ("/no/such/folder", "no folder /no/such/folder"),
        ("no/such/folder/at/all", "no folder no/such/folder/at/all"),
    ],
)
def test_a_model_that_is_not_here_says_how_to_fetch_it(name, told, monkeypatch):
    """At once: no network is asked, on which a node without one would wait."""
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *where, **_: asked.append(where))
    monkeypatch.setattr("socket.socket.connect", lambda _, where: asked.append(where))
    with pytest.raises(AssetError, match=f"model.name: {told}") as refused:
        ModelFiles.locate(Model(name=name))
    assert not asked
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 69


def spoil(name, content):
    def write(folder):
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return write


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])


def pickle_only(folder):
    (folder / "model.safetensors").unlink()

    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(folder / "canary"),)

    torch.save({"x": Canary()}, folder / "pytorch_model.bin")


def no_vocabulary(folder):
    (folder / "tokenizer.json").unlink()


def other_weights(folder):
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("bert.", "other."): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def one_missing(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


REMOTE = b'{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}'
REFUSED = {
    "no config": (spoil("config.json", None), "cannot be read: "),
    "config cut": (spoil("config.json", b'{"model_type"'), "cannot be read: .* valid JSON"),
    "config a list": (spoil("config.json", b"[]"), "cannot be read: Unrecognized model"),
    "no model type": (spoil("config.json", b"{}"), "cannot be read: Unrecognized model"),
    "unknown type": (spoil("config.json", b'{"model_type": "mine"}'), "cannot be read: .* `mine`"),
    "wrong types": (
        spoil("config.json", b'{"model_type": "bert", "hidden_size": "x"}'),
        "cannot be read: Validation error for field 'hidden_size'",
    ),
    "remote code": (
        spoil("config.json", REMOTE),
        r"json asks for code .* \(auto_map\), which is never",
    ),
    "no head": (spoil("config.json", b'{"model_type": "vit"}'), "vit has no question-answering h"),
    "tokenizer cut": (spoil("tokenizer.json", b"{"), "cannot be read: "),
    "no vocabulary": (no_vocabulary, "has no vocabulary"),
    "weights cut": (cut, "cannot be read: "),
    "weights empty": (spoil("model.safetensors", b""), "cannot be read: "),
    "pickle only": (pickle_only, "pytorch_model.bin: asks for posix.mkdir, which is no part"),
    "other weights": (other_weights, "37 tensors are absent or of .* bert.embeddings.Layer"),
    "one tensor missing": (one_missing, "1 tensors are absent .* bert.encoder.layer.1.output.den"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_no_good_model_is_refused(copy, case):
    change, told = REFUSED[case]
    folder = copy()
    (folder / "mine.py").write_text(f"import os; os.mkdir({str(folder / 'canary')!r})")
    change(folder)
    with pytest.raises(DataError, match=told) as refused:
        pretrained(folder)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (folder / "canary").exists()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_attention_heads": 0}, r"\(num_attention_heads = 0\): ZeroDivisionError"),
        (
            {"num_attention_heads": 3},
            r"num_attention_heads = 3\): ValueError: The hidden",
        ),
        ({"hidden_size": 33}, r"\(hidden_size = 33, .*\): ValueError"),
        ({"hidden_act": "nothing"}, r'\(hidden_act = "nothing"\): KeyError'),
        ({"pad_token_id": 10**9}, r"\(pad_token_id = 1000000000\): AssertionError: Padding_idx"),
        ({"hidden_dropout_prob": -1}, "json: hidden_dropout_prob = -1 is no share from 0 to 1"),
        ({"attention_dropout": 1.5}, "json: attention_dropout = 1.5 is no share from 0 to 1"),
        ({"intermediate_size": -5}, r"intermediate_size = -5\): "),
        ({"chunk_size_feed_forward": 7}, "config.json: with chunk_size_feed_forward = 7 the model"),
        ({"num_hidden_layers": 10**7}, "json: num_hidden_layers = 10000000 is more than 10,000"),
        ({"text_config": {"num_experts": 1e8}}, "json: num_experts = 100000000.0 is more than"),
    ],
)
def test_a_configuration_of_which_no_model_can_be_is_refused_with_its_key(copy, values, told):
    folder = copy(**values)
    with pytest.raises(DataError, match=told) as refused:
        load_tokenizer(ModelFiles.locate(Model(name=str(folder))))
    assert str(refused.value).startswith(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"torchscript": True},
        {"num_labels": 7},
        {"shared_expert_intermediate_size": 20_480},  # of a size there may be any number
    ],
)
def test_what_a_configuration_asks_for_beside_the_logits_changes_nothing(copy, values):
    plain, odd = pretrained(copy()), pretrained(copy("roberta", **values))
    check_forward(odd.model, odd.tokenizer, "odd")
    ids = torch.tensor([[2, 7, 8, 3]])
    assert odd.model(input_ids=ids).start_logits.shape == (1, 4)
    assert plain.model(input_ids=ids).start_logits.shape == (1, 4)


def test_a_model_that_reads_no_window_is_refused_before_anything_is_computed(copy):
    folder = copy(type_vocab_size=0)
    weights = load_file(folder / "model.safetensors")
    weights["bert.embeddings.token_type_embeddings.weight"] = torch.zeros(0, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ours = pretrained(folder)
    with pytest.raises(DataError, match=r"the-name: the model reads no window .*: \w+Error: "):
        check_forward(ours.model, ours.tokenizer, "the-name")


def test_tokens_without_embeddings_are_refused(copy):
    folder = copy()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["oslo", "berg"])
    tokenizer.save_pretrained(folder)
    told = f"tokens up to id {rows + 1}, the model {rows} rows .*resize_token_embeddings.{rows + 2}"
    with pytest.raises(DataError, match=told):
        load_tokenizer(ModelFiles.locate(Model(name=str(folder))))
    # More rows than tokens are usual.
    spare = copy("roberta", vocab_size=1000)
    assert load_tokenizer(ModelFiles.locate(Model(name=str(spare))))


def test_a_folder_without_weights_says_which_are_read(copy):
    folder = copy()
    (folder / "model.safetensors").unlink()
    files = ModelFiles.locate(Model(name=str(folder)))
    told = r"bert: has no weights, which are files \*\.safetensors or pytorch_model\.bin"
    with pytest.raises(DataError, match=told):
        files.check_weights()
    with pytest.raises(DataError, match=told):
        load_finetuned(files, torch.device("cpu"), "x")


def test_a_decoders_weights_without_a_head_are_named_so(copy):
    folder = copy()
    config = AutoConfig.for_model(
        "llama", vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    told = (
        r"are of a llama without a question-answering head: .* transformer\.\*, .* called model\.\*"
    )
    with pytest.raises(DataError, match=told):
        load_pretrained(ModelFiles.locate(Model(name=str(folder))), 0)
    # As the message advises.
    model = AutoModelForQuestionAnswering.from_config(config)
    model.transformer = AutoModel.from_pretrained(folder)
    model.save_pretrained(folder)
    found = load_pretrained(ModelFiles.locate(Model(name=str(folder))), 0)
    wanted = model.transformer.state_dict()
    assert all(torch.equal(found.transformer.state_dict()[key], wanted[key]) for key in wanted)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 48, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
BART = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
BART |= {"encoder_ffn_dim": 64}


@pytest.mark.parametrize(
    ("family", "extra", "longest"),
    [
        ("gpt2", {}, 48),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, 48),
        ("bart", BART, 48),
        ("roformer", {}, 48),
        ("nystromformer", {}, 48),
        ("mpnet", {}, 46),
        ("xlm-roberta", {}, 46),
        ("deberta-v2", {"relative_attention": True, "position_biased_input": False}, None),
        ("t5", {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}, None),
    ],
)
def test_every_kind_of_position_table_tells_the_longest_window(family, extra, longest):
    config = AutoConfig.for_model(family, **SMALL, **extra)
    model = AutoModelForQuestionAnswering.from_config(config).eval()
    assert longest_input(model) == longest
    length = longest or 100
    ids = torch.full((1, length + 1), 7)
    with torch.no_grad():
        assert model(input_ids=ids[:, :length]).start_logits.shape == (1, length)
        if longest is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids)


@pytest.mark.parametrize(
    ("family", "extra", "longest"),
    [
        ("modernbert", {}, 48),
        ("modernbert", {"max_position_embeddings": 8192}, 8192),
        ("llama", {"num_key_value_heads": 2}, 48),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 96),
        (
            "qwen2",
            {
                "num_key_value_heads": 2,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
            128,
        ),
    ],
)
def test_positions_that_are_turned_end_where_they_were_trained(family, extra, longest):
    """Though the model computes beyond, and its tokenizer knows no end."""
    config = AutoConfig.for_model(family, **SMALL | extra)
    model = AutoModelForQuestionAnswering.from_config(config).eval()
    assert longest_input(model) == longest
    with torch.no_grad():
        assert model(input_ids=torch.full((1, 200), 7)).start_logits.shape == (1, 200)


def test_weights_of_another_width_are_refused(copy):
    with pytest.raises(DataError, match=r"of another shape, such as bert\.embeddings\.LayerNorm"):
        pretrained(copy(hidden_size=64))


# ---- dropout


@pytest.mark.parametrize("family", FAMILIES)
def test_the_jobs_dropout_reaches_every_dropout_of_the_model(tiny, family):
    def rates(model):
        attention = re.compile(r"attention(\.self)?\.(attention_)?dropout$|attn_dropout")
        found = {"attention": set(), "hidden": set()}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Dropout):
                found["attention" if attention.search(name) else "hidden"].add(module.p)
        return found

    plain = rates(pretrained(tiny(family)).model)
    both = rates(pretrained(tiny(family), dropout=0.25, attention_dropout=0.5).model)
    hidden = rates(pretrained(tiny(family), dropout=0.25).model)
    assert both == {"attention": {0.5}, "hidden": {0.25}}
    assert hidden == {"attention": plain["attention"], "hidden": {0.25}}
    none = pretrained(tiny(family), dropout=0.0, attention_dropout=0.0).model
    assert rates(none) == {"attention": {0.0}, "hidden": {0.0}}


def test_a_model_without_the_setting_refuses_it(tmp_path):
    AutoConfig.for_model("xlnet", d_model=32, n_layer=1, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(JobError, match="attention_dropout: xlnet has no such setting"):
        ModelFiles.locate(Model(name=str(tmp_path), attention_dropout=0.1))
    files = ModelFiles.locate(Model(name=str(tmp_path), dropout=0.3))
    assert empty_model(files.config, "x").config.dropout == 0.3


# ---- freezing


def frozen(model):
    prefix = f"{model.base_model_prefix}."
    return {n.removeprefix(prefix) for n, p in model.named_parameters() if not p.requires_grad}


def named(model, expression):
    prefix = f"{model.base_model_prefix}."
    names = {name.removeprefix(prefix) for name, _ in model.named_parameters()}
    return {name for name in names if re.search(expression, name)}


@pytest.mark.parametrize(
    ("family", "patterns", "expression"),
    [
        ("bert", ["embeddings"], r"^embeddings\."),
        ("bert", ["bert.embeddings"], r"^embeddings\."),
        ("bert", ["encoder.layer.0"], r"^encoder\.layer\.0\."),
        ("bert", ["encoder.layer.0-1"], r"^encoder\.layer\.[01]\."),
        ("bert", ["encoder.layer.1-7"], r"^encoder\.layer\.1\."),
        ("bert", ["encoder.layer.0-1.attention"], r"^encoder\.layer\.[01]\.attention\."),
        ("bert", ["*.LayerNorm.*", "qa_outputs"], r"LayerNorm|qa_outputs"),
        ("bert", ["*bias"], r"bias$"),
        ("bert", ["encoder.layer.0.output.dense.bias"], r"^encoder\.layer\.0\.output\.dense\.bias"),
        ("distilbert", ["embeddings", "transformer.layer.0"], r"^embeddings|layer\.0\."),
        ("roberta", ["roberta"], r"^(?!qa_outputs)"),
        ("electra", ["embeddings_project", "encoder"], r"^embeddings_project|^encoder"),
        ("albert", ["encoder.albert_layer_groups.0"], r"albert_layer_groups"),
        ("bert", [], r"$^"),
    ],
)
def test_freezing_stops_what_the_patterns_name(model_of, family, patterns, expression):
    model = model_of(family)
    freeze(model, patterns)
    assert frozen(model) == named(model, expression)
    assert bool(patterns) == bool(frozen(model))


@pytest.mark.parametrize(
    ("family", "there"),
    [
        ("bert", "embeddings, encoder.layer.0-1, qa_outputs"),
        ("distilbert", "embeddings, transformer.layer.0-1, qa_outputs"),
        ("roberta", "embeddings, encoder.layer.0-1, qa_outputs"),
        ("electra", "embeddings, embeddings_project, encoder.layer.0-1, qa_outputs"),
        ("albert", "embeddings, encoder, encoder.albert_layer_groups.0, qa_outputs"),
    ],
)
@pytest.mark.parametrize(
    "pattern", ["embedding", "encoder.layer.2-9", "layer.0", "encoder.layer.1-0"]
)
def test_a_pattern_without_a_match_lists_what_there_is(model_of, family, there, pattern):
    with pytest.raises(JobError) as refused:
        freeze(model_of(family), ["qa_outputs", pattern])
    assert str(refused.value) == (
        f"model.freeze: {pattern!r} matches no parameter; there are {there}"
    )
    assert refused.value.exit_code == 64


@pytest.mark.parametrize("patterns", [["*"], ["bert", "qa_outputs"]])
def test_freezing_everything_is_refused(model_of, patterns):
    with pytest.raises(JobError, match="nothing is left to train"):
        freeze(model_of("bert"), patterns)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameter_table_adds_up(model_of, family):
    model = model_of(family)
    freeze(model, ["embeddings", "*.0.*"])
    *rows, last = parameter_table(model)
    numbers = [(p.numel(), p.numel() * p.requires_grad) for p in model.parameters()]
    for n, key in enumerate(("parameters", "trained")):
        assert last[key] == sum(row[key] for row in rows) == sum(pair[n] for pair in numbers)
    assert rows[0]["part"] == "embeddings"
    assert rows[0]["trained"] == 0 < rows[0]["parameters"]
    assert (rows[-1]["part"], last["part"]) == ("qa_outputs", "all")


def test_layers_that_are_alike_share_a_row(model_of):
    model = model_of("bert")
    assert [row["part"] for row in parameter_table(model)] == [
        "embeddings",
        "encoder.layer.0-1",
        "qa_outputs",
        "all",
    ]
    freeze(model, ["encoder.layer.1"])
    assert [row["part"] for row in parameter_table(model)[1:3]] == [
        "encoder.layer.0",
        "encoder.layer.1",
    ]


# ---- the optimiser and precision


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_and_norms_do_not_decay_and_frozen_weights_are_left_out(model_of, family):
    model = model_of(family)
    freeze(model, ["embeddings"])
    decaying, rest = optimiser_groups(model, 0.1)
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for p in rest["params"]}
    trained = {names[id(p)] for p in (*decaying["params"], *rest["params"])}
    assert spared == {n for n in trained if re.search(r"bias$|layer_?norm", n, re.IGNORECASE)}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("embeddings." in name for name in trained)
    assert len(decaying["params"]) + len(rest["params"]) == len(trained)


def test_a_group_without_parameters_is_left_out(model_of):
    model = model_of("bert")
    freeze(model, ["*weight"])
    assert [group["weight_decay"] for group in optimiser_groups(model, 0.1)] == [0.0]


@pytest.mark.parametrize(
    ("features", "has"),
    [
        (["avx512_bf16", "avx2"], True),
        (["amx_bf16"], True),
        (["asimd", "bf16"], True),
        (["avx2"], False),
        ([], False),
    ],
)
def test_precision_is_bf16_where_the_device_has_it(monkeypatch, features, has):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    monkeypatch.setattr(runner.model.load, "cpu_features", lambda: frozenset(features))
    for device in (cpu, cuda):
        assert choose_precision("auto", device) == ("bf16" if has else "fp32")
        assert [choose_precision(p, device) for p in ("fp32", "bf16")] == ["fp32", "bf16"]
        emulated = device == cpu and not has
        assert ["250 times" in line for line in emulation_warning("bf16", device)] == [
            True
        ] * emulated
        assert not emulation_warning("fp32", device)
    assert choose_precision("fp16", cuda) == "fp16"
    with pytest.raises(JobError, match=r'model\.precision: "fp16" needs a GPU'):
        choose_precision("fp16", cpu)
