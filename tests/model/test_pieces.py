"""Tokenizers that are published as a sentencepiece model alone, as DeBERTa-v3's is."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import groupby

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import Tokenizer, normalizers
from transformers import AutoConfig, AutoTokenizer

from runner.data.dataset import Example
from runner.data.windows import build_windows
from runner.errors import DataError
from runner.job.schema import Model
from runner.model.load import ModelFiles, load_tokenizer
from runner.model.load.pieces import PLAIN, RARE
from tests.conftest import SENTENCES
from tests.families import FAMILIES, LINES, save_family, trained_pieces

PUBLISHED = {  # name of the sentencepiece model of each family that has one
    "deberta-v2": "spm.model",
    "xlm-roberta": "sentencepiece.bpe.model",
    "camembert": "sentencepiece.bpe.model",
    "albert": "spiece.model",
    "big_bird": "spiece.model",
    "rembert": "sentencepiece.model",
    "xlnet": "spiece.model",
}
# What is done to a text before sentencepiece sees it.
LOWER_CASE = {"albert"}
STRIPS_ACCENTS = {"albert", "xlnet"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """`published(family)`: the folder of a model with a sentencepiece model alone."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("pieces") / family
            save_family(family, made[family])
        return made[family]

    return make


def opened(folder):
    files = ModelFiles.locate(Model(name=str(folder)))
    return load_tokenizer(files), files.notes


def spelt(tokenizer, text):
    """Its pieces, unknown ones in a row as one."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [id for id, _ in groupby(ids)]


def by_sentencepiece(folder, family, tokenizer, text):
    """The same by sentencepiece itself, which knows no class of transformers'."""
    pieces = SentencePieceProcessor(model_file=str(folder / PUBLISHED[family]))
    found = []
    for id in pieces.encode(text.lower() if family in LOWER_CASE else text):
        piece = pieces.id_to_piece(id)
        unknown = pieces.is_unknown(id)
        found.append(tokenizer.unk_token_id if unknown else tokenizer.convert_tokens_to_ids(piece))
    return [id for id, _ in groupby(found)]


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_bare_model_is_cut_as_sentencepiece_cuts_it(published, family):
    folder = published(family)
    assert not (folder / "tokenizer.json").exists()
    tokenizer, notes = opened(folder)
    texts = [
        *PLAIN,
        "cafe 2,5 ok",
        "“fine” \u2013 it\u2019s",
        "東京 Москва",
        "x² ½ ﬁne \uff21\uff22\uff12",
        "😀 ok",
    ]
    if family in STRIPS_ACCENTS:  # and take characters apart
        texts.remove("x² ½ ﬁne \uff21\uff22\uff12")
    for text in texts:
        assert spelt(tokenizer, text) == by_sentencepiece(folder, family, tokenizer, text), text
    restored = [line for line in notes if "table of characters" in line]
    assert len(restored) == (family in ("deberta-v2", "big_bird"))


@pytest.mark.parametrize("family", PUBLISHED)
def test_plain_transformers_opens_the_export_as_it_was_trained(published, tmp_path, family):
    folder = published(family)
    tokenizer, _ = opened(folder)
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*PLAIN, *RARE):
        ours = tokenizer("Who?", text, return_offsets_mapping=True)
        assert again("Who?", text, return_offsets_mapping=True) == ours
    assert again.model_input_names == tokenizer.model_input_names
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.padding_side == tokenizer.padding_side
    if family in ("deberta-v2", "big_bird"):  # the general class, by a name of every version
        saved = json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
        assert saved == "PreTrainedTokenizerFast"
    once_more, notes = opened(shutil.copytree(tmp_path, tmp_path / "copy"))
    assert not [line for line in notes if line.startswith("tokenizer")]
    assert spelt(once_more, RARE[2]) == spelt(tokenizer, RARE[2])


def test_what_transformers_leaves_out_is_seen_in_the_answers(published):
    """Full-width letters and ligatures were letters to the model that learnt from them."""
    folder = published("deberta-v2")
    plain, (tokenizer, _) = AutoTokenizer.from_pretrained(folder), opened(folder)
    text = "the price is \uff21\uff22\uff12 ﬁne"
    assert plain.unk_token_id in plain(text)["input_ids"]
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    asked = Example("1", "what?", text, ("\uff21\uff22\uff12 ﬁne",), (13,))
    windows = build_windows([asked], tokenizer, 60, 8)
    start, end = int(windows.starts_N[0]), int(windows.ends_N[0])
    offsets = tokenizer("what?", text, return_offsets_mapping=True)["offset_mapping"]
    assert text[offsets[start][0] : offsets[end][1]].strip() == "\uff21\uff22\uff12 ﬁne"


def test_the_table_of_a_tokenizer_json_is_put_back_too(published, tmp_path):
    """As transformers 4 wrote them for tuned models of DeBERTa-v3."""
    folder = published("deberta-v2")
    ours, _ = opened(folder)
    shutil.copytree(folder, tmp_path / "tuned")
    old = AutoTokenizer.from_pretrained(folder)
    old.save_pretrained(tmp_path / "tuned")  # of the class DebertaV2Tokenizer
    (tmp_path / "tuned" / "spm.model").unlink()
    path = tmp_path / "tuned" / "tokenizer.json"
    found = json.loads(ours.backend_tokenizer.to_str())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": found["normalizer"]}))
    tokenizer, notes = opened(tmp_path / "tuned")
    assert ["table of characters" in line for line in notes] == [True]
    for text in (*PLAIN, *RARE):
        assert spelt(tokenizer, text) == spelt(ours, text)


def test_a_model_without_a_table_stays_as_transformers_makes_it(published, tmp_path):
    folder = shutil.copytree(published("deberta-v2"), tmp_path / "identity")
    layout = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    names = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]"}
    rule = {"unk_piece": "[UNK]", "normalization_rule_name": "identity"}
    (folder / "spm.model").write_bytes(trained_pieces(tuple((layout | names | rule).items())))
    tokenizer, notes = opened_without_model(folder)
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(folder))
    assert not [line for line in notes if "table" in line]


def opened_without_model(folder):
    """With as many rows of embeddings as are asked for."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2000}))
    return opened(folder)


@pytest.mark.parametrize("lines", [LINES, SENTENCES], ids=["of all letters", "of few"])
def test_a_tokenizer_that_is_not_its_models_is_refused(published, tmp_path, lines):
    """ALBERT's class takes piece 1 for the unknown one, whatever the model says."""
    folder = shutil.copytree(published("albert"), tmp_path / "other")
    layout = {"pad_id": 1, "unk_id": 0, "bos_id": -1, "eos_id": -1}
    special = {"control_symbols": "[CLS],[SEP],[MASK]"}
    content = trained_pieces(tuple((layout | special).items()), lines)
    (folder / "spiece.model").write_bytes(content)
    with pytest.raises(DataError) as refused:
        opened_without_model(folder)
    assert "spiece.model is not the one of that file: " in str(refused.value)
    assert "put the tokenizer.json of this model beside it" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"no pieces", b"\x0a\xff\xff\xff\xff\x0f", b"\x00" * 99])
def test_a_damaged_model_is_named(published, tmp_path, content):
    folder = shutil.copytree(published("deberta-v2"), tmp_path / "damaged")
    (folder / "spm.model").write_bytes(content)
    with pytest.raises(DataError, match=r"damaged: spm\.model is no sentencepiece model: ") as told:
        opened(folder)
    assert "\n" not in str(told.value)


def test_a_package_that_is_not_here_is_named(published, monkeypatch):
    folder = published("deberta-v2")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    told = r"spm\.model is read with a package that is not here: .*sentencepiece.*; run: pip"
    with pytest.raises(DataError, match=told):
        opened(folder)


def test_every_family_with_pieces_is_held_against_them():
    kinds = {name: family.tokenizer.__qualname__ for name, family in FAMILIES.items()}
    assert PUBLISHED.keys() == {name for name, kind in kinds.items() if kind.startswith("pieces")}


def test_a_tokenizer_json_without_a_table_is_left_alone(published, tmp_path):
    folder = shutil.copytree(published("deberta-v2"), tmp_path / "own")
    tokenizer, _ = opened(folder)
    tokenizer.save_pretrained(folder)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.normalizer = normalizers.Lowercase()
    raw.save(str(folder / "tokenizer.json"))
    changed, notes = opened(folder)
    assert notes == []
    assert changed.backend_tokenizer.normalizer.normalize_str("ﬁ A") == "ﬁ a"


@pytest.mark.parametrize("table", ["AAAA", 3, None])
def test_a_damaged_table_is_refused_in_a_line(published, tmp_path, table):
    """Also where the tokenizer's library gives up in Rust."""
    folder = shutil.copytree(published("deberta-v2"), tmp_path / "table")
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    path = folder / "tokenizer.json"
    normaliser = {"type": "Precompiled"} | (
        {} if table is None else {"precompiled_charsmap": table}
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": normaliser}))
    with pytest.raises(DataError, match=r"table: cannot be read: .*recompiled") as refused:
        opened(folder)
    assert "\n" not in str(refused.value)


def test_a_damaged_table_of_a_sentencepiece_model_is_refused(published, tmp_path):
    folder = shutil.copytree(published("deberta-v2"), tmp_path / "table")
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "spm.model").read_bytes())
    proto.normalizer_spec.precompiled_charsmap = b"\xff" * 40
    (folder / "spm.model").write_bytes(proto.SerializeToString())
    with pytest.raises(DataError, match="the table of characters of its tokenizer: cannot be read"):
        opened(folder)


@pytest.mark.slow  # it has a million characters
def test_a_tokenizer_in_python_is_refused_where_its_characters_are_asked_for(tmp_path):
    config = AutoConfig.for_model(
        "canine", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    config.save_pretrained(tmp_path)
    tokenizer, notes = opened(tmp_path)
    assert notes == []
    with pytest.raises(DataError, match="has no fast tokenizer; character offsets need one"):
        build_windows([Example("1", "what?", "a b", (), ())], tokenizer, 60, 8)
