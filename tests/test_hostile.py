"""Hostile names, files and folders run nothing, reach nothing that is not theirs, and are refused
in a line within bounds of memory and time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.errors import DataError, StorageError
from runner.model.config import refuse_remote_code
from runner.utils.files import open_own
from runner.utils.tables import append_row
from tests.forked import forked

WORKER = Path(__file__).with_name("workers") / "hostile_inputs.py"
GROUP = pytest.mark.xdist_group("hostile")


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path], zygote
) -> list[dict[str, object]]:
    *_, last = forked(zygote, WORKER, tmp_path_factory.mktemp("hostile"), tiny("bert"))
    return json.loads(last)


@GROUP
def test_there_are_as_many_as_promised(outcomes):
    assert len(outcomes) >= 80


@GROUP
def test_nothing_runs_and_nothing_else_is_reached(outcomes):
    assert not [found["case"] for found in outcomes if found["canary"] or not found["victim"]]


@GROUP
def test_each_is_refused_with_its_code(outcomes):
    codes = {"job": {64}, "run": {65, 74}, "model:": {65}, "checkpoint:": {65}, "data:": {65}}
    wrong = [
        (found["case"], found["code"], found["text"])
        for found in outcomes
        if found["code"] not in codes[str(found["case"]).split()[0]]
    ]
    assert not wrong


@GROUP
def test_each_is_refused_in_one_line_that_steers_no_terminal(outcomes):
    """As the terminal gets it; a job file has a line for each of its problems, and bad rows have a
    second one, that names the first of them."""
    for found in outcomes:
        rows = str(found["case"]).startswith("data: the id of a bad row")
        assert found["lines"] == 1 + rows or found["code"] == 64, found
        assert found["printable"], found
        assert found["text"], found


@GROUP
def test_each_is_refused_within_bounds(outcomes):
    """Of memory; a case that takes 10 seconds of a processor is killed and has no code."""
    assert not [found["case"] for found in outcomes if found["bytes"] > 2**30]


# ---- one by one


@pytest.mark.parametrize(
    ("file", "table"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil.Evil"}}),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "evil.Evil"}}}),
        ("config.json", {"a": [{"_attn_implementation_internal": "evil/kernel"}]}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}),
        ("adapter_config.json", {"trust_remote_code": True}),
        ("generation_config.json", {"custom_pipelines": {"x": {"impl": "evil.Evil"}}}),
    ],
)
def test_a_model_that_asks_for_code_is_refused_by_file_and_key(tmp_path, file, table):
    (tmp_path / file).write_text(json.dumps(table))
    with pytest.raises(
        DataError, match=rf"^the-model: {file} asks for code .*, which is never run"
    ):
        refuse_remote_code("the-model", tmp_path)


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"auto_map": None, "trust_remote_code": False},
        {"_attn_implementation": "sdpa", "attn_implementation": "flash_attention_2"},
        ["auto_map"],
    ],
)
def test_an_ordinary_model_is_let_through(tmp_path, table):
    (tmp_path / "config.json").write_text(json.dumps(table))
    (tmp_path / "tokenizer_config.json").write_text("no JSON: its reader says so")
    refuse_remote_code("the-model", tmp_path)


def test_tables_and_logs_never_follow_a_link(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "train.csv"
    victim.write_text("precious\n")
    link.symlink_to(victim)
    with pytest.raises(StorageError, match=r"train\.csv"):
        append_row(link, {"step": 1})
    with pytest.raises(OSError, match="symbolic links"):
        open_own(link, "a")
    assert victim.read_text() == "precious\n"
