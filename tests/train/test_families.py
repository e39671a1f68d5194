"""The table of families in jobs/README.md: each row is a tiny random model that is trained,
exported and opened by a fresh process; its labels are its tokenizer's, its logits transformers'.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from runner.data.collate import collate
from runner.data.dataset import Example
from runner.data.loader import pad
from runner.data.windows import build_windows
from runner.job.schema import Model
from runner.model.forward import span_logits, takes_segment_ids
from runner.model.freeze import parameter_table
from runner.model.load import (
    ModelFiles,
    check_forward,
    load_outline,
    load_pretrained,
    load_tokenizer,
    padding_notes,
)
from runner.model.structure import longest_input
from runner.run.folder import RunDir
from tests.families import FAMILIES, POSITIONS, save_family
from tests.interruptions import DATA, FAULT_JOB

ROOT = Path(__file__).parents[2]
# Trained in the second tier: their code is that of a family that is trained in the first.
LATER = {"distilbert", "electra", "ernie", "xlm-roberta", "camembert", "bert", "squeezebert"}
LATER |= {"nystromformer", "convbert", "longformer", "mpnet", "rembert"}
# Families whose convolutions reach over the end of a window into what stands behind it.
SEES_PADDING = {"convbert", "nystromformer"}


def table() -> dict[str, dict[str, str]]:
    """The table in jobs/README.md: what it says of each family, by its columns."""
    text = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8")
    lines = text.partition("\n| family |")[2].splitlines()
    head = [cell.strip() for cell in f"| family |{lines[0]}".strip("|").split("|")]
    rows = {}
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        cells = dict(zip(head, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        for name in re.findall(r"`([\w-]+)`", cells["family"]):
            rows[name] = cells
    return rows


TABLE = table()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """`folder_of(family)`: a tiny model as it is published."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("families") / family
            save_family(family, made[family])
        return made[family]

    return make


def test_the_table_has_a_row_for_every_family_that_is_tested_and_no_other():
    assert TABLE.keys() == FAMILIES.keys()
    assert {row["CPU"] for row in TABLE.values()} <= {"packed", "padded"}
    assert all(row["GPU"] == row["CPU"] for row in TABLE.values())
    seen = {name for name, row in TABLE.items() if "sees padding" in row["remark"]}
    assert seen == SEES_PADDING


CONTEXT = (
    "Das Café in 東京 öffnete 1912 \u2013 das Schild 😀 hängt noch. It\u2019s “finely” drawn,\n"
    "naïve façades and all; the price is 1,250.50 € (then: 3 ¥)."
)
ANSWERS = (
    "Café",
    "東京",
    "öffnete 1912",
    "Schild 😀 hängt",
    "😀",
    "finely",
    "naïve façades",
    "1,250.50",
)


def expected_label(tokenizer, question, answer):
    """First and last token that overlap the answer, by the tokenizer's own offsets."""
    encoded = tokenizer(question, CONTEXT, return_offsets_mapping=True)
    spaces = {tokenizer.convert_tokens_to_ids(mark) for mark in "▁Ġ"} - {tokenizer.unk_token_id}
    start = CONTEXT.index(answer)
    inside = []
    for place, (low, high) in enumerate(encoded["offset_mapping"]):
        text = CONTEXT[low:high]
        low, high = low + len(text) - len(text.lstrip()), high - len(text) + len(text.rstrip())
        overlaps = low < high and low < start + len(answer) and high > start
        # A lone space in front of a word says that it is the word's first character.
        overlaps &= encoded["input_ids"][place] not in spaces
        if encoded.sequence_ids(0)[place] == 1 and overlaps:
            inside.append(place)
    return encoded["input_ids"], inside[0], inside[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_tokenizers_own_offsets(folder_of, family):
    folder = folder_of(family)
    ours = load_tokenizer(ModelFiles.locate(Model(name=str(folder))))
    ours.save_pretrained(folder.with_name(f"{family}-tokenizer"))
    (folder.with_name(f"{family}-tokenizer") / "config.json").write_bytes(
        (folder / "config.json").read_bytes()
    )
    plain = AutoTokenizer.from_pretrained(folder.with_name(f"{family}-tokenizer"))
    question = "Wann öffnete das Café?"
    asked = [
        Example(str(n), question, CONTEXT, (answer,), (CONTEXT.index(answer),))
        for n, answer in enumerate(ANSWERS)
    ]
    windows = build_windows(asked, ours, POSITIONS - 4, 8)
    assert len(windows) == len(ANSWERS)
    ids, unknown = windows.tokens_T[: windows.lengths_N[0]].tolist(), plain.unk_token_id
    assert ids.count(unknown) < len(ids) / 4  # a vocabulary of this text
    for n, answer in enumerate(ANSWERS):
        wanted = expected_label(plain, question, answer)
        inside = slice(windows.firsts_N1[n], windows.firsts_N1[n + 1])
        found = windows.tokens_T[inside].tolist(), windows.starts_N[n], windows.ends_N[n]
        assert found == wanted, answer


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_logits_are_those_of_each_window_alone(folder_of, family):
    """By plain transformers; where padding is seen, of windows that need none."""
    files = ModelFiles.locate(Model(name=str(folder_of(family))))
    tokenizer, model = load_tokenizer(files), load_pretrained(files, 0).eval()
    assert bool(padding_notes(model, tokenizer)) == (family in SEES_PADDING)
    assert not model.training
    plain = AutoModelForQuestionAnswering.from_pretrained(folder_of(family)).eval()
    asked = [Example(str(n), "Who wrote it?", "It was Ada. " * n, (), ()) for n in (2, 1, 7)]
    windows = build_windows(asked, tokenizer, 60, 8)
    assert len(set(windows.lengths_N.tolist())) > 1
    rows = np.arange(len(windows))
    if family in SEES_PADDING:
        rows = rows[:1]
    padded = pad(collate(windows, rows), tokenizer.pad_token_id or 0)
    with torch.no_grad():
        logits_T2 = span_logits(model, padded, segment_ids=takes_segment_ids(tokenizer))
    for row, (offset, length) in zip(rows, padded.segments_B2.tolist(), strict=True):
        inside = slice(windows.firsts_N1[row], windows.firsts_N1[row + 1])
        inputs = {"input_ids": torch.from_numpy(windows.tokens_T[inside].astype(np.int64))[None]}
        if takes_segment_ids(tokenizer):
            types = torch.from_numpy(windows.types_T[inside].astype(np.int64))
            inputs["token_type_ids"] = types[None]
        with torch.no_grad():
            output = plain(**inputs)
        wanted_L2 = torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)
        assert wanted_L2.std() > 0.1
        torch.testing.assert_close(
            logits_T2[offset : offset + length], wanted_L2, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_check_sees_of_every_family_what_the_run_does(folder_of, family):
    files = ModelFiles.locate(Model(name=str(folder_of(family))))
    outline, tokenizer = load_outline(files), load_tokenizer(files)
    check_forward(outline, tokenizer, family, training=True)
    model = load_pretrained(files, 0)
    assert parameter_table(outline) == parameter_table(model)
    assert longest_input(outline) == longest_input(model)
    ends = {"deberta-v2": None, "xlnet": None, "roberta": 159, "longformer": 159}
    ends |= dict.fromkeys(("xlm-roberta", "camembert", "mpnet"), 158)
    assert longest_input(model) == ends.get(family, POSITIONS)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name in LATER else ()) for name in FAMILIES],
)
@pytest.mark.xdist_group("verified")  # one process looks at all that they export
def test_every_family_trains_and_is_opened_by_a_fresh_process(zygote, folder_of, tmp_path, family):
    job = tmp_path / "job.toml"
    job.write_text(FAULT_JOB.format(data=DATA, model=folder_of(family)))
    run = RunDir(tmp_path / "run")
    options = ("--set", "train.epochs=1", "--set", "model.precision=fp32")
    codes, text = zygote.run(job, "--run-dir", run.path, *options, whole=True)
    assert codes == [0], text
    result = json.loads(run.result.read_text())
    assert result["export_difference"] < 1e-4
    choice = json.loads(run.provenance.read_text())["computing"]["batches"]
    assert choice["choice"] == TABLE[family]["CPU"], choice
    # Whoever has transformers alone gets the model and the tokenizer that were trained.
    trained = AutoModelForQuestionAnswering.from_pretrained(run.model)
    before = AutoModelForQuestionAnswering.from_pretrained(folder_of(family))
    moved = [
        not torch.equal(a, b)
        for a, b in zip(trained.parameters(), before.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2
