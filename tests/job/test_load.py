"""Job files, right and wrong: every sentence, every line number, and never a traceback."""

from __future__ import annotations

import os
import re
import string
from pathlib import Path

import pytest
import tomli
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from runner.errors import DataError, JobError, StorageError
from runner.job.load import (
    MAX_BYTES,
    dump_job,
    first_difference,
    load_job,
    recorded_job,
)
from runner.job.messages import _ELSEWHERE, WANDB_LONGEST, WANDB_REFUSES, _flat, schema_problems
from runner.job.schema import METRICS, Job
from runner.utils.text import one_of

GOLDEN = Path(__file__).parents[1] / "golden"
JOB = """\
name = "n"

[data]
train = "o/n"
validation = "o/n"

[model]
name = "o/n"

[train]
epochs = 1
batch_size = 8
learning_rate = 1e-4
"""
LAST = JOB.count("\n")
PROBLEM = re.compile(r"job\.toml(:[1-9]\d*)?: \S.*")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Run each test in an empty folder, so that messages begin with `job.toml`."""
    monkeypatch.chdir(tmp_path)


def load(text: str | bytes = JOB, *overrides: str) -> Job:
    Path("job.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_job("job.toml", overrides)


def problems(text: str | bytes = JOB, *overrides: str) -> list[str]:
    """Load what is wrong, and check that each problem is one line of the promised form."""
    with pytest.raises(JobError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 64
    assert str(caught.value).split("\n") == list(caught.value.problems)
    for line in caught.value.problems:
        assert line.isprintable()
        assert PROBLEM.fullmatch(line) or line.startswith("--set")
    return list(caught.value.problems)


def put(assignment: str) -> tuple[str, int]:
    """Write `section.key = value` into the job; return its text and the line of the key."""
    path, value = assignment.split(" = ", 1)
    *section, key = path.split(".")
    lines, header = JOB.split("\n"), f"[{'.'.join(section)}]"
    start = 0
    if section and header not in lines:
        lines[-1:] = ["", header, ""]
    if section:
        start = lines.index(header) + 1
    end = lines.index("", start)
    old = [n for n in range(start, end) if lines[n].startswith(f"{key} = ")]
    at = old[0] if old else end
    lines[at : at + len(old)] = [f"{key} = {value}"]
    return "\n".join(lines), at + 1


def drop(*keys: str) -> str:
    """The job without some of its lines."""
    return "\n".join(line for line in JOB.split("\n") if line.split(" = ")[0] not in keys)


# ---- one very wrong job, and the right ones


def test_every_problem_of_a_very_wrong_job(tmp_path):
    text = (GOLDEN / "problems.toml").read_text(encoding="utf-8")
    found = problems(text, "train.epochs=many", "train.nmae=1", "seed", "data.validation.x=1")
    assert "\n".join(found) + "\n" == (GOLDEN / "problems.txt").read_text(encoding="utf-8")


def test_a_job_without_problems():
    job = load()
    assert (job.name, job.data.train, job.train.learning_rate) == ("n", "o/n", 1e-4)


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + JOB.encode(),
        JOB.replace("\n", "\r\n"),
        JOB.rstrip("\n"),
        JOB.replace("[data]", "# a comment: \u00e4 \u4e2d \U0001f600\n[data]"),
        JOB.replace("[model]\nname = ", "[model]\n'name' = "),
        JOB.replace("[train]\n", "[ train ]\n") + "\n\n\n",
    ],
    ids=["BOM", "CRLF", "no last newline", "unicode", "quoted key", "spaces"],
)
def test_spellings_of_the_same_job(text):
    assert load(text) == load()


@pytest.mark.parametrize("text", [JOB.replace("\n", "\r\n"), "\ufeff" + JOB])
def test_lines_count_the_same_in_every_spelling(text):
    assert problems(text.replace("epochs = 1", "epochs = 0")) == [
        "job.toml:11: train.epochs: must be at least 1, found 0"
    ]


@pytest.mark.parametrize("text", ["key = [1,\n", "key = [1,\r\n\r\n", 'key = """a'])
def test_what_is_not_closed_is_told_at_the_end(text):
    (found,) = problems(JOB.replace("\n", "\r\n") + text)
    assert re.fullmatch(r"job.toml:14: not valid TOML: .* \(the file ends here\)", found)


# ---- malformed files, as the reliability table counts them

SYNTAX = [
    "key",
    "key =",
    "key = = 1",
    "key = 1 2",
    "= 1",
    "[section",
    "[section]]",
    "[[section]",
    "[]",
    "[a..b]",
    "a. = 1",
    'key = "unclosed',
    "key = 'unclosed",
    'key = """unclosed',
    "key = [1, 2",
    "key = {a = 1",
    "key = tru",
    "key = None",
    "key = 1.",
    "key = 0777",
    'key = "\\q"',
    "key = 2024-13-01",
    "key: 1",
    "<<<<<<< HEAD",
]
UNKNOWN = [
    ("nmae = 1", "did you mean name?"),
    ("Seed = 1", "did you mean seed?"),
    ("probes = 1", "did you mean probe?"),
    ("zzz = 1", f"allowed here: {one_of(tuple(Job.model_fields))}"),
    ("stage = 1", "it belongs to [zero]"),
    ("batch_size = 8", "it belongs to [train] or [score]"),
    ("data.trian = 1", "did you mean train?"),
    ("data.max_seq_length = 1", "did you mean max_length?"),
    ("data.doc_stride = 1", "did you mean stride?"),
    ("data.epochs = 1", "it belongs to [train]"),
    ("data.seed = 1", "it belongs to the top of the file, before the first [section]"),
    ("data.question = 1", "it belongs to [data.columns] or [[probe]]"),
    ("data.columns.contxt = 'c'", "did you mean context?"),
    ("model.freez = []", "did you mean freeze?"),
    ("model.zero = 2", "it is a section of its own, [zero]"),
    ("model.probe = 2", "it is a section of its own, [[probe]]"),
    ("train.learning-rate = 1", "did you mean learning_rate?"),
    ("train.warmup_ratio = 1", "did you mean warmup?"),
    ("train.max_length = 1", "it belongs to [data]"),
    ("train.columns = 1", "it is a section of its own, [data.columns]"),
    ("zero.stag = 1", "did you mean stage?"),
    ("zero.offload = 1", "allowed here: stage, optimizer or deepspeed"),
    ("stop.f1 = 1", "it belongs to [expect]"),
    ("expect.f2 = 1", "did you mean f1?"),
]
TYPES = [
    ("name = 5", "expected a string in quotes, found 5"),
    ('seed = "42"', 'expected a whole number, found "42"'),
    ("seed = 1.5", "expected a whole number, found 1.5"),
    ("seed = true", "expected a whole number, found true"),
    ("seed = 2024-01-01", "expected a whole number, found 2024-01-01"),
    ("data.tuning = ['o/n']", "expected a string in quotes, found a list"),
    ("data.max_length = 384.0", "expected a whole number, found 384.0"),
    ("data.sample = '10%'", 'expected a whole number, found "10%"'),
    ("data.unanswerable = 'yes'", 'expected true or false, found "yes"'),
    ("data.unanswerable = 1", "expected true or false, found 1"),
    ("data.on_bad_row = false", "false is not one of fail, drop"),
    ("data.columns = 'q'", 'expected a table, found "q"'),
    ("model.name = {hub = 'o/n'}", "expected a string in quotes, found a table"),
    ("model.freeze = 'embeddings'", 'expected a list in brackets, found "embeddings"'),
    ("model.precision = 16", "16 is not one of auto, bf16, fp16, fp32"),
    ("model.dropout = '0.1'", 'expected a number, found "0.1"'),
    ("train.epochs = '3'", 'expected a whole number, found "3"'),
    ("train.learning_rate = '3e-4'", 'expected a number, found "3e-4"'),
    ("train.learning_rate = false", "expected a number, found false"),
    ("train.adam_betas = 0.9", "expected a list in brackets, found 0.9"),
    ("train.deterministic = 0", "expected true or false, found 0"),
    ("zero.stage = true", "expected a whole number, found true"),
    ("zero.deepspeed = []", "expected a table, found a list"),
    ("zero = 2", "expected a table, found 2"),
    ("probe = {question = 'q', context = 'c'}", "is a list of tables; write [[probe]] for each"),
]
RANGES = [
    ("seed = -1", "must be at least 0, found -1"),
    ("seed = 4294967296", "must be less than 4294967296, found 4294967296"),
    ("seed = 0x" + "f" * 100, "must be less than 4294967296, found a number of 400 bits"),
    ("data.max_length = 15", "must be at least 16, found 15"),
    ("data.max_length = 8193", "must be at most 8192, found 8193"),
    ("data.stride = -1", "must be at least 0, found -1"),
    ("data.sample = 0", "must be at least 1, found 0"),
    ("data.on_bad_row = 'skip'", '"skip" is not one of fail, drop'),
    ("model.dropout = 1.0", "must be less than 1, found 1.0"),
    ("train.batch_size = 1000000001", "must be at most 1000000000, found 1000000001"),
    ("train.learning_rate = 0", "must be more than 0, found 0"),
    ("train.learning_rate = 2e0", "must be at most 1, found 2.0"),
    ("train.learning_rate = nan", "expected a finite number, found nan"),
    ("train.max_grad_norm = inf", "expected a finite number, found inf"),
    ("train.adam_betas = [0.9, 0.99, 1]", "takes 2 values, found 3"),
    ("zero.stage = 4", "must be at most 3, found 4"),
    ("score.n_best = 1001", "must be at most 1000, found 1001"),
    ("expect.f1 = 100.5", "must be at most 100, found 100.5"),
    ("stop.metric = 'F1'", '"F1" is not one of f1, exact_match, span_accuracy, start_accuracy'),
    ("model.sha256 = 'abc'", '"abc" does not match ^[0-9a-f]{64}$ (expected sha256'),
    ("name = '../n'", '"../n" does not match ^[A-Za-z0-9]'),
]
MISSING = [
    (drop("name"), "job.toml:6: model.name: is missing (hub id, folder"),  # both of this name
    (JOB.replace('name = "n"', "", 1), "job.toml: name: is missing (names the folder of the job"),
    (drop("train"), "job.toml:3: data.train: is missing (training questions"),
    (drop("validation"), "job.toml:3: data.validation: is missing (questions scored after"),
    (drop("epochs"), "job.toml:10: train.epochs: is missing (passes over"),
    (drop("batch_size"), "job.toml:10: train.batch_size: is missing (windows per"),
    (drop("learning_rate"), "job.toml:10: train.learning_rate: is missing (peak learning rate"),
    (JOB.partition("[data]")[0] + JOB[JOB.index("[model]") :], "job.toml: data: is missing; a job"),
    (JOB.partition("[train]")[0], "job.toml: train: is missing; a job needs a section [train]"),
    ("", "job.toml: model: is missing; a job needs a section [model]"),
    ("# only a comment\n", "job.toml: data: is missing; a job needs a section [data]"),
    (put("name = ''")[0], 'job.toml:1: name: expected some text, found ""'),
    (put("data.train = ' '")[0], 'job.toml:4: data.train: expected some text, found " "'),
    (put("data.train = 'no.json'")[0], 'job.toml:4: data.train: no file "no.json" beside the job'),
    (put("data.validation = 'no.csv[:9]'")[0], 'job.toml:5: data.validation: no file "no.csv"'),
    (put("data.train = '.hidden.json/x.csv'")[0], "job.toml:4: data.train: no file"),
    (put("model.name = './no'")[0], 'job.toml:8: model.name: no folder "./no" beside the job file'),
    (put("model.name = 'a/b/c'")[0], 'job.toml:8: model.name: no folder "a/b/c" beside the job'),
    (
        put("model.name = 'package:no_such_one/m'")[0],
        'no folder "m" in an installed package no_such_one; pip install --no-deps no-such-one',
    ),
    (JOB + "[[probe]]\nquestion = 'q'\n", "job.toml:14: probe.1.context: is missing (the text"),
    (JOB + "[[probe]]\n" * 2, "job.toml:15: probe.2.question: is missing (the question)"),
    (put("train.adam_betas = [0.9]")[0], "job.toml:14: train.adam_betas.2: is missing"),
]
CONTRADICTORY = [
    ("data.stride = 384", "3: data: stride 384 must be smaller than max_length 384"),
    ("data.stride = 9999", "3: data: stride 9999 must be smaller than max_length 384"),
    (
        "data.max_length = 128",
        "3: data: stride 128 (which is unset) must be smaller than max_length 128",
    ),
    ("train.micro_batch_size = 3", "micro_batch_size 3; micro_batch_size may be 1, 2, 4 or 8"),
    ("train.micro_batch_size = 16", "batch_size 8 is not a multiple of micro_batch_size 16"),
    ("data.train = 'o/n[:0]'", "4: data.train: 'o/n[:0]' ends in a slice that never holds"),
    ("data.train = 'o/n[200:100]'", "ends in a slice that never holds a question"),
    ("data.validation = 'o/n[20%:10%]'", "ends in a slice that never holds a question"),
    ("data.train = 'o/n[-1:-2]'", "ends in a slice that never holds a question"),
    ("data.train = 'a.txt'", "4: data.train: 'a.txt' is neither a file of a kind"),
    ("data.train = 'o/n[::2]'", "cannot be read; write [:1000], [100:200] or [10%:20%]"),
    ("model.name = 'package:'", '"package:" names no package; write package:NAME/SUBFOLDER'),
    ("model.name = 'package:a.b/c'", '"package:a.b/c" names no package'),
    ("expect.tolerance = 0.1", "15: expect: expects nothing; name at least one of exact_match"),
    ("zero.deepspeed = {since = 2024-01-01}", "16: zero.deepspeed: DeepSpeed reads JSON"),
    ("zero.deepspeed = {a = [{b = nan}]}", "16: zero.deepspeed: DeepSpeed reads JSON"),
    ("zero.deepspeed" + ".a" * 300 + " = 1", "zero.deepspeed: DeepSpeed reads JSON"),
    ("data.columns = 1", "expected a table, found 1"),
]
GARBLED = [
    (JOB.replace("o/n", "\u00f6/n").encode("latin-1"), "4: byte 0xf6 is not UTF-8; save the file"),
    (JOB.encode("utf-16"), "1: byte 0xff is not UTF-8; save the file as UTF-8"),
    (b"\xfe\xff" + JOB.encode("utf-16-be"), "1: byte 0xfe is not UTF-8"),
    (JOB.encode("utf-16-le"), "1: not valid TOML"),
    (JOB.encode() + b"# \xed\xa0\x80", "14: byte 0xed is not UTF-8"),
    (JOB.encode() + b"# \xc0\x80", "14: byte 0xc0 is not UTF-8"),
    (JOB.encode() + "# \u4e2d".encode()[:-1], "14: byte 0xe4 is not UTF-8"),
    (b"\x1f\x8b\x08\x00" + bytes(range(256)), "1: byte 0x8b is not UTF-8"),
    (("\ufeff\ufeff" + JOB).encode(), "1: not valid TOML"),
    ((JOB + "\ufeffkey = 1").encode(), "14: not valid TOML"),
    (JOB.encode() + b"\x00", "14: not valid TOML"),
    (JOB.encode() + b"# \x07", "14: not valid TOML"),
    (JOB.replace("\n", "\r").encode(), "1: not valid TOML"),
    (JOB.replace("epochs", "\u0435pochs").encode(), "11: not valid TOML"),
    (JOB.replace('"n"', "\u201cn\u201d").encode(), "1: not valid TOML"),
    (b'{"name": "n"}', "1: not valid TOML"),
    (b"name: n\n", "1: not valid TOML"),
    ((JOB + "epochs = 2").encode(), "14: not valid TOML"),
    ((JOB + "'epochs' = 2").encode(), "14: not valid TOML"),
    ((JOB + "[train]").encode(), "14: not valid TOML"),
    ((JOB + "[[train]]").encode(), "14: not valid TOML"),
    ((JOB + "[train.epochs]").encode(), "14: not valid TOML"),
    ((JOB + "epochs.more = 2").encode(), "14: not valid TOML"),
    ((JOB + "[[probe]]\n[probe]").encode(), "15: not valid TOML"),
    (JOB.encode() + b"#" * MAX_BYTES, f" more than {MAX_BYTES} bytes are no job file"),
]


@pytest.mark.parametrize("text", SYNTAX)
def test_syntax(text):
    (line,) = problems(f"{JOB}{text}\n")
    assert line.startswith(f"job.toml:{LAST + 1}: not valid TOML: ")


@pytest.mark.parametrize(("assignment", "hint"), UNKNOWN, ids=[a for a, _ in UNKNOWN])
def test_unknown_keys(assignment, hint):
    text, line = put(assignment)
    key = assignment.split(" = ")[0]
    assert problems(text) == [f"job.toml:{line}: {key}: unknown key; {hint}"]


@pytest.mark.parametrize(
    ("assignment", "problem"), TYPES + RANGES, ids=[a[:40] for a, _ in TYPES + RANGES]
)
def test_types_and_ranges(assignment, problem):
    text, line = put(assignment)
    (found,) = problems(text)
    assert found.startswith(f"job.toml:{line}: {assignment.split(' = ')[0]}: {problem}")


@pytest.mark.parametrize(("text", "problem"), MISSING, ids=[p for _, p in MISSING])
def test_missing(text, problem):
    assert any(problem in line for line in problems(text))


@pytest.mark.parametrize(
    ("assignment", "problem"), CONTRADICTORY, ids=[a[:40] for a, _ in CONTRADICTORY]
)
def test_contradictory(assignment, problem):
    (found,) = problems(put(assignment)[0])
    assert problem in found


@pytest.mark.parametrize(("raw", "problem"), GARBLED, ids=range(len(GARBLED)))
def test_encoding_and_duplicates(raw, problem):
    (found,) = problems(raw)
    assert found.startswith(f"job.toml:{problem}")


def test_as_many_malformed_files_as_promised():
    found = [len(s) for s in (SYNTAX, UNKNOWN, TYPES, RANGES, MISSING, CONTRADICTORY, GARBLED)]
    promised = [20, 20, 20, 15, 15, 15, 15]
    assert all(have >= need for have, need in zip(found, promised, strict=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("key = " + "[" * 500 + "]" * 500, "nested too deep"),
        ("key = " + "{a = " * 500 + "1" + "}" * 500, "nested too deep"),
        ("key" + ".a" * 5000 + " = 1", "nested too deep"),
        ("[key" + ".a" * 5000 + "]", "nested too deep"),
        ("key = " + "9" * 5000, "more digits than can be read"),
        ("key = " + "[" * 90_000, "nested too deep"),
    ],
)
def test_what_no_parser_can_follow(text, words):
    (found,) = problems(JOB + text)
    assert words in found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2000),
            st.integers(0, 12),
            st.binary(max_size=4)
            | st.sampled_from([b"\n", b"[", b"]", b"=", b'"', b"'''", b"\r\n", b"[[probe]]\n"]),
        ),
        min_size=1,
        max_size=4,
    )
)
@example([(0, 0, b"\xef\xbb\xbf"), (3, 0, b"\xef\xbb\xbf")])
def test_a_mutated_file_is_read_or_refused_in_lines(edits):
    raw = bytearray((GOLDEN / "problems.toml").read_bytes()[-900:] + JOB.encode())
    for start, length, new in edits:
        start %= len(raw) + 1
        raw[start : start + length] = new
    try:
        load(bytes(raw))
    except JobError as error:
        for line in error.problems:
            assert PROBLEM.fullmatch(line)
            assert line.isprintable()


# ---- suggestions


def sections(section: type[BaseModel] = Job, path: tuple[str, ...] = ()):
    """Each section of the schema with its path, found by its own walk through the annotations."""
    yield path, section
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind, (*path, name))


SECTIONS = dict(sections())
KEYS = [(path, key) for path, section in SECTIONS.items() for key in section.model_fields]


def one_edit(word: str) -> set[str]:
    """All words one insertion, deletion, substitution or swap away."""
    letters = string.ascii_lowercase + "_"
    cuts = [(word[:n], word[n:]) for n in range(len(word) + 1)]
    edited = {a + c + b for a, b in cuts for c in letters}
    edited |= {a + c + b[1:] for a, b in cuts if b for c in ("", *letters)}
    edited |= {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    return edited - {word, ""}


def hints(path: tuple[str, ...], keys: set[str]) -> dict[str, str]:
    """What is said about unknown keys of one section."""
    inner: dict = dict.fromkeys(keys, 1)
    for name in reversed(path):
        inner = {name: [inner] if name == "probe" else inner}
    with pytest.raises(ValidationError) as caught:
        Job.model_validate(inner)
    found = {str(loc[-1]): text for loc, text in schema_problems(caught.value) if loc}
    return {key: found[key] for key in keys}


@pytest.mark.parametrize("share", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_typo_is_understood(share):
    """A fifth of all there are, or all of them."""
    right = total = 0
    for path, key in KEYS:
        typos = set(sorted(one_edit(key) - set(SECTIONS[path].model_fields))[::share])
        understood = sum(
            hint == f"unknown key; did you mean {key}?" for hint in hints(path, typos).values()
        )
        assert understood >= 0.9 * len(typos), f"{path} {key}"
        right += understood
        total += len(typos)
    assert total > 25_000 / share
    assert right >= 0.95 * total


def test_a_key_in_the_wrong_section_is_sent_to_its_own():
    for path, section in SECTIONS.items():
        strangers = {key for _, key in KEYS} - set(section.model_fields)
        for key, hint in hints(path, strangers).items():
            homes = [home for home, other in SECTIONS.items() if key in other.model_fields]
            tables = {*SECTIONS, ("zero", "deepspeed")}
            keys = [home for home in homes if (*home, key) not in tables]
            expected = [f"{'.'.join(home)}]" if home else "the top of the file" for home in keys]
            assert all(words in hint for words in expected or [f"{key}]"]), (path, key, hint)
            assert "did you mean" not in hint


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("epochs", "epoch", "11: train.epoch: unknown key; did you mean epochs?"),
        ("[train]", "[trian]", "10: trian: unknown key; did you mean train?"),
        ("[data]\n", "[data]\nepochs = 1\n", "4: data.epochs: unknown key; it belongs to [train]"),
    ],
)
def test_what_a_key_was_meant_to_be_is_not_missing_too(old, new, expected):
    text = JOB.replace(old, new, 1)
    text = text if old in ("epochs", "[train]") else text.replace("epochs = 1\nb", "b")
    assert problems(text) == [f"job.toml:{expected}"]


# ---- [zero.deepspeed]

FOREIGN = [
    ("optimizer = {type = 'SGD', params = {lr = 0.1}}", "optimizer", "set train.learning_rate"),
    ("scheduler = {type = 'WarmupLR'}", "scheduler", "set train.schedule and train.warmup"),
    ("train_batch_size = 7", "train_batch_size", "set train.batch_size"),
    (
        "train_micro_batch_size_per_gpu = 'auto'",
        "train_micro_batch_size_per_gpu",
        "set train.micro_batch_size",
    ),
    ("gradient_clipping = 'text'", "gradient_clipping", "set train.max_grad_norm"),
    ("fp16 = {enabled = true}", "fp16.enabled", "set model.precision"),
    ("zero_optimization = {stage = 3}", "zero_optimization.stage", "set zero.stage"),
    ("wandb = {enabled = true}", "wandb", "set track.tools"),
    ("csv_monitor = {enabled = true, output_path = '/'}", "csv_monitor", "writes train.csv"),
    ("nebula = {enabled = true}", "nebula", "set train.checkpoint_minutes"),
    (
        "flops_profiler = {enabled = true, output_file = '/etc/passwd'}",
        "flops_profiler.output_file",
        "would overwrite",
    ),
    ("eigenvalue = {enabled = true}", "eigenvalue", "unknown key; allowed here: bf16, comm"),
    ("zero_optimization = {overlap_com = true}", "zero_optimization.overlap_com", "did you mean"),
    ("zero_optimization = 3", "zero_optimization", "expected a table, found 3"),
    (
        "zero_optimization = {reduce_bucket_size = 'auto'}",
        "zero_optimization.reduce_bucket_size",
        "leave the key out",
    ),
    (
        "zero_optimization = {offload_optimizer = {device = 'nvme'}}",
        "zero_optimization.offload_optimizer.device",
        '"nvme" is not one of cpu, none',
    ),
    (
        "zero_optimization = {offload_optimizer = {device = 'cpu'}}",
        "zero_optimization.offload_optimizer",
        "only with zero.deepspeed.zero_force_ds_cpu_optimizer = false",
    ),
    ("zero_force_ds_cpu_optimizer = false", "zero_force_ds_cpu_optimizer", "only with"),
    ("bf16 = {check_grad_overflow = true}", "bf16", 'only with model.precision = "bf16"'),
    (
        "zero_optimization = {stage3_prefetch_bucket_size = 1}",
        "zero_optimization.stage3_prefetch_bucket_size",
        "only with zero.stage of at least 3, which is 2",
    ),
]


@pytest.mark.parametrize(("line", "key", "words"), FOREIGN)
def test_no_key_of_deepspeed_is_without_effect_or_writes_or_sends(line, key, words):
    (told,) = problems(f"{JOB}\n[zero.deepspeed]\n{line}\n")
    assert told.startswith(f"job.toml:16: zero.deepspeed.{key}: ")
    assert words in told


@pytest.mark.parametrize(
    "lines",
    [
        "zero_optimization = {reduce_bucket_size = 5e8, overlap_comm = true}",
        "wall_clock_breakdown = true\nflops_profiler = {enabled = true}",
        "zero_force_ds_cpu_optimizer = false\n"
        "zero_optimization.offload_optimizer = {device = 'cpu', pin_memory = true}",
    ],
)
def test_what_has_an_effect_is_handed_on_to_deepspeed(lines):
    found = load(f"{JOB}\n[zero.deepspeed]\n{lines}\n").zero.deepspeed
    assert found == tomli.loads(lines)


def test_layers_that_zero_3_shares_out_are_not_compiled():
    text = JOB.replace("[model]", '[model]\ncompile = "on"') + "\n[zero]\nstage = {}\n"
    assert load(text.format(2)).model.compile == "on"
    (told,) = problems(text.format(3))
    assert "model.compile: " in told
    assert "zero.stage = 3" in told


def test_the_record_of_a_run_is_read_whatever_it_told_deepspeed():
    table = {"optimizer": {"type": "SGD"}}
    text = dump_job(load()).replace("deepspeed = {}", "deepspeed = {optimizer = {type = 'SGD'}}")
    Path("record.toml").write_text(
        text.replace("[zero.deepspeed]", "[zero.deepspeed.optimizer]\ntype = 'SGD'")
    )
    assert recorded_job(Path("record.toml")).zero.deepspeed == table


# ---- overrides


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("train.learning_rate=3e-5", "train", "learning_rate", 3e-5),
        ("train.learning_rate = 1", "train", "learning_rate", 1.0),
        ("train.epochs=2", "train", "epochs", 2),
        ("train.deterministic=true", "train", "deterministic", True),
        ("train.adam_betas=[0.5, 0.6]", "train", "adam_betas", (0.5, 0.6)),
        ("model.freeze=['embeddings']", "model", "freeze", ("embeddings",)),
        ("model.precision=fp32", "model", "precision", "fp32"),
        ("stop.patience=0", "stop", "patience", 0),
        ("zero.deepspeed.data_types={}", "zero", "deepspeed", {"data_types": {}}),
        (
            "zero.deepspeed.communication_data_type=fp16",
            "zero",
            "deepspeed",
            {"communication_data_type": "fp16"},
        ),
        (
            'zero.deepspeed.communication_data_type="fp16"',
            "zero",
            "deepspeed",
            {"communication_data_type": "fp16"},
        ),
        ("data.train=p/q:train[:10]", "data", "train", "p/q:train[:10]"),
        # strings that look like something else
        ("model.revision=1234567", "model", "revision", "1234567"),
        ("model.revision=1e3", "model", "revision", "1e3"),
        ("model.revision=0777", "model", "revision", "0777"),
        ("model.revision=true", "model", "revision", "true"),
        ("model.revision=2024-01-01", "model", "revision", "2024-01-01"),
        ("model.revision=[1]", "model", "revision", "[1]"),
        ("model.revision='v1'", "model", "revision", "v1"),
        ("model.revision=v1=2#3", "model", "revision", "v1=2#3"),
        ("data.columns.id=7", "data", "columns.id", "7"),
        ("slurm.environment.A=1", "slurm", "environment", {"A": "1"}),
        ("slurm.sbatch.nice=100", "slurm", "sbatch", {"nice": 100}),
    ],
)
def test_overrides_are_typed_by_the_schema(override, section, key, expected):
    found = getattr(load(JOB, override), section)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == expected
    assert type(found) is type(expected)


def test_overrides_of_the_top_and_the_last_of_two_wins():
    job = load(JOB, "name=2024", "seed=1", "seed=2")
    assert (job.name, job.seed) == ("2024", 2)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=two", '--set: train.epochs: expected a whole number, found "two"'),
        ("train.epochs=0", "--set: train.epochs: must be at least 1, found 0"),
        ("train.epoch=2", "--set: train.epoch: unknown key; did you mean epochs?"),
        ("epochs=2", "--set: epochs: unknown key; it belongs to [train]"),
        ("stop.metric=loss1", "--set: stop.metric: "),
        ("data.train=no.json", '--set: data.train: no file "no.json"'),
        ("model.name=./no", '--set: model.name: no folder "./no"'),
        ("expect.tolerance=1", "--set: expect: expects nothing"),
        ("train.epochs", "--set train.epochs: write it as section.key=value"),
        ("=1", "--set =1: write it as section.key=value"),
        ("train.=1", "--set train.=1: write it as section.key=value"),
        ("train.e\nx=1", "--set train.e\\nx=1: write it as section.key=value"),
        ("name.first=n", "--set name.first=n: name is not a table"),
        ("seed=1\nfoo=2", '--set: seed: expected a whole number, found "1\\nfoo=2"'),
        ("seed=" + "9" * 5000, '--set: seed: expected a whole number, found "999'),
        ("seed=" + "[" * 5000, '--set: seed: expected a whole number, found "[[['),
        ("name=\udcff", "--set: name: "),
    ],
)
def test_overrides_with_problems(override, expected):
    (found,) = problems(JOB, override)
    assert found.startswith(expected)


def test_an_override_mends_the_file():
    assert load(JOB.replace("epochs = 1", "epochs = 0"), "train.epochs=1") == load()


# ---- files


def test_a_missing_file_and_its_neighbour():
    Path("jobs").mkdir()
    Path("jobs/quickstart.toml").write_text(JOB)
    for name, close in (("jobs/quikstart.toml", True), ("jobs/quickstart", True), ("x/y", False)):
        with pytest.raises(JobError) as caught:
            load_job(name)
        suggestion = "; did you mean jobs/quickstart.toml?" if close else ""
        assert caught.value.problems == (f"{name}: no such file{suggestion}",)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (".", ".: cannot be read: Is a directory"),
        ("loop.toml", "loop.toml: cannot be read: Too many levels of symbolic links"),
        ("dangling.toml", "dangling.toml: no such file"),
        ("a\0b.toml", "a\\x00b.toml: cannot be read: embedded null byte"),
        ("1\n2", "1\\n2: no such file"),
        ("n" * 300, "n" * 300 + ": cannot be read: File name too long"),
        ("job.toml/x", "job.toml/x: cannot be read: Not a directory"),
        ("/dev/zero", f"/dev/zero: more than {MAX_BYTES} bytes are no job file"),
    ],
)
def test_paths_that_hold_no_job(name, expected):
    Path("job.toml").write_text(JOB)
    Path("loop.toml").symlink_to("loop.toml")
    Path("dangling.toml").symlink_to("nowhere")
    with pytest.raises(JobError) as caught:
        load_job(name)
    assert caught.value.problems == (expected,)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read():
    Path("job.toml").write_text(JOB)
    Path("job.toml").chmod(0)
    with pytest.raises(JobError, match=r"^job\.toml: cannot be read: Permission denied$"):
        load_job("job.toml")


def test_files_beside_the_job_come_before_those_in_the_current_folder(tmp_path, monkeypatch):
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        (folder / "encoder").mkdir(parents=True)
        (folder / "both.json").touch()
    (here / "one.csv").touch()
    text = JOB.replace('train = "o/n"', 'train = "both.json[:10]"')
    text = text.replace('validation = "o/n"', 'validation = "one.csv"')
    (beside / "job.toml").write_text(text.replace('name = "o/n"', 'name = "encoder"'))
    monkeypatch.chdir(here)
    job = load_job("../beside/job.toml")
    assert job.data.train == f"{beside}/both.json[:10]"
    assert job.data.validation == f"{here}/one.csv"
    assert job.model.name == f"{beside}/encoder"
    # A job file reached through a link has its files beside the real one.
    (here / "link.toml").symlink_to(beside / "job.toml")
    assert load_job("link.toml") == job


def test_a_folder_is_no_data_and_a_file_is_no_model():
    Path("folder.json").mkdir()
    Path("model.bin").touch()
    text = JOB.replace('train = "o/n"', 'train = "folder.json"')
    assert problems(text.replace('name = "o/n"', 'name = "./model.bin"')) == [
        'job.toml:4: data.train: "folder.json" is a folder; name a file in it',
        'job.toml:8: model.name: "./model.bin" is a file; name the folder of config.json and the'
        " weights",
    ]


@pytest.mark.parametrize("name", ["o/train.txt", "o/train.txt:train[:5]", "o/train.txt[:5]"])
def test_what_is_here_is_never_the_hubs(name):
    Path("o").mkdir()
    Path("o/train.txt").touch()
    Path("o/model.safetensors").touch()
    text = JOB.replace('train = "o/n"', f'train = "{name}"')
    assert problems(text.replace('name = "o/n"', 'name = "o/model.safetensors"')) == [
        "job.toml:4: data.train: 'o/train.txt' is a file here, and of none of the kinds that are"
        " read (.json, .jsonl, .csv, .tsv, each also as .gz, or .parquet); convert it, or rename it"
        " if it is one of them",
        'job.toml:8: model.name: "o/model.safetensors" is a file; name the folder of config.json'
        " and the weights",
    ]
    hub = "o/train.txt@main:train"
    assert load(JOB.replace('train = "o/n"', f'train = "{hub}"')).data.train == hub


def test_a_hub_id_stays_unless_a_folder_has_its_name():
    assert load().model.name == "o/n"
    Path("o/m").mkdir(parents=True)
    text = JOB.replace('name = "o/n"', 'name = "o/m"')
    assert load(text).model.name == str(Path("o/m").resolve())


def test_weights_in_an_installed_package_keep_their_name(tmp_path, monkeypatch):
    (tmp_path / "some_weights" / "model").mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    text = put("model.name = 'package:some_weights/model'")[0]
    assert load(text).model.name == "package:some_weights/model"


# ---- writing a job down

TEXTS = st.text(min_size=1).filter(lambda text: text.strip() and "\r" not in text)
HUB = st.from_regex(r"[a-z0-9][a-zA-Z0-9._-]{0,9}/[a-z][a-zA-Z0-9._-]{0,9}", fullmatch=True)
SLICES = st.sampled_from(["", ":train", "@main#de:test", ":a.b+c[:10]", "[10%:]", "[-5:]"])
SHARES = st.floats(0, 1, exclude_max=True)
PERCENTS = st.none() | st.floats(0, 100)


def table(**keys):
    """A section, in which each key that comes out as None is left out."""
    return st.fixed_dictionaries(keys).map(
        lambda drawn: {key: value for key, value in drawn.items() if value is not None}
    )


JOBS = table(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    seed=st.integers(0, 2**32 - 1),
    data=table(
        train=st.tuples(HUB, SLICES).map("".join),
        validation=st.tuples(HUB, SLICES).map("".join),
        sample=st.none() | st.integers(1, 10**9),
        max_length=st.integers(129, 8192),
        unanswerable=st.booleans(),
        columns=table(question=TEXTS, id=st.none() | TEXTS, answer=st.none() | TEXTS),
    ),
    model=table(
        name=HUB,
        revision=st.none() | TEXTS,
        freeze=st.lists(TEXTS, max_size=3),
        dropout=st.none() | SHARES,
    ),
    train=table(
        epochs=st.integers(1, 10**9),
        batch_size=st.integers(1, 100).map(lambda n: 6 * n),
        micro_batch_size=st.sampled_from([None, 1, 2, 3, 6]),
        learning_rate=st.floats(0, 1, exclude_min=True),
        adam_betas=st.tuples(SHARES, SHARES).map(list),
        schedule=st.sampled_from(["linear", "cosine", "constant"]),
    ),
    stop=st.none() | table(metric=st.sampled_from(METRICS), min_delta=st.floats(0, 9)),
    zero=table(
        stage=st.integers(0, 3),
        deepspeed=table(
            wall_clock_breakdown=st.none() | st.booleans(),
            gradient_predivide_factor=st.none() | st.integers(1, 9) | st.floats(0.1, 1e9),
            data_types=st.none() | table(grad_accum_dtype=st.sampled_from([None, "fp32"])),
        ),
    ),
    score=table(null_threshold=st.floats(allow_nan=False, allow_infinity=False)),
    probe=st.lists(table(question=TEXTS, context=TEXTS, answer=st.none() | TEXTS), max_size=3),
    expect=st.none() | table(f1=st.floats(0, 100), exact_match=PERCENTS, loss=PERCENTS),
)


@pytest.mark.parametrize("examples", [50, pytest.param(150, marks=pytest.mark.slow)])
def test_a_job_written_down_is_read_back_equal(examples):
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(JOBS)
    def holds(drawn):
        job = Job.model_validate(drawn)
        text = dump_job(job)
        assert load(text) == job
        assert dump_job(load(text)) == text

    holds()


def test_a_job_written_down_states_every_default():
    text = dump_job(load())
    assert all(f"\n{line}\n" in text for line in ("max_length = 384", "stage = 2", "n_best = 20"))


def test_a_job_written_down_runs_from_any_folder(tmp_path, monkeypatch):
    Path("a.json").touch()
    job = load(JOB.replace('train = "o/n"', 'train = "a.json[:5]"'))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(dump_job(job)) == job


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("train.epochs=1", None),
        ("train.epochs=3", "train.epochs is 1 there and 3 now"),
        ("seed=7", "seed is 42 there and 7 now"),
        ("train.micro_batch_size=4", "train.micro_batch_size is not set there and 4 now"),
        (
            "zero.deepspeed={data_types={}}",
            "zero.deepspeed.data_types is not set there and a table now",
        ),
        # What two starts of one run may differ in.
        ("train.checkpoint_minutes=1", None),
        ("train.timeout_minutes=1", None),
        ("expect={f1=50.0}", None),
    ],
)
def test_the_first_difference_of_two_jobs_is_named(override, difference):
    assert first_difference(load(), load(JOB, override)) == difference


def test_the_record_of_a_run_is_read_without_its_files():
    Path("record.toml").write_text(dump_job(load()).replace('"o/n"', '"/nowhere/gone.json"'))
    assert recorded_job(Path("record.toml")).data.train == "/nowhere/gone.json"
    for text in ("", "name = ", "\0"):
        Path("record.toml").write_text(text)
        with pytest.raises(DataError, match="is not the record of a run"):
            recorded_job(Path("record.toml"))
    with pytest.raises(DataError, match=r"gone\.toml"):
        recorded_job(Path("gone.toml"))
    Path("folder.toml").mkdir()  # as what cannot be read now: nothing is said of what it holds
    with pytest.raises(StorageError, match=r"folder\.toml: Is a directory"):
        recorded_job(Path("folder.toml"))


@pytest.mark.parametrize("sign", WANDB_REFUSES)
def test_a_project_that_wandb_refuses(sign):
    text, line = put(f"track.project = 'a{sign}b'")
    assert load(text).track.project == f"a{sign}b"  # nobody asks W&B
    assert load(text, 'track.tools=["mlflow"]')
    (problem,) = problems(text, 'track.tools=["mlflow", "wandb"]')
    assert problem.startswith(f"job.toml:{line}: track.project: ")
    assert f" holds {sign}; W&B takes up to 128 characters without / \\ # ? % :" in problem


def test_a_project_that_is_too_long_for_wandb():
    wandb = 'track.tools=["wandb"]'
    assert load(JOB, wandb, f"track.project={'x' * 128}")
    (problem,) = problems(JOB, wandb, f"track.project={'x' * 129}")
    assert problem.startswith("--set: track.project: ")
    assert " has 129 characters; W&B takes up to 128 " in problem


def test_what_wandb_refuses_is_what_it_says_itself():
    wandb = pytest.importorskip("wandb")
    assert wandb.Settings(project="x" * WANDB_LONGEST)
    for name in (*WANDB_REFUSES, "x" * (WANDB_LONGEST + 1)):
        with pytest.raises(Exception, match="Invalid project name"):
            wandb.Settings(project=name)


def test_the_record_of_a_run_whose_tracker_gave_up_is_read():
    text, _ = put("track.project = 'a/b'")
    Path("job.toml").write_text(text + '\ntools = ["wandb"]\n')
    assert recorded_job(Path("job.toml")).track.project == "a/b"


@pytest.mark.parametrize(
    "address",
    [
        "https://alice:s3cret@mlflow.org",
        "https://s3cret@mlflow.org/x",
        "https://mlflow.org/?token=s3cret",
        "postgresql+psycopg2://alice:s3/cret@db:5432/x",
        "https://mlflow.org/#s3cret",
    ],
)
def test_an_address_that_holds_a_secret(address):
    text, line = put(f"track.mlflow_uri = '{address}'")
    (problem,) = problems(text)
    assert problem.startswith(f"job.toml:{line}: track.mlflow_uri: ")
    assert "s3cret" not in problem
    assert "MLFLOW_TRACKING_PASSWORD" in problem


@pytest.mark.parametrize("address", ["https://mlflow.org:5000/a", "file:///home/me@uni/x", "./a#b"])
def test_an_address_without_a_secret(address):
    assert load(put(f"track.mlflow_uri = '{address}'")[0]).track.mlflow_uri == address


def test_the_record_of_a_run_with_a_secret_is_read():
    text, _ = put("track.mlflow_uri = 'https://a:b@c'")
    Path("job.toml").write_text(text)
    assert recorded_job(Path("job.toml")).track.mlflow_uri == "https://a:b@c"


# ---- names that people bring with them


@pytest.mark.parametrize(
    ("section", "given", "words"),
    [
        ("train", "lr = 1e-4", "did you mean learning_rate?"),
        ("train", "num_train_epochs = 3", "did you mean epochs?"),
        ("train", "fp16 = true", "did you mean precision in [model]"),
        ("model", "bf16 = true", "did you mean precision ("),
        ("train", "gradient_accumulation_steps = 2", "did you mean micro_batch_size (windows per"),
        ("train", "per_device_train_batch_size = 8", "did you mean batch_size (windows per step"),
        ("train", "warmup_ratio = 0.1", "did you mean warmup?"),
        ("train", "warmup_steps = 10", "did you mean warmup (a share of all steps)?"),
        ("train", "doc_stride = 64", "did you mean stride in [data]?"),
        ("train", "report_to = 'wandb'", "did you mean tools in [track]?"),
        ("train", "load_best_model_at_end = true", "did you mean patience in [stop] (with"),
        ("train", "output_dir = 'x'", "it is an option of the command, --run-dir DIR"),
        ("data", "max_seq_length = 256", "did you mean max_length?"),
        ("model", "model_name_or_path = 'x'", "did you mean name?"),
    ],
)
def test_names_of_other_trainers_lead_to_ours(section, given, words):
    key = given.split(" = ")[0]
    header = f"[{section}]\n"
    (found,) = problems(JOB.replace(header, f"{header}{given}\n"))
    assert f"{section}.{key}: unknown key; {words}" in found


def test_a_key_that_is_called_otherwise_is_not_missing_too():
    (found,) = problems(JOB.replace("learning_rate = 1e-4", "lr = 1e-4"))
    assert found.endswith("train.lr: unknown key; did you mean learning_rate?")


def test_every_name_of_other_trainers_leads_to_a_key_that_is_there():
    for name, (key, _) in _ELSEWHERE.items():
        kind: object = Job
        for part in key.split("."):
            found = [k for k in _flat(kind) if isinstance(k, type) and issubclass(k, BaseModel)]
            assert part in found[0].model_fields, name
            kind = found[0].model_fields[part].annotation


def test_a_short_window_with_a_stride_that_is_unset_says_which_to_set():
    (found,) = problems(JOB.replace("[data]\n", "[data]\nmax_length = 128\n"))
    assert "stride 128 (which is unset) must be smaller than max_length 128" in found
    assert found.endswith("stride = 42")
