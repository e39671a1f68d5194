"""Every format gives the same questions; every bad row and file is refused by its name."""

from __future__ import annotations

import contextlib
import copy
import csv
import functools
import gzip
import io
import json
import math
import operator
import os
import socket
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.data.dataset import Example, content_sha256, load_dataset
from runner.data.formats import file_rows, files, hub_split, table_rows
from runner.data.formats.judge import check_rows
from runner.data.formats.rows import RawTable, number
from runner.data.hub import Snapshot
from runner.errors import AssetError, DataError
from runner.job.schema import Columns
from runner.job.sources import FILE_SUFFIXES
from runner.predict.questions import file_questions, read_question_rows

EXAMPLES = (
    Example(
        "a1", "How long?", "Its battery lasts nine hours, nine on dim.", ("nine hours",), (18,)
    ),
    Example(
        "a2", "What?", "Its battery lasts nine hours, nine on dim.", ("nine", "nine"), (18, 30)
    ),
    Example("b1", "Où est-ce ?", "Le café “Zoé” 😀, à Orsay", ("😀",), (14,)),
    Example("b2", 'Quoted, "twice"?', "One, two\r\nthree\n", ("two\r\nthree",), (5,)),
    Example("c 3", "Any?", "Nothing to say.\u2028Or is there?", (), ()),
)
GOOD = {"id": "g", "question": "Who?", "context": "Ann and Bo saw Bo.", "answer": "Ann"}


def load(path, *, unanswerable=False, on_bad_row="fail", sample=None, seed=0, **columns):
    return load_dataset(
        str(path),
        columns=Columns(**columns),
        unanswerable=unanswerable,
        on_bad_row=on_bad_row,
        sample=sample,
        seed=seed,
    )


# ---- formats


def texts_and_starts(example):
    return {"text": list(example.answers), "answer_start": list(example.answer_starts)}


def tables(example):
    pairs = zip(example.answers, example.answer_starts, strict=True)
    return [{"text": text, "answer_start": start} for text, start in pairs]


def flat(examples, spelling=texts_and_starts):
    return [
        {"id": e.id, "question": e.question, "context": e.context, "answers": spelling(e)}
        for e in examples
    ]


def one_answer(examples):
    """Rows with one answer a row, under other column names."""
    return [
        {
            "number": e.id,
            "ask": e.question,
            "text": e.context,
            "span": e.answers[0] if e.answers else "",
            "at": e.answer_starts[0] if e.answers else None,
        }
        for e in examples
    ]


def nested(examples, spelling=tables, **extra):
    """SQuAD's own form; neighbours with the same context share a paragraph."""
    paragraphs = []
    for e in examples:
        if not paragraphs or paragraphs[-1]["context"] != e.context:
            paragraphs.append({"context": e.context, "qas": []})
        impossible = {"is_impossible": not e.answers, "plausible_answers": []} if extra else {}
        qa = {"id": e.id, "question": e.question, "answers": spelling(e), **impossible}
        paragraphs[-1]["qas"].append(qa)
    return {"data": [{"title": "T", "paragraphs": [p]} for p in paragraphs], **extra}


def json_bytes(value, **options):
    return json.dumps(value, **options).encode()


def jsonl(rows, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def csv_bytes(rows, separator=","):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def pandas_csv(rows):
    """As datasets writes it: numpy's arrays, spelled by str."""
    return pyarrow.Table.from_pylist(rows).to_pandas().to_csv(index=False).encode()


def lists_and_starts(examples):
    return [
        {**row, "answers": list(e.answers), "answer_start": list(e.answer_starts)}
        for row, e in zip(flat(examples), examples, strict=True)
    ]


def haystack(examples):
    """What Haystack's annotation tool exports."""
    for count, article in enumerate((whole := nested(examples, version="v2.0"))["data"]):
        for paragraph in article["paragraphs"]:
            paragraph["document_id"] = count
            for qa in paragraph["qas"]:
                for answer in qa["answers"]:
                    answer |= {"answer_category": "SHORT", "answer_id": 1, "question_id": 1}
                if qa["is_impossible"]:
                    qa["answers"] = [{"text": "", "answer_start": 12, "answer_category": None}]
    return whole


def german_quad(example):
    count = len(example.answers)
    further = {"answer_category": ["SHORT"] * count, "answer_id": [7] * count}
    return {**further, **texts_and_starts(example)}


def paragraphs(examples):
    return [
        paragraph for article in nested(examples)["data"] for paragraph in article["paragraphs"]
    ]


MRQA_HEADER = {"header": {"dataset": "Made", "split": "dev"}}


def spans(example):
    """Start and end of each answer, the end exclusive."""
    pairs = zip(example.answers, example.answer_starts, strict=True)
    return [(start, start + len(text)) for text, start in pairs]


def mrqa(examples):
    lines, by_id = [], {e.id: e for e in examples}
    for paragraph in paragraphs(examples):
        for qa in paragraph["qas"]:
            example = by_id[qa["id"]]
            qa["qid"] = qa.pop("id")
            found = {}
            for text, (start, end) in zip(example.answers, spans(example), strict=True):
                found.setdefault(text, []).append([start, end - 1])
            qa["detected_answers"] = [
                {"text": text, "char_spans": ends, "token_spans": [[0, 0]] * len(ends)}
                for text, ends in found.items()
            ]
            qa["answers"] = [*found, "what the context lacks"]
        lines.append({"id": "", **paragraph, "context_tokens": [["Its", 0]]})
    return lines


def mrqa_flat(examples):
    rows = []
    for line in mrqa(examples):
        for qa in line["qas"]:
            found = qa["detected_answers"]
            ends = [
                {"start": [s for s, _ in d], "end": [e for _, e in d]}
                for d in (item["char_spans"] for item in found)
            ]
            detected = {"text": [item["text"] for item in found], "char_spans": ends}
            rows.append({**qa, "subset": "Made", "context": line["context"]})
            rows[-1]["detected_answers"] = detected
    return rows


def label_studio(examples, name="annotations"):
    """Tasks of its template for question answering, by two who agree."""
    tasks = []
    for e in examples:
        result = [
            {
                "value": {"start": start, "end": end, "text": text, "labels": ["Answer"]},
                "id": "Dx_aB91ISN",
                "from_name": "answer",
                "to_name": "text",
                "type": "labels",
            }
            for text, (start, end) in zip(e.answers, spans(e), strict=True)
        ]
        done = {"id": 1001, "completed_by": 1, "was_cancelled": False, "result": result}
        skipped = {"id": 1002, "was_cancelled": True, "result": [{"value": {"choices": ["?"]}}]}
        data = {"text": e.context, "question": e.question, "source": "made"}
        tasks.append({"id": e.id, name: [done, skipped, done], "data": data, "predictions": []})
    return tasks


def label_studio_min(examples):
    rows = []
    for task, annotator in ((t, n) for t in label_studio(examples) for n in (1, 2)):
        found = [result["value"] for result in task["annotations"][0]["result"]]
        row = {**task["data"], "id": task["id"], "annotator": annotator, "annotation_id": len(rows)}
        rows.append({**row, "lead_time": 3.5, **({"answer": found} if found else {})})
    return rows


def in_csv(rows):
    names = dict.fromkeys(name for row in rows for name in row)
    spelled = {**dict.fromkeys(names, "")}
    return [
        spelled | {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
        for row in rows
    ]


def doccano(examples, name, asked="question"):
    rows = []
    for e in examples:
        question = {
            "question": {"question": e.question, "Comments": []},
            "meta": {"meta": {"question": e.question}},
            "Comments": {"Comments": [e.question]},
        }[asked]
        labels = [
            {"id": 1, "label": "ANSWER", "start_offset": start, "end_offset": end}
            if name == "entities"
            else [start, end, "ANSWER"]
            for start, end in spans(e)
        ]
        rows.append({"id": e.id, "text": e.context, name: labels, **question})
    return rows


COLUMNS = {"id": "number", "question": "ask", "context": "text", "answer": "span"}
STARTS = COLUMNS | {"answer_start": "at"}
ALL, FIRSTS = EXAMPLES, tuple(e for e in EXAMPLES if e.id != "a2")
FORMATS = {
    "v1.json": (ALL[:4], lambda e: json_bytes(nested(e)), {}),
    "v2.json": (ALL, lambda e: json_bytes(nested(e, version="v2.0"), ensure_ascii=False), {}),
    "nested, lists.json": (ALL, lambda e: json_bytes(nested(e, texts_and_starts)), {}),
    "articles.json": (ALL, lambda e: json_bytes(nested(e)["data"]), {}),
    "lines called.json": (ALL, lambda e: jsonl(flat(e)), {}),
    "crlf, lines called.json": (ALL, lambda e: jsonl(flat(e), "\r\n\r\n"), {}),
    "document called.jsonl": (ALL, lambda e: json_bytes(nested(e), indent=1), {}),
    "list called.jsonl": (ALL, lambda e: json_bytes(flat(e)), {}),
    "articles a line.jsonl": (ALL, lambda e: jsonl(nested(e)["data"]), {}),
    "list.json": (ALL, lambda e: json_bytes(flat(e)), {}),
    "tables.json": (ALL, lambda e: json_bytes(flat(e, tables), indent=1), {}),
    "data.json": (ALL, lambda e: json_bytes({"data": flat(e)}), {}),
    "bom.json": (ALL, lambda e: b"\xef\xbb\xbf" + json_bytes(flat(e)), {}),
    "lines.jsonl": (ALL, lambda e: jsonl(flat(e)), {}),
    "crlf.jsonl": (ALL, lambda e: b"\xef\xbb\xbf" + jsonl(flat(e, tables), "\r\n") + b"\r\n", {}),
    "UPPER.JSONL": (ALL, lambda e: jsonl(flat(e)), {}),
    "named.jsonl": (FIRSTS, lambda e: jsonl(one_answer(e)), STARTS),
    "found.jsonl": (FIRSTS, lambda e: jsonl(one_answer(e)), COLUMNS),
    "named.csv": (FIRSTS, lambda e: csv_bytes(one_answer(e)), STARTS),
    "bom.CSV": (FIRSTS, lambda e: b"\xef\xbb\xbf" + csv_bytes(one_answer(e)), COLUMNS),
    "lists.parquet": (ALL, lambda e: parquet(flat(e)), {}),
    "tables.parquet": (ALL, lambda e: parquet(flat(e, tables)), {}),
    "named.PARQUET": (FIRSTS, lambda e: parquet(one_answer(e)), STARTS),
    "packed.json.gz": (ALL, lambda e: gzip.compress(json_bytes(nested(e))), {}),
    "packed.jsonl.gz": (ALL, lambda e: gzip.compress(jsonl(flat(e))), {}),
    "packed.CSV.GZ": (FIRSTS, lambda e: gzip.compress(csv_bytes(one_answer(e))), STARTS),
    "packed, called.jsonl": (ALL, lambda e: gzip.compress(jsonl(flat(e))), {}),
    "unpacked, called.jsonl.gz": (ALL, lambda e: jsonl(flat(e)), {}),
    "semicolons.csv": (FIRSTS, lambda e: csv_bytes(one_answer(e), ";"), STARTS),
    "tabs.tsv": (FIRSTS, lambda e: csv_bytes(one_answer(e), "\t"), STARTS),
    "tabs.csv": (FIRSTS, lambda e: csv_bytes(one_answer(e), "\t"), STARTS),
    "commas.tsv": (FIRSTS, lambda e: csv_bytes(one_answer(e)), STARTS),
    "pandas.csv": (ALL, lambda e: pandas_csv(flat(e)), {}),
    "python.csv": (ALL, lambda e: csv_bytes(flat(e, lambda x: str(texts_and_starts(x)))), {}),
    "json in.csv": (ALL, lambda e: csv_bytes(flat(e, lambda x: json.dumps(tables(x)))), {}),
    "lists and starts.jsonl": (ALL, lambda e: jsonl(lists_and_starts(e)), {}),
    "lists and starts.csv": (ALL, lambda e: pandas_csv(lists_and_starts(e)), {}),
    "haystack.json": (ALL, lambda e: json_bytes(haystack(e)), {}),
    "GermanQuAD.parquet": (ALL, lambda e: parquet(flat(e, german_quad)), {}),
    "paragraphs.json": (ALL, lambda e: json_bytes(paragraphs(e)), {}),
    "paragraphs.jsonl": (ALL, lambda e: jsonl(paragraphs(e)), {}),
    "MRQA.jsonl": (ALL, lambda e: jsonl([MRQA_HEADER, *mrqa(e)]), {}),
    "MRQA.jsonl.gz": (ALL, lambda e: gzip.compress(jsonl([MRQA_HEADER, *mrqa(e)])), {}),
    "MRQA on the hub.parquet": (ALL, lambda e: parquet(mrqa_flat(e)), {}),
    "Label Studio.json": (ALL, lambda e: json_bytes(label_studio(e)), {}),
    "Label Studio, older.json": (ALL, lambda e: json_bytes(label_studio(e, "completions")), {}),
    "Label Studio, JSON-MIN.json": (ALL, lambda e: json_bytes(label_studio_min(e)), {}),
    "Label Studio.csv": (ALL, lambda e: csv_bytes(in_csv(label_studio_min(e))), {}),
    "doccano.jsonl": (ALL, lambda e: jsonl(doccano(e, "label")), {}),
    "doccano 1.0.jsonl": (ALL, lambda e: jsonl(doccano(e, "labels", "meta")), {}),
    "doccano, comments.jsonl": (ALL, lambda e: jsonl(doccano(e, "label", "Comments")), {}),
    "doccano, relations.jsonl": (ALL, lambda e: jsonl(doccano(e, "entities")), {}),
}


def test_each_suffix_that_a_job_may_name_has_its_format():
    assert set(files.PARSERS) == set(FILE_SUFFIXES)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_questions_and_hash(tmp_path, name):
    examples, write, columns = FORMATS[name]
    (tmp_path / name).write_bytes(write(examples))
    data = load(tmp_path / name, unanswerable=True, **columns)
    assert data.examples == examples
    assert data.sha256 == content_sha256(examples)
    assert data.dropped == ()
    asked = [
        row for group in file_questions(str(tmp_path / name), Columns(**columns)) for row in group
    ]
    assert [(row.id, row.question, row.context) for row in asked] == [
        (e.id, e.question, e.context) for e in examples
    ]


def test_rows_without_ids_are_numbered_and_whole_numbers_are_ids(tmp_path):
    rows = [{k: GOOD[k] for k in ("question", "context", "answer")}] * 2
    (tmp_path / "x.csv").write_bytes(csv_bytes(rows))
    assert [e.id for e in load(tmp_path / "x.csv").examples] == ["1", "2"]
    (tmp_path / "x.jsonl").write_bytes(jsonl([{**row, "id": n} for n, row in enumerate(rows)]))
    assert [e.id for e in load(tmp_path / "x.jsonl").examples] == ["0", "1"]
    numbered = nested([Example(7, *"qc", ("c",), (0,))])  # type: ignore[arg-type]
    (tmp_path / "x.json").write_bytes(json_bytes(numbered))
    assert [e.id for e in load(tmp_path / "x.json").examples] == ["7"]


@pytest.mark.parametrize("form", ["nested.json", "flat.json", "flat.jsonl", "flat.parquet"])
@pytest.mark.parametrize(
    ("given", "read"),
    [
        ([1.0, 2.0], ["1", "2"]),
        ([None, None], ["1", "2"]),
        ([math.nan, 7.0], ["1", "7"]),
        (["", "x"], ["1", "x"]),
        ([..., ...], ["1", "2"]),
    ],
)
def test_ids_are_read_as_meant_and_given_where_there_are_none(tmp_path, form, given, read):
    rows = [
        {"id": i, "question": "q", "answers": {"text": ["c"], "answer_start": ["0"]}} for i in given
    ]
    rows = [{k: v for k, v in row.items() if v is not ...} for row in rows]
    file = tmp_path / form
    if form == "nested.json":
        content = json_bytes([{"paragraphs": [{"context": "c", "qas": [r]}]} for r in rows])
    else:
        rows = [{**row, "context": "c"} for row in rows]
        write = {"json": json_bytes, "jsonl": jsonl, "parquet": parquet}[form.partition(".")[2]]
        if form.endswith("parquet") and read == ["1", "x"]:
            rows[0]["id"] = None
        content = write(rows)
    file.write_bytes(content)
    assert [e.id for e in load(file).examples] == read
    assert [row.id for row in read_question_rows(str(file), Columns())] == read
    sliced = read_question_rows(f"{file}[1:]", Columns())
    assert [row.id for row in sliced] == read[1:]


@pytest.mark.parametrize(
    "start", [15, 15.0, "15", " 15 ", "15.0", "(15, 17)", "[15, 17]", [15, 17], [15], "[15]"]
)
def test_a_start_may_be_spelled_as_csv_and_pandas_do(tmp_path, start):
    (tmp_path / "x.jsonl").write_bytes(jsonl([{**GOOD, "answer": "Bo", "answer_start": start}]))
    assert load(tmp_path / "x.jsonl").examples[0].answer_starts == (15,)


def test_the_hash_sees_every_part_and_the_order():
    hashes = {content_sha256(EXAMPLES), content_sha256(EXAMPLES[::-1]), content_sha256(ALL[:4])}
    first = EXAMPLES[0]
    for field, value in (
        ("id", "z"),
        ("question", "?"),
        ("context", first.context + " "),
        ("answers", ("nine hour",)),
        ("answer_starts", (17,)),
    ):
        changed = Example(**{**first.__dict__, field: value})
        hashes.add(content_sha256((changed, *EXAMPLES[1:])))
    assert len(hashes) == 8


# ---- no answer

LAMP = "The lamp has a shade of linen."
LINEN = {"text": ["linen"], "answer_start": [24]}
NO_ANSWER = {
    "nothing": {"answers": []},
    "null": {"answers": None},
    "NaN": {"answers": math.nan},
    "empty lists": {"answers": {"text": [], "answer_start": []}},
    "empty text": {"answers": [{"text": "", "answer_start": 12}]},
    "blank text": {"answers": [{"text": " \n"}]},
    "null text": {"answers": [{"text": None, "answer_start": None}]},
    "NaN text": {"answers": {"text": math.nan, "answer_start": math.nan}},
    "empty text, no place": {"answers": {"text": [""], "answer_start": [-1]}},
    "empty text, no starts": {"answers": {"text": [""], "answer_start": []}},
    "one empty text": {"answers": {"text": "", "answer_start": -1}},
    "list of an empty text": {"answers": [""]},
    "is_impossible": {"answers": [], "is_impossible": True},
    "is_impossible, no answers": {"is_impossible": True, "plausible_answers": [{"text": "linen"}]},
    "is_impossible, unreadable": {"is_impossible": 1, "answers": "linen"},
    "is_impossible as pandas has it": {"is_impossible": 1.0, "answers": []},
    "is_impossible as text": {"is_impossible": "True", "answers": []},
}
TRUE = "is_impossible is true beside an answer"
CONTRADICTIONS = {
    "is_impossible, an answer": ({"is_impossible": True, "answers": LINEN}, TRUE),
    "is_impossible, another place": (
        {"is_impossible": "true", "answers": [{"text": "linen", "answer_start": 99}]},
        TRUE,
    ),
    "not is_impossible": (
        {"is_impossible": False, "answers": []},
        "is_impossible is false without an answer",
    ),
    "-1 beside a text": (
        {"answers": {"text": ["linen"], "answer_start": ["-1"]}},
        "answer_start is -1 beside an answer",
    ),
}


def written(path, rows):
    """Rows of one context, as SQuAD's own form or as lines."""
    if path.suffix == ".json":
        qas = [{"question": "q", **row} for row in rows]
        path.write_bytes(json_bytes([{"paragraphs": [{"context": LAMP, "qas": qas}]}]))
    else:
        path.write_bytes(jsonl([{"question": "q", "context": LAMP, **row} for row in rows]))
    return path


@pytest.mark.parametrize("form", ["x.json", "x.jsonl"])
@pytest.mark.parametrize("case", [*NO_ANSWER, *CONTRADICTIONS])
def test_no_answer_in_every_spelling(tmp_path, form, case):
    row, contradiction = CONTRADICTIONS.get(case) or (NO_ANSWER[case], None)
    file = written(tmp_path / form, [{"answers": LINEN}, row])
    data = load(file, unanswerable=True)
    assert [e.answers for e in data.examples] == [("linen",), ()]
    place = "x.json: 2 (article 1, paragraph 1, question 2)" if form == "x.json" else "x.jsonl:2"
    told = f"1 question taken as without an answer where {contradiction}, first: {place}"
    assert data.contradictions == ((told,) if contradiction else ())
    with pytest.raises(DataError, match=r": no answer \(.*set data.unanswerable = true"):
        load(file)
    assert len(load(file, on_bad_row="drop").examples) == 1


def test_an_answer_beside_empty_ones_is_the_answer_and_false_flags_change_nothing(tmp_path):
    empty = {"text": "", "answer_start": -1}
    rows = [
        {"answers": [empty, {"text": "linen", "answer_start": 24}], "is_impossible": False},
        {"answers": LINEN, "is_impossible": 0},
        {"answers": LINEN, "is_impossible": None},
    ]
    data = load(written(tmp_path / "x.jsonl", rows))
    assert [e.answers for e in data.examples] == [("linen",)] * 3
    assert data.contradictions == (
        "1 question taken as answered where an answer is empty or at -1 beside others, first:"
        " x.jsonl:1",
    )


def test_contradictions_are_counted(tmp_path):
    rows = [{"is_impossible": True, "answers": LINEN}] * 3
    data = load(written(tmp_path / "x.jsonl", rows), unanswerable=True)
    assert data.contradictions[0].startswith("3 questions taken as without an answer where is_imp")


def test_no_answer_in_csv(tmp_path):
    (tmp_path / "x.csv").write_text(
        "question,context,answer,answer_start,is_impossible\n"
        "q,linen,linen,0,False\nq,linen,,,True\nq,linen,,-1,\nq,linen,linen,0.0,True\n"
    )
    data = load(tmp_path / "x.csv", unanswerable=True)
    assert [bool(e.answers) for e in data.examples] == [True, False, False, False]
    assert data.contradictions == (
        f"1 question taken as without an answer where {TRUE}, first: x.csv:5",
    )


# ---- places


def test_places_in_csv_are_lines_of_the_file(tmp_path):
    (tmp_path / "x.csv").write_bytes(
        b'question,context,answer\r\n"q","two\r\nlines",lines\r\n\r\nq,c,absent\r\nq,"a,"b,c\r\n'
    )
    with pytest.raises(DataError, match=r"x\.csv:6: not valid CSV"):
        load(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_bytes((tmp_path / "x.csv").read_bytes()[:-10] + b'q,"a\nb",z\n')
    with pytest.raises(DataError) as refused:
        load(tmp_path / "x.csv")
    places = [line.partition(": ")[0].strip() for line in str(refused.value).split("\n")[1:]]
    assert places == ["x.csv:5", "x.csv:6"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_places_in_lines_are_lines_of_the_file_and_numbers_count_rows(tmp_path, name):
    good, bad = ({k: v for k, v in GOOD.items() if k != "id"} | c for c in ({}, {"answer": "Cy"}))
    lines = [b"", jsonl([good]).strip(), b"", b"  ", jsonl([bad]).strip(), jsonl([good]).strip()]
    (tmp_path / name).write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=rf"{name}:5: answer is not in the context"):
        load(tmp_path / name)
    read = load(tmp_path / name, on_bad_row="drop").examples
    assert [e.id for e in read] == ["1", "3"]
    asked = [row for group in file_questions(str(tmp_path / name), Columns()) for row in group]
    assert [row.id for row in asked] == ["1", "2", "3"]
    (tmp_path / name).write_bytes(b"\n\n" + jsonl([bad]))
    with pytest.raises(DataError, match=rf"{name}:3: answer is not in the context"):
        load(tmp_path / name)


def test_places_in_a_list_are_rows(tmp_path):
    (tmp_path / "x.json").write_bytes(json_bytes([GOOD, {**GOOD, "id": "h", "answer": "Cy"}]))
    with pytest.raises(DataError, match=r"x\.json: row 2: answer is not"):
        load(tmp_path / "x.json")


# ---- slices and samples


@pytest.fixture
def ten(tmp_path):
    rows = [{**GOOD, "id": f"q{n}"} for n in range(10)]
    (tmp_path / "ten.jsonl").write_bytes(jsonl(rows))
    return tmp_path / "ten.jsonl"


def ids(data):
    return [int(e.id[1:]) for e in data.examples]


@pytest.mark.parametrize(
    "part", ["", "[:]", "[:4]", "[3:]", "[2:5]", "[-3:]", "[:-8]", "[5:999]", "[-99:2]"]
)
def test_slices_are_pythons_and_count_questions(ten, part):
    assert ids(load(f"{ten}{part}")) == eval(f"list(range(10)){part}")


@pytest.mark.parametrize(
    ("part", "expected"),
    [("[:20%]", range(2)), ("[20%:50%]", range(2, 5)), ("[95%:]", []), ("[-10%:]", [9])],
)
def test_slices_in_percent(ten, part, expected):
    if not expected:
        with pytest.raises(DataError, match="slice is empty; the data has 10 questions"):
            load(f"{ten}{part}")
        return
    assert ids(load(f"{ten}{part}")) == list(expected)


@pytest.mark.parametrize("part", ["[3:3]", "[5:2]", "[10:]", "[:0]", "[5]", "[a:b]"])
def test_an_empty_or_senseless_slice_is_refused(ten, part):
    with pytest.raises(DataError, match=r"slice (is empty; the data has 10|that )"):
        load(f"{ten}{part}")


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(("part", "low", "high"), [("", 0, 10), ("[2:8]", 2, 8)])
def test_a_sample_is_drawn_after_the_slice_by_the_seed(ten, part, low, high, seed):
    drawn = np.random.default_rng(seed).permutation(high - low)[:4]
    assert ids(load(f"{ten}{part}", sample=4, seed=seed)) == sorted((low + drawn).tolist())
    assert ids(load(f"{ten}{part}", sample=high - low, seed=seed)) == list(range(low, high))


def test_a_sample_larger_than_the_slice_is_refused(ten):
    with pytest.raises(DataError, match="sample of 7 from 6"):
        load(f"{ten}[:6]", sample=7)


def test_only_the_declared_slice_is_checked(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl([GOOD, {**GOOD, "id": "h", "question": ""}]))
    assert len(load(tmp_path / "x.jsonl[:1]").examples) == 1
    with pytest.raises(DataError, match=r"x\.jsonl:2: question is empty"):
        load(tmp_path / "x.jsonl[1:]")


# ---- bad rows

SURROGATE = "holds a lone surrogate (broken encoding)"
BAD_ROWS = {
    "start off by one": ({"answer_start": 1}, "not at answer_start: counted from 1 ("),
    "start negative": ({"answer_start": -2}, "outside the context (-2, of 18 characters)"),
    "start of no answer": (
        {"answer_start": -1},
        "no answer (answer_start is -1 beside an answer; ",
    ),
    "start three": ({"answer_start": "[0, 3, 3]"}, "answer_start is a list, not a whole number"),
    "start three numbers": ({"answer_start": "(0, 3, 5)"}, "answer_start is text, not a whole"),
    "start of a pair": ({"answer_start": "(1, 4)"}, "not at answer_start: counted from 1 ("),
    "start past the end": ({"answer_start": 18}, "outside the context (18, of 18 characters)"),
    "start far past the end": ({"answer_start": 10**30}, f"outside the context ({10**30}, of"),
    "answer over the end": ({"answer": "Bo..", "answer_start": 15}, "not at answer_start"),
    "start a word": ({"answer_start": "first"}, "answer_start is text, not a whole number"),
    "start minus minus": ({"answer_start": "--1"}, "answer_start is text, not a whole number"),
    "start superscript": ({"answer_start": "²"}, "answer_start is text, not a whole number"),
    "start of 5,000 digits": ({"answer_start": "1" * 5000}, "answer_start is text, not a whole"),
    "start a half": ({"answer_start": 0.5}, "answer_start is a number, not a whole number"),
    "start true": ({"answer_start": True}, "answer_start is true or false, not a whole number"),
    "start a list": ({"answer_start": [0, 1, 2]}, "answer_start is a list, not a whole number"),
    "text absent": ({"answer": "Cy"}, 'answer is not in the context ("Cy")'),
    "text twice, no start": ({"answer": "Bo"}, "occurs more than once and has no answer_start"),
    "other case": ({"answer": "ann"}, 'answer is not in the context ("ann")'),
    "other case at its start": ({"answer": "ann", "answer_start": 0}, "not at answer_start"),
    "NFC in NFD": (
        {"context": "Zoe\u0301 came", "answer": "Zo\u00e9", "answer_start": 0},
        "Unicode forms differ: answer text not at answer_start (",
    ),
    "NFD in NFC": (
        {"context": "Zo\u00e9 came", "answer": "Zoe\u0301"},
        "Unicode forms differ: answer is not in the context (",
    ),
    "answer of spaces": ({"answer": "   "}, "no answer (set data.unanswerable = true"),
    "answer NaN": ({"answer": float("nan")}, "no answer (set data.unanswerable = true"),
    "answer a list as text": ({"answer": "['Ann', x]"}, "answers are a list written as text"),
    "answer a list, one absent": ({"answer": ["Ann", "Cy"]}, 'is not in the context ("Cy")'),
    "answers and starts": (
        {"answer": ["Ann"], "answer_start": []},
        "no texts with answer_start (1",
    ),
    "impossible": ({"is_impossible": True}, "no answer (is_impossible is true beside an answer; "),
    "impossible unclear": ({"is_impossible": "maybe"}, "is_impossible is text, not true or false"),
    "answer empty": ({"answer": ""}, "no answer (set data.unanswerable = true"),
    "answer null": ({"answer": None}, "no answer (set data.unanswerable = true"),
    "answer missing": ({"answer": ...}, "no answer"),
    "answer a number": ({"answer": 5}, "answer is a number, not text"),
    "answer a table": ({"answer": {"words": "Ann"}}, "answers are a table, not tables with text"),
    "question empty": ({"question": ""}, "question is empty"),
    "question of spaces": ({"question": " \n\u00a0"}, "question is empty"),
    "question null": ({"question": None}, "no question"),
    "question missing": ({"question": ...}, "no question"),
    "question a number": ({"question": 3.5}, "question is a number, not text"),
    "question NUL": ({"question": "Who\0?"}, "question holds a NUL character"),
    "question surrogate": ({"question": "Who\ud800?"}, f"question {SURROGATE}"),
    "context empty": ({"context": ""}, "context is empty"),
    "context of spaces": ({"context": "\t \r\n"}, "context is empty"),
    "context null": ({"context": None}, "no context"),
    "context a list": ({"context": ["Ann"]}, "context is a list, not text"),
    "context NUL": ({"context": "Ann\0"}, "context holds a NUL character"),
    "context surrogate": ({"context": "Ann \udc80"}, f"context {SURROGATE}"),
    "id a list": ({"id": ["x"]}, "id is a list, not text"),
    "id a fraction": ({"id": 1.5}, "id is a number, not text"),
    "id surrogate": ({"id": "x\ud800"}, f"id {SURROGATE}"),
    "id repeated, same row": ({"id": "g"}, "id repeated (first at x.jsonl:1)"),
    "id repeated, other row": ({"id": "g", "question": "Whom?"}, "id repeated (first at x.jsonl"),
    "row a list": ([1], "a row is a list"),
    "row a text": ("row", "a row is text"),
    "row null": (None, "a row is nothing"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_refused_by_file_and_row_or_dropped(tmp_path, case):
    change, why = BAD_ROWS[case]
    bad = {"id": "bad", **{k: v for k, v in GOOD.items() if k != "id"}, "answer_start": None}
    bad = (
        {k: v for k, v in {**bad, **change}.items() if v is not ...}
        if isinstance(change, dict)
        else change
    )
    path = tmp_path / "x.jsonl"
    rows = [{**GOOD, "answer_start": 0}, bad, {**GOOD, "id": "last"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as refused:
        load(path)
    summary, line = str(refused.value).split("\n")
    assert summary.startswith(f"{path}: 1 of 3 rows refused: 1 x ")
    assert line.startswith("  x.jsonl:2: ")
    assert why in line
    data = load(path, on_bad_row="drop")
    assert [e.id for e in data.examples] == ["g", "last"]
    assert data.dropped == (line.strip(),)


BAD_ANSWERS = {
    "text": ("Ann", "answers are text, not tables"),
    "a list of numbers": ([5], "answers are a list, not tables"),
    "a list of texts, absent": (["Cy"], 'answer is not in the context ("Cy")'),
    "tables without text": ([{"answer_start": 0}], "answers are a list, not tables"),
    "a table without text": ({"answer_start": [0]}, "answers are a table, not tables"),
    "fewer starts": ({"text": ["Ann", "Bo"], "answer_start": [0]}, "(2 and 1)"),
    "more starts": ({"text": ["Ann"], "answer_start": [0, 0]}, "(1 and 2)"),
    "second wrong": ({"text": ["Ann", "Bo"], "answer_start": [0, 9]}, '"Bo" declared at 9'),
    "null text": ([{"text": None, "answer_start": 0}], "no answer (set data.unanswerable"),
    "a number": ([{"text": 5, "answer_start": 0}], "answer is a number, not text"),
    "none": ([], "no answer (set data.unanswerable"),
    "null": (None, "no answer (set data.unanswerable"),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
@pytest.mark.parametrize("form", ["nested.json", "flat.jsonl"])
def test_bad_answers_are_refused_in_both_forms(tmp_path, form, case):
    answers, why = BAD_ANSWERS[case]
    rows = [
        {"id": name, "question": "Who?", "context": "Ann and Bo.", "answers": value}
        for name, value in (("g", [{"text": "Ann", "answer_start": 0}]), ("bad", answers))
    ]
    if form == "nested.json":
        qas = [{k: v for k, v in row.items() if k != "context"} for row in rows]
        content = json_bytes({"data": [{"paragraphs": [{"context": "Ann and Bo.", "qas": qas}]}]})
        place = "nested.json: bad (article 1, paragraph 1, question 2): "
    else:
        content, place = jsonl(rows), "flat.jsonl:2: "
    (tmp_path / form).write_bytes(content)
    with pytest.raises(DataError) as refused:
        load(tmp_path / form)
    line = str(refused.value).split("\n")[1]
    assert line.startswith(f"  {place}")
    assert why in line
    assert [e.id for e in load(tmp_path / form, on_bad_row="drop").examples] == ["g"]


@pytest.mark.parametrize("form", ["nested.json", "flat.jsonl"])
def test_answers_left_out_are_no_promise_that_there_is_none(tmp_path, form):
    row = {"id": "a", "question": "Who?", "context": "Ann."}
    other = {**row, "id": "b", "answers": []}
    if form == "nested.json":
        content = json_bytes({"data": [{"paragraphs": [{"context": "A", "qas": [row, other]}]}]})
    else:
        content = jsonl([row, other])
    (tmp_path / form).write_bytes(content)
    with pytest.raises(DataError, match="1 of 2 rows refused: 1 x no answers;"):
        load(tmp_path / form, unanswerable=True)


COUNTED = "é 😀\r\nis a lamp,\nthe shade linen, the shade"
DIAGNOSES = {
    "from 1": ("is a lamp", "lamp", 6, "counted from 1 ("),
    "no carriage returns": (COUNTED, "lamp", 9, r"counted without \r ("),
    "line ends of two": ("one\ntwo\nthree", "three", 10, r"counted with \r\n line ends ("),
    "UTF-16": ("😀😀 one", "one", 5, "counted in UTF-16 units ("),
    "bytes": ("😀é one", "one", 7, "counted in bytes ("),
    "bytes, behind the end": ("ßßßßß one", "one", 11, "counted in bytes ("),
    "bytes, the second of two": (f"{'ß' * 10}{' one' * 9}", "one", 33, "counted in bytes ("),
    "NFC": ("e\u0301e\u0301e\u0301 one", "one", 4, "counted in NFC ("),
    "NFD or bytes": ("éé one", "one", 5, "counted in bytes or in NFD ("),
    "1 or bytes": ("ß one", "one", 3, "counted from 1 or in bytes ("),
    "later": ("A lamp of linen.", "linen", 9, "stands 1 character later ("),
    "earlier": ("A lamp of linen.", "linen", 14, "stands 4 characters earlier ("),
    "the nearest": ("linen, a lamp of linen", "linen", 15, "stands 2 characters later ("),
    "nowhere": (
        "A lamp of linen.",
        "lines",
        10,
        'answer_start ("lines" declared at 10, where "linen" is)',
    ),
    "white space": ("A\r\nlamp", "A\nlamp", 0, "white space differs: answer text not at answer_"),
    "case": ("A lamp", "a lamp", None, "case differs: answer is not in the context ("),
    "another letter": ("cafe\u0301 one", "cafè", None, ": answer is not in the context ("),
}


@pytest.mark.parametrize("case", DIAGNOSES)
def test_what_is_told_of_a_misplaced_answer_has_been_seen(tmp_path, case):
    context, answer, start, why = DIAGNOSES[case]
    row = {**GOOD, "context": context, "answer": answer, "answer_start": start}
    (tmp_path / "x.jsonl").write_bytes(jsonl([row]))
    with pytest.raises(DataError) as refused:
        load(tmp_path / "x.jsonl")
    summary, line = str(refused.value).split("\n")
    assert why in line
    # The summary keeps all but what is special to a row.
    assert line.removeprefix("  x.jsonl:1: ").partition(" (")[0] in summary
    assert "Unicode forms differ" not in line


def test_v1_and_v2_mixed(tmp_path):
    (tmp_path / "x.json").write_bytes(json_bytes(nested(EXAMPLES)))
    with pytest.raises(DataError, match=r"c 3 \(article 4, paragraph 1, question 1\): no answer"):
        load(tmp_path / "x.json")
    assert len(load(tmp_path / "x.json", unanswerable=True).examples) == 5


def test_ids_repeated_in_a_nested_file_name_both_places(tmp_path):
    twice = [EXAMPLES[0], EXAMPLES[2], EXAMPLES[0]]
    (tmp_path / "x.json").write_bytes(json_bytes(nested(twice)))
    places = [rf"x\.json: a1 \(article {n}, paragraph 1, question 1\)" for n in (3, 1)]
    with pytest.raises(DataError, match=rf"{places[0]}: id repeated \(first at {places[1]}\)"):
        load(tmp_path / "x.json")


def test_the_report_counts_classes_and_shows_the_first_five(tmp_path):
    changes = [{"answer": f"({n})"} for n in range(6)] + [{"question": ""}] * 2
    rows = [{**GOOD, "id": str(n), **change} for n, change in enumerate(changes)]
    (tmp_path / "x.jsonl").write_bytes(jsonl(rows))
    with pytest.raises(DataError) as refused:
        load(tmp_path / "x.jsonl")
    head, *lines, rest = str(refused.value).split("\n")
    assert "8 of 8 rows refused: 6 x answer is not in the context; 2 x question is empty" in head
    assert [line.split(": ")[0] for line in lines] == [f"  x.jsonl:{n}" for n in range(1, 6)]
    assert rest == "  and 3 more"


def test_dropping_every_row_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl([{**GOOD, "context": ""}]))
    with pytest.raises(DataError, match=r"no row is left[^\0]*x\.jsonl:1: context is empty"):
        load(tmp_path / "x.jsonl", on_bad_row="drop")


@pytest.mark.parametrize("name", ["\x1b[2Jx", "a\nb", "\u202eb", "x" * 500, "\ud800"])
def test_a_hostile_id_is_printed_harmlessly(tmp_path, name):
    bad = Example(name, "", "Ann", ("Ann",), (0,))
    (tmp_path / "x.json").write_bytes(json_bytes(nested([EXAMPLES[0], bad])))
    with pytest.raises(DataError) as refused:
        load(tmp_path / "x.json")
    lines = str(refused.value).split("\n")
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    assert len(lines[1]) < 200


# ---- bad files

ROW = json.dumps(GOOD).encode()
DEEP = b"[" * 200_000
BAD_FILES = {
    "empty.json": (b"", "holds no questions"),
    "empty.jsonl": (b"", "holds no questions"),
    "blank.jsonl": (b"\n \r\n", "holds no questions"),
    "empty.csv": (b"", "holds no questions"),
    "header only.csv": (b"question,context,answer\n", "holds no questions"),
    "zero rows.json": (b"[]", "holds no questions"),
    "zero articles.json": (b'{"data": []}', "holds no questions"),
    "zero paragraphs.json": (b'{"data": [{"paragraphs": []}]}', "holds no questions"),
    "zero rows.parquet": (parquet([]), "holds no questions"),
    "number.json": (b"5", "expected SQuAD's .* found a number"),
    "null.json": (b"null", "expected SQuAD's .* found nothing"),
    "table.json": (b'{"a": 1}', "no column 'question'; the columns are 'a'; a row has a question"),
    "data a table.json": (b'{"data": {"a": 1}}', r"the columns are 'data' \(a table\); a row has"),
    "lists.json": (b"[[1], [2]]", "expected rows with named columns, found a list"),
    "texts.jsonl": (b'"a"\n"b"\n', "expected rows with named columns, found text"),
    "cut.json": (b"[" + ROW + b",\n" + ROW[:30], r"cut\.json:2: not valid JSON"),
    "cut.jsonl": (ROW + b"\n" + ROW[:30], r"cut\.jsonl:2: not valid JSON"),
    "cut.csv": (b'question,context,answer\nq,c,c\nq,"c, c\n', r"cut\.csv:3: not valid CSV"),
    "cut.parquet": (parquet([GOOD])[:-9], r"cut\.parquet: not valid Parquet"),
    "json.parquet": (ROW, r"json\.parquet: not valid Parquet"),
    "empty.parquet": (b"", r"empty\.parquet: not valid Parquet"),
    "comma.json": (b"[" + ROW + b",]", r"comma\.json:1: not valid JSON"),
    "two.json": (ROW + b"\n" + ROW[1:], r"two\.json:2: not valid JSON"),
    "raw NUL.jsonl": (ROW.replace(b"Ann", b"A\0nn"), r"NUL\.jsonl:1: not valid JSON"),
    "deep.json": (DEEP, r"deep\.json: JSON is nested too deeply"),
    "deep.jsonl": (ROW + b"\n" + DEEP, r"deep\.jsonl:2: JSON is nested too deeply"),
    "digits.jsonl": (ROW + b'\n{"a": ' + b"1" * 5000 + b"}", r"digits\.jsonl:2: holds a number of"),
    "latin-1.jsonl": (ROW + b"\n\xe9", r"latin-1\.jsonl:2: byte 0xe9 is not UTF-8"),
    "latin-1.csv": (b"question\r\n\xe9", r"latin-1\.csv:2: byte 0xe9 is not UTF-8"),
    "utf-16.json": ("[]".encode("utf-16"), r"utf-16\.json:1: byte 0x.. is not UTF-8"),
    "cut in a character.json": (b'["\xe2\x82', r"character\.json:1: byte 0xe2 is not UTF-8"),
    "columns.csv": (
        b"ask,context\nq,c\n",
        "no column 'question'; the columns are 'ask', 'context'",
    ),
    "no answers.jsonl": (b'{"question": "q", "context": "c"}', "no column 'answers'"),
    "columns.parquet": (parquet([{"context": "c"}]), "no column 'question'"),
    "exports/doccano.jsonl": (
        b'{"id": 1, "text": "c", "label": [[0, 1, "A"]], "Comments": []}',
        r"looks like doccano's lines, but none of its fields \('text'\) is the question; import it",
    ),
    "exports/doccano, classes.jsonl": (
        b'{"id": 1, "text": "c", "label": ["good"], "question": "q"}',
        "looks like doccano's lines, not read; convert it to SQuAD's JSON, or rows with a q",
    ),
    "exports/label studio.json": (
        b'[{"id": 1, "annotations": [{"result": []}], "data": {"url": 5}}]',
        r"looks like Label Studio's JSON, but none of its fields \('url'\) is the question",
    ),
    "exports/mrqa.jsonl": (
        b'{"header": {}}\n{"context": "c", "qas": {"qid": "1"}}',
        r"mrqa\.jsonl:2: expected a table with a list called 'qas'",
    ),
    "exports/paragraphs.json": (b'[{"context": "c", "qas": []}]', "holds no questions"),
    "exports/prodigy.jsonl": (
        b'{"text": "c", "spans": []}',
        "looks like Prodigy's lines, not read",
    ),
    "exports/to_csv.csv": (
        b"question,context,answers\nq,c,\"{'text': array(['c'], ...)}\"\n",
        r"to_csv\.csv:2: answers are a table written as text, as to_csv does, but not to be read",
    ),
    "exports/text.csv": (
        b"question,context,answers\nq,c,c\n",
        r'they are the answers themselves, write answer = "answers" in \[data.columns\]',
    ),
    "other names.json": (
        b'[{"ask": "q", "text": "c", "answers": []}]',
        r"'ask', 'text', 'answers' \(a list\); name them in \[data.columns\]: question = \"ask",
    ),
    "papers by their ids.json": (
        json_bytes({f"paper {n}": {"full_text": []} for n in range(999)}),
        r"the columns are 'paper 0' \(a table\), .* 979 more; a row has a question",
    ),
    "exports/qasper.jsonl": (
        b'{"full_text": {}, "qas": {}, "title": "t"}',
        "looks like QASPER, not",
    ),
    "too few names.json": (
        b'[{"ask": "q", "text": {}, "answers": []}]',
        r"'ask', 'text' \(a table\), 'answers' \(a list\); a row has a question, a context and ans",
    ),
    "doubled.csv": (b"question,context,answer,context\nq,c,c,d\n", "'context' first"),
    "binary.parquet": (
        parquet([{**GOOD, "question": b"\xff"}]),
        ": row 1: question is bytes, not text",
    ),
    "wide.csv": (b"question,context,answer\nq,c,c\nq,a, b,b\n", r"wide\.csv:3: more fields than"),
    "narrow.csv": (b"question,context,answer\nq,c,c\nq,c\n", r"narrow\.csv:3: no answer"),
    "article null.json": (b'{"data": [{"paragraphs": []}, null]}', "article 2: expected a table"),
    "article mixed.json": (b'[{"paragraphs": []}, {"question": "q"}]', "article 2: expected a tab"),
    "paragraphs a table.json": (b'[{"paragraphs": {}}]', "article 1: expected a table with a list"),
    "paragraph text.json": (b'[{"paragraphs": ["x"]}]', "article 1 paragraph 1: expected a table"),
    "no qas.json": (b'[{"paragraphs": [{"context": "c"}]}]', "paragraph 1: expected .* 'qas'"),
    "qa null.json": (b'[{"paragraphs": [{"context": "c", "qas": [null]}]}]', "question 1: a quest"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_by_name_and_line(tmp_path, name):
    content, told = BAD_FILES[name]
    name = name.rpartition("/")[2]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told) as refused:
        load(tmp_path / name)
    assert name in str(refused.value)
    assert refused.value.exit_code == 65


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    texts = pyarrow.array([b"caf\xe9"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 1, texts.buffers())
    table = pyarrow.table({"question": texts, "context": texts, "answer": texts})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: not valid Parquet: 'utf-8' codec"):
        load(tmp_path / "x.parquet")


def test_parquet_with_a_column_twice_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["c"])] * 2, ["context", "context"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: "):
        load(tmp_path / "x.parquet")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "tsv.gz"])
@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda path: None, AssetError, "no such file"),
        (lambda path: path.symlink_to("gone"), AssetError, "no such file"),
        (lambda path: path.symlink_to(path), DataError, "cannot be read: .* symbolic links"),
        (lambda path: path.mkdir(), DataError, "is not a file"),
        (os.mkfifo, DataError, "is not a file"),
    ],
    ids=["absent", "dangling link", "link to itself", "folder", "pipe"],
)
def test_what_is_no_readable_file(tmp_path, suffix, make, error, told):
    make(tmp_path / f"x.{suffix}")
    with pytest.raises(error, match=rf"x\.{suffix}: {told}") as refused:
        load(tmp_path / f"x.{suffix}")
    assert refused.value.exit_code == (69 if error is AssetError else 65)


def test_a_path_that_holds_nul(tmp_path):
    with pytest.raises(DataError, match="null byte"):
        load(tmp_path / "x\0.json")


def test_a_context_of_ten_megabytes_is_a_context(tmp_path):
    row = {**GOOD, "context": "Ann " + "é" * 10_000_000}
    (tmp_path / "x.csv").write_bytes(csv_bytes([row]))
    assert len(load(tmp_path / "x.csv").examples[0].context) == 10_000_004
    (tmp_path / "x.jsonl").write_bytes(jsonl([row, {**row, "id": "h", "answer": "Bo"}]))
    with pytest.raises(DataError) as refused:
        load(tmp_path / "x.jsonl")
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        *(("5", 5), (" 5.0 ", 5), ("\x1c5", 5), ("-1", -1), ("\u20035\u2003", 5), ("\x1f", None)),
        *(("nan", None), ("5.5", "5.5"), ("\u0665", "\u0665"), ("1e3", "1e3"), (2.0, 2.0)),
    ],
)
def test_a_number_written_as_text(written, meant):
    assert number(written) == meant


@pytest.mark.parametrize(
    "name",
    [
        *("v2.json", "lines.jsonl", "named.csv", "lists.parquet", "pandas.csv", "MRQA.jsonl"),
        *("Label Studio.json", "Label Studio.csv", "doccano, relations.jsonl", "packed.json.gz"),
    ],
)
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_never_a_crash(tmp_path, name, data):
    examples, write, columns = FORMATS[name]
    content = bytearray(write(examples))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 12))
        junk = st.binary(max_size=4) | st.sampled_from([b"null", b"[]", b"{}", b'"', b",", b"1e9"])
        content[place : place + length] = data.draw(junk)
    (tmp_path / name).write_bytes(content)
    for on_bad_row in ("fail", "drop"):
        with contextlib.suppress(DataError):
            load(tmp_path / name, unanswerable=True, on_bad_row=on_bad_row, **columns)


def places(value, at=()):
    """Paths to all that is in a value."""
    lists = dict(enumerate(value)) if isinstance(value, list) else {}
    for key, part in (value if isinstance(value, dict) else lists).items():
        yield (*at, key)
        yield from places(part, (*at, key))


TABLES = {
    "articles": lambda e: nested(e)["data"],
    "paragraphs": paragraphs,
    "MRQA": lambda e: [MRQA_HEADER, *mrqa(e)],
    "MRQA, flat": mrqa_flat,
    "Label Studio": label_studio,
    "Label Studio, JSON-MIN": label_studio_min,
    "doccano": lambda e: doccano(e, "label"),
    "doccano, relations": lambda e: doccano(e, "entities", "meta"),
    "rows": flat,
}
JUNK = [None, 5, -1, 1.5, math.nan, "x", "['x']", [], {}, True, [1, 2], ["a"], [[0, 1]], "\ud800"]


@pytest.mark.parametrize("name", TABLES)
def test_whatever_stands_in_a_place_it_is_read_or_refused(name):
    """Each value of a file in turn, replaced by each piece of junk: no crash, no answer that does
    not stand where it says."""
    whole = TABLES[name]([EXAMPLES[0], EXAMPLES[2]])
    for path in places(whole):
        for junk in JUNK:
            table = copy.deepcopy(whole)
            part = functools.reduce(operator.getitem, path[:-1], table)
            part[path[-1]] = junk
            for answers in (True, False):
                with contextlib.suppress(DataError):
                    rows = table_rows("x", RawTable(table), Columns(), answers=answers).rows
                    for example in check_rows(rows, True, None).examples:
                        pairs = zip(example.answers, example.answer_starts, strict=True)
                        assert all(example.context.startswith(*pair) for pair in pairs)


# ---- the hub (how a repository gets here: test_hub.py)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(name=content, ...)` writes the repository owner/repo at the commit ccc...; returns its
    folder."""
    folder = tmp_path / "snapshots" / ("c" * 40)
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_split, "snapshot", lambda *_: Snapshot(folder, folder.name))

    def write(**files):
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_bytes(content)
        return folder

    return write


def test_a_hub_data_set_is_read_like_a_file(hub):
    hub(train_jsonl=jsonl(flat(EXAMPLES[:3])), validation_jsonl=jsonl(flat(EXAMPLES[3:])))
    data = load("owner/repo:train[1:]")
    assert data.revision == "c" * 40
    assert data.examples == EXAMPLES[1:3]
    assert data.source == "owner/repo:train[1:]"
    assert load("owner/repo").examples == EXAMPLES[:3]
    both = load("owner/repo:train+validation", unanswerable=True)
    assert both.sha256 == content_sha256(EXAMPLES)


@pytest.mark.parametrize("name", ["MRQA.jsonl.gz", "v1.json", "paragraphs.jsonl", "tabs.tsv"])
def test_a_hub_data_set_of_any_format(hub, name):
    """As datasets reads such files: all lines with all columns, None where a line has none."""
    examples, write, columns = FORMATS[name]
    examples = [e for e in examples if e.answers]
    hub(**{f"train.{name.partition('.')[2]}": write(examples)})
    assert load("owner/repo", **columns).examples == tuple(examples)


def test_a_hub_data_set_with_other_columns(hub):
    hub(train_parquet=parquet(one_answer(FIRSTS)))
    assert load("owner/repo:train", unanswerable=True, **STARTS).examples == FIRSTS


@pytest.mark.parametrize(
    ("name", "files", "error", "told"),
    [
        ("owner/repo:test", {"train_jsonl": ROW}, DataError, 'Unknown split "test"'),
        ("owner/repo#other:train", {"train_jsonl": ROW}, DataError, "'other' not found"),
        ("owner/repo", {"train_jsonl": b"{"}, DataError, "owner/repo: "),
        ("owner/repo", {"train_jsonl": b""}, DataError, "owner/repo: "),
        ("owner/repo", {"train_parquet": b"PAR1 PAR1"}, DataError, "owner/repo: "),
        ("owner/repo", {"repo_py": b"open('canary', 'w')"}, DataError, "No .supported. data files"),
        (
            "owner/repo",
            {"train_jsonl": b'{"a": 1}'},
            DataError,
            "no column 'question'; the c.* 'a'",
        ),
        ("owner/repo", {"train_jsonl": ROW + b"\n" + ROW}, DataError, "repo: row 2: id repeated"),
        ("owner/repo", {}, DataError, "owner/repo.* doesn't contain any data"),
    ],
)
def test_a_hub_data_set_that_is_refused(hub, name, files, error, told):
    hub(**files)
    with pytest.raises(error, match=told):
        load(name)
    assert not os.path.exists("canary")


def test_a_hub_data_set_that_is_not_here_says_how_to_fetch_it(monkeypatch):
    """At once: nobody is asked, and nothing waited for."""

    def asked(*_):
        raise AssertionError("the network is off")

    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.setattr(time, "sleep", asked)
    with pytest.raises(AssetError) as refused:
        load("nobody/nothing@v1.0#plain:train[:10]")
    fetch = "hf download nobody/nothing --repo-type dataset --revision v1.0"
    assert str(refused.value).endswith(fetch)
    assert refused.value.exit_code == 69


@pytest.mark.parametrize("name", ["data/train.txt", "data/train.json.zip", "data/saved"])
@pytest.mark.parametrize("tail", ["", "[:5]", ":train", ":train[:5]"])
def test_what_is_here_is_never_the_hubs(tmp_path, monkeypatch, name, tail):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/saved").mkdir(parents=True)
    for file in ("train.txt", "train.json.zip"):
        (tmp_path / "data" / file).touch()
    what = "folder" if name == "data/saved" else "file"
    told = rf"'{name}' is a {what} here.* \(\.json, \.jsonl, \.csv, \.tsv, each also as "
    for read in (load, lambda name: read_question_rows(name, Columns())):
        with pytest.raises(DataError, match=told):
            read(f"{name}{tail}")


# ---- real questions


@pytest.mark.parametrize(
    ("name", "questions", "unanswerable"),
    [
        ("squadshifts_new_wiki_v1.0.json", 7938, False),
        ("xquad_en_v1.1.json", 1190, False),
        ("squad_v2_dev_half.json", 6078, True),
    ],
)
def test_real_data_sets_hold_no_bad_row(real_data, name, questions, unanswerable):
    data = load(real_data / name, unanswerable=unanswerable)
    assert len(data.examples) == questions
    if unanswerable:
        assert sum(not e.answers for e in data.examples) == 3168
        with pytest.raises(DataError, match="3168 of 6078 rows refused: 3168 x no answer;"):
            load(real_data / name)


@pytest.mark.parametrize(
    "name",
    [
        *("MRQA.jsonl.gz", "MRQA on the hub.parquet", "Label Studio.json", "Label Studio.csv"),
        *("doccano.jsonl", "doccano, relations.jsonl", "pandas.csv", "json in.csv"),
        *("paragraphs.json", "haystack.json", "lists and starts.csv"),
    ],
)
def test_real_questions_come_through_every_format(real_data, tmp_path, name):
    examples = load(real_data / "xquad_en_v1.1.json").examples
    (tmp_path / name).write_bytes(FORMATS[name][1](examples))
    assert load(tmp_path / name).examples == examples


def test_as_many_malformed_data_sets_as_promised():
    assert len(BAD_ROWS) + 2 * len(BAD_ANSWERS) + len(BAD_FILES) >= 60


@pytest.mark.parametrize("kind", ["text", "bytes", "list", "numbers"])
def test_a_parquet_file_is_counted_before_it_is_expanded(tmp_path, kind):
    """64 rows of one text of 24 MB would be 1.5 GB; also as bytes in a column that nobody reads, in
    the list of a single row, or as many equal numbers."""
    text = pyarrow.DictionaryArray.from_arrays([0] * 64, ["x" * 24_000_000])
    columns = {
        "text": {"question": ["q"] * 64, "context": text},
        "bytes": {"question": ["q"] * 64, "other": text.cast(pyarrow.binary())},
        "list": {
            "question": ["q"],
            "answers": pyarrow.StructArray.from_arrays(
                [pyarrow.ListArray.from_arrays([0, 64], text)], ["text"]
            ),
        },
        "numbers": {"other": pyarrow.repeat(pyarrow.scalar(7, pyarrow.int8()), 40_000_000)},
    }[kind]
    path = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd")
    del text, columns
    before = pyarrow.default_memory_pool().max_memory()
    with pytest.raises(DataError, match=r"bytes hold more than [\d,]+ of content"):
        file_rows(path, Columns(), answers=False)
    assert pyarrow.default_memory_pool().max_memory() < max(before, 0) + 2**30
