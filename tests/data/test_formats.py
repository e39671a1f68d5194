"""What real tools write is read as it is meant, told by its name, and refused by line and id."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.data.dataset import load_dataset
from runner.data.formats import file_rows, table_rows
from runner.data.formats.columns import guess_columns, to_declare
from runner.data.formats.files import packed
from runner.data.formats.rows import RawTable, Reading
from runner.data.formats.written import unwritten
from runner.errors import DataError
from runner.job.schema import Columns
from runner.predict.questions import file_questions

ROOT = Path(__file__).parents[2]
LAMP = "The lamp has a shade of washable linen and a base of beech."
ASKED = "What is the shade made of?"


def load(path, *, on_bad_row="fail", unanswerable=True, **columns):
    return load_dataset(
        str(path), columns=Columns(**columns), unanswerable=unanswerable, on_bad_row=on_bad_row
    )


def written(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    listed = f"[{', '.join(lines)}]" if path.suffix == ".json" else "\n".join(lines)
    path.write_text(listed, encoding="utf-8")
    return path


# ---- what was understood

CONTEXT = {"context": LAMP}
QA = {"id": "a", "question": ASKED}
START = {"text": "washable linen", "answer_start": 24}
TASK = {"id": 3, "data": {"passage": LAMP, "ask": ASKED}}
LABELLED = {"start": 24, "end": 38, "labels": ["Answer"]}
DETECTED = {"text": "washable linen", "char_spans": [[24, 37]]}


def annotated(*values):
    return [{"result": [{"value": value, "type": "labels"} for value in values]}]


UNDERSTOOD = {
    "SQuAD": (
        "x.json",
        [{"title": "T", "paragraphs": [{**CONTEXT, "qas": [{**QA, "answers": [START]}]}]}],
        "SQuAD's articles, 1 question",
    ),
    "simpletransformers": (
        "x.json",
        [{**CONTEXT, "qas": [{**QA, "is_impossible": False, "answers": [START]}]}],
        "SQuAD's paragraphs without articles (simpletransformers), 1 question",
    ),
    "MRQA": (
        "x.jsonl",
        [{"header": {}}, {**CONTEXT, "qas": [{**QA, "detected_answers": [DETECTED]}]}],
        "MRQA, 1 question",
    ),
    "Label Studio": (
        "x.json",
        [{**TASK, "annotations": annotated({**LABELLED, "text": "washable linen"})}],
        "Label Studio's JSON, question in 'ask', text in 'passage', 1 question",
    ),
    "Label Studio, JSON-MIN": (
        "x.json",
        [
            {
                **{"id": 3, "annotator": 1, "annotation_id": 9, "text": LAMP, "frage": ASKED},
                "marked": [{**LABELLED, "text": "washable linen"}],
            }
        ],
        "Label Studio's JSON-MIN, question in 'frage', text in 'text', 1 question",
    ),
    "doccano": (
        "x.jsonl",
        [{"id": 1, "text": LAMP, "label": [[24, 38, "A"]], "Comments": [ASKED]}],
        "doccano's lines, question in 'comment', text in 'text', 1 question",
    ),
    "rows": (
        "x.jsonl",
        [{**QA, **CONTEXT, "answers": ["washable linen"]}],
        "rows of question, con",
    ),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_a_file_is_told_by_its_format_and_read(tmp_path, case):
    name, rows, told = UNDERSTOOD[case]
    data = load(written(tmp_path / name, rows))
    assert data.read_as.startswith(told)
    (example,) = data.examples
    assert (example.question, example.context) == (ASKED, LAMP)
    assert (example.answers, example.answer_starts) == (("washable linen",), (24,))
    (asked,) = [row for group in file_questions(str(tmp_path / name), Columns()) for row in group]
    assert (asked.id, asked.question, asked.context) == (example.id, ASKED, LAMP)


# ---- spans

SHADE = "The lamp's \U0001f4a1 shade:\nWASHABLE linen; twice washable linen."
SPELLINGS = {
    "as it stands": ((20, 34), "WASHABLE linen", "WASHABLE linen"),
    "in small letters": ((20, 34), "washable linen", "WASHABLE linen"),
    "no text": ((20, 34), None, "WASHABLE linen"),
    "line end as two signs": ((13, 34), "shade:\\nWASHABLE linen", "shade:\nWASHABLE linen"),
    "normalised": ((0, 8), "lamp", "The lamp"),
}


@pytest.mark.parametrize("case", SPELLINGS)
@pytest.mark.parametrize("tool", ["MRQA", "Label Studio"])
def test_a_span_is_taken_in_the_contexts_own_spelling(tmp_path, tool, case):
    (start, end), text, taken = SPELLINGS[case]
    if tool == "MRQA":
        found = {"text": text, "char_spans": [[start, end - 1]]}
        line = {"context": SHADE, "qas": [{**QA, "detected_answers": [found]}]}
        file = written(tmp_path / "x.jsonl", [line])
    else:
        value = {"start": start, "end": end, "text": text}
        task = {"data": {"context": SHADE, "question": ASKED}, "annotations": annotated(value)}
        file = written(tmp_path / "x.json", [task])
    (example,) = load(file).examples
    assert (example.answers, example.answer_starts) == ((taken,), (start,))


BAD_SPANS = {
    "other words": ((20, 34), "washable lino", '"washable lino" declared at 20, where "WASHABLE'),
    "one off": ((21, 35), "WASHABLE linen", "counted from 1"),
    "behind the end": ((99, 104), None, "answer_start is outside the context (99, of 57"),
    "nothing marked": ((5, 5), None, '("characters 5 to 5" declared at 5'),
    "before the beginning": ((-4, 3), None, "answer_start is outside the context (-4, of 57"),
    "a path": (
        ("/p[1]/text()[1]", "/p[1]/text()[1]"),
        "linen",
        "answer_start is text, not a whole",
    ),
    "a sign": ((18, 19), "%", '"%" declared at 18, where ":"'),
}


@pytest.mark.parametrize("case", BAD_SPANS)
@pytest.mark.parametrize("tool", ["MRQA", "Label Studio", "doccano"])
def test_a_wrong_span_is_refused_by_line_and_id(tmp_path, tool, case):
    (start, end), text, why = BAD_SPANS[case]
    if tool == "doccano" and text is not None:
        pytest.skip("doccano writes places alone")
    good = {"question": "Where?", "id": "good"}
    if tool == "MRQA":
        last = end - 1 if isinstance(end, int) else end
        found = {"text": text, "char_spans": [[start, last]]}
        qas = [{**q, "detected_answers": d} for q, d in ((good, []), ({**QA, "id": "b7"}, [found]))]
        file = written(tmp_path / "x.jsonl", [{"header": {}}, {"context": SHADE, "qas": qas}])
        place = "x.jsonl:2: b7 (question 2): "
    elif tool == "Label Studio":
        value = {"start": start, "end": end, "text": text}
        tasks = [
            {"id": n, "data": {"context": SHADE, "question": ASKED}, "annotations": annotated(*v)}
            for n, v in ((6, []), (7, [value]))
        ]
        file, place = written(tmp_path / "x.json", tasks), "x.json: row 2: 7: "
    else:
        lines = [
            {"id": n, "text": SHADE, "question": ASKED, "label": label}
            for n, label in ((6, []), (7, [[start, end, "A"]]))
        ]
        file, place = written(tmp_path / "x.jsonl", lines), "x.jsonl:2: 7: "
    with pytest.raises(DataError) as refused:
        load(file)
    summary, line = str(refused.value).split("\n")
    assert "1 of 2 rows refused" in summary
    assert line.startswith(f"  {place}")
    assert why in line
    assert len(load(file, on_bad_row="drop").examples) == 1


BAD_MRQA = {
    "a list of texts": (["linen"], "detected_answers are not tables with text and char_spans"),
    "a text": ("linen", "detected_answers are not tables with text and char_spans"),
    "no spans": ([{"text": "linen"}], "detected_answers have no char_spans"),
    "spans of three": ([{"text": "linen", "char_spans": [[1, 2, 3]]}], "have no char_spans"),
    "an end that is text": (
        [{"text": "linen", "char_spans": [[1, "2"]]}],
        "answer text not at answer_start: ",
    ),
    "no text and no end": ([{"char_spans": [[1, None]]}], "no answer"),
}


@pytest.mark.parametrize("case", BAD_MRQA)
def test_what_mrqa_does_not_write_is_refused(tmp_path, case):
    found, why = BAD_MRQA[case]
    line = {**CONTEXT, "qas": [{**QA, "detected_answers": found}]}
    with pytest.raises(DataError, match=rf"x\.jsonl:1: a \(question 1\): [^\n]*{re.escape(why)}"):
        load(written(tmp_path / "x.jsonl", [line]), unanswerable=False)


def test_an_end_that_is_exclusive_after_all_is_known_by_its_text(tmp_path):
    found = {"text": "washable linen", "char_spans": [[24, 38]]}
    line = {**CONTEXT, "qas": [{**QA, "detected_answers": [found]}]}
    assert load(written(tmp_path / "x.jsonl", [line])).examples[0].answers == ("washable linen",)


def test_mrqa_lines_without_detected_answers_are_paragraphs(tmp_path):
    line = {**CONTEXT, "qas": [{**QA, "qid": "q", "answers": ["washable linen"]}]}
    data = load(written(tmp_path / "x.jsonl", [{"header": {"dataset": "X"}}, line]))
    assert data.read_as == "MRQA, 1 question"
    assert data.examples[0].answer_starts == (24,)


# ---- Label Studio, doccano


def test_who_annotated_and_what_was_skipped(tmp_path):
    """Answers of all annotators, each once; a task without an answer; one that all have skipped."""
    linen, base = (
        {"start": 24, "end": 38, "text": "washable linen"},
        {"start": 15, "end": 38, "text": "shade of washable linen"},
    )
    both = [*annotated(linen), *annotated(base, linen), {"was_cancelled": True, "result": [5]}]
    tasks = [{**TASK, "annotations": a} for a in (both, annotated(), [{"was_cancelled": True}], [])]
    file = written(tmp_path / "x.json", [{**task, "id": n} for n, task in enumerate(tasks)])
    with pytest.raises(DataError, match="2 of 4 rows refused: 2 x no annotation that was not skip"):
        load(file)
    read = load(file, on_bad_row="drop").examples
    assert [e.id for e in read] == ["0", "1"]
    assert [e.answer_starts for e in read] == [(24, 15), ()]


def test_fields_of_a_tool_may_be_named_and_are_asked_for(tmp_path):
    fields = {"a": LAMP, "b": "shade material", "c": "lamps"}
    task = {"data": fields, "annotations": annotated({**LABELLED, "text": "washable linen"})}
    file = written(tmp_path / "x.json", [task])
    told = r"none of its fields \('a', 'b', 'c'\) is the question; .*\[data.columns\]: question = "
    for columns in ({}, {"question": "frage"}):
        with pytest.raises(DataError, match=told):
            load(file, **columns)
    assert load(file, question="b").examples[0].question == "shade material"
    with pytest.raises(DataError, match="is the context; "):
        load(file, question="b", context="text")


@pytest.mark.parametrize("tool", ["Label Studio", "Label Studio, JSON-MIN", "doccano"])
def test_of_several_labels_the_one_of_answers_is_asked_for(tmp_path, tool):
    """Never all spans silently: neither of several labels nor of several controls."""
    shade, base = (
        {"start": 15, "end": 20, "text": "shade"},
        {"start": 53, "end": 58, "text": "beech"},
    )
    fields = {"text": LAMP, "question": ASKED}
    if tool == "doccano":
        line = {**fields, "label": [[15, 20, "Evidence"], [53, 58, "Answer"]]}
        file = written(tmp_path / "x.jsonl", [line])
    elif tool == "Label Studio":
        values = [{**shade, "labels": ["Evidence"]}, {**base, "labels": ["Answer"]}]
        file = written(tmp_path / "x.json", [{"data": fields, "annotations": annotated(*values)}])
    else:
        row = {**fields, "annotator": 1, "annotation_id": 2, "Answer": [base], "Evidence": [shade]}
        file = written(tmp_path / "x.json", [row])
    with pytest.raises(
        DataError, match=r"several \w+ \('Answer', 'Evidence'\); name the one that ma"
    ):
        load(file)
    assert load(file, answer="Answer").examples[0].answers == ("beech",)
    (asked,) = [row for group in file_questions(str(file), Columns()) for row in group]
    assert asked.question == ASKED


def test_a_column_of_answers_that_is_named_is_read_as_rows(tmp_path):
    row = {"question": ASKED, "text": LAMP, "label": ["washable linen"], "entities": [[0, 3, "A"]]}
    file = written(tmp_path / "x.jsonl", [row])
    assert load(file, context="text", answer="label").examples[0].answer_starts == (24,)


# ---- written as text

WRITTEN = {
    "{'text': array(['x', 'y'], dtype=object), 'answer_start': array([3, 4], dtype=int32)}": {
        "text": ["x", "y"],
        "answer_start": [3, 4],
    },
    "{'text': array([], dtype=object), 'answer_start': array([], dtype=float64)}": {
        "text": [],
        "answer_start": [],
    },
    '{"text": ["x"], "answer_start": [null]}': {"text": ["x"], "answer_start": [None]},
    "[{'text': 'it\\'s', 'answer_start': nan}]": [{"text": "it's", "answer_start": None}],
    "['a' 'b \"c\"'\n \"d'e\"]": ["a", 'b "c"', "d'e"],
    "[1 2\n 3]": [1, 2, 3],
    "[np.str_('x'), np.int64(3), np.True_]": "[np.str_('x'), np.int64(3), np.True_]",
    "[np.str_('x'), np.int64(-3)]": ["x", -3],
    "array(['x'], dtype='<U1')": ["x"],
    "['x', ...]": "['x', ...]",
    "[open('canary', 'w')]": "[open('canary', 'w')]",
    "[().__class__]": "[().__class__]",
    "{'a': {1: [}": "{'a': {1: [}",
    "{[]: 1}": "{[]: 1}",
    "['\\d']": "['\\d']",
    "[" * 5000 + "]" * 5000: "[" * 5000 + "]" * 5000,
    "[1]": [1],
    "no list": "no list",
}


@pytest.mark.parametrize("text", WRITTEN, ids=lambda text: text[:40])
def test_tables_and_lists_in_text_are_read_and_nothing_is_run(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert unwritten(text) == WRITTEN[text]
    assert not list(tmp_path.iterdir())


def test_what_is_too_long_to_be_answers_stays_text():
    assert isinstance(unwritten(f"['{'x' * 1_000_000}']"), str)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), max_size=3
    ),
    st.sampled_from(
        [repr, str, lambda v: str(np.array(v, dtype=object)), lambda v: repr(np.array(v))]
    ),
)
def test_whatever_texts_a_list_holds_they_are_read_or_left(texts, spell):
    found = unwritten(spell(texts))
    assert list(found) == texts or isinstance(found, str)


@settings(max_examples=300, deadline=None)
@given(st.text("[](){}'\",:=\\ \n1-.enarydtp", max_size=30))
def test_no_text_breaks_the_reader(text):
    for whole in (text, f"[{text}]", f"{{{text}}}"):
        unwritten(whole)


def test_an_answer_in_brackets_is_an_answer(tmp_path):
    row = {**QA, "context": "See [1] and ['x'].", "answer": "['x']"}
    assert load(written(tmp_path / "x.jsonl", [row])).examples[0].answers == ("['x']",)


# ---- gzip

PACKED = gzip.compress(json.dumps({**QA, **CONTEXT, "answer": "linen"}).encode())
DAMAGED = {
    "cut": (PACKED[:-9], "not valid gzip: Compressed file ended before"),
    "cut in its head": (PACKED[:7], "not valid gzip: "),
    "another sum": (PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "not valid gzip: CRC check failed"),
    "junk inside": (PACKED[:12] + b"\xff" * 8 + PACKED[20:], "not valid gzip: "),
    "junk behind": (PACKED + b"junk", "not valid gzip: Not a gzipped file"),
    "no gzip": (b"PK\x03\x04\xff", "byte 0xff is not UTF-8"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_gz_is_one_line(tmp_path, case):
    content, why = DAMAGED[case]
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.jsonl\.gz:.*{why}") as refused:
        load(tmp_path / "x.jsonl.gz")
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 65


def test_a_gz_is_not_expanded_beyond_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_FREE", 2**20)
    raw = gzip.compress(b" " * 2**22)
    limit = packed.expansion_limit(len(raw))
    assert limit < 2**22
    (tmp_path / "x.json.gz").write_bytes(raw)
    with pytest.raises(DataError, match=f"{len(raw):,} bytes hold more than {limit:,} of content"):
        file_rows(tmp_path / "x.json.gz", Columns())
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b" " * 2**20))
    assert file_rows(tmp_path / "x.json.gz", Columns()).rows == []


# ---- the hub's tables


def test_layouts_are_known_in_a_table_of_the_hub_too():
    """datasets gives every row all columns, and makes tables of lists of a list of tables."""
    lines = [
        {"header": {"dataset": "X"}, "context": None, "qas": None},
        {
            "header": None,
            **CONTEXT,
            "qas": [{"qid": "q", "question": ASKED, "detected_answers": [DETECTED]}],
        },
    ]
    table = pyarrow.Table.from_pylist(lines)
    reading = table_rows("hub", RawTable(table.to_pylist(), table.column_names), Columns())
    assert (reading.format, reading.rows[0].answers) == ("MRQA", [("washable linen", 24)])
    articles = [{"paragraphs": [{**CONTEXT, "qas": [{**QA, "answers": [START]}]}]}]
    table = pyarrow.Table.from_pylist(articles)
    reading = table_rows("hub", RawTable(table.to_pylist(), table.column_names), Columns())
    assert (reading.format, len(reading.rows)) == ("SQuAD's articles", 1)


# ---- which column is what

REVIEW = "We loved the view. Breakfast was cold and dear. ANSWERNOTFOUND"
TABLES = {
    "other names": (
        [{"nr": 1, "Frage": "Wie war der Blick?", "Text": "Der Blick war gut.", "Antwort": "gut"}],
        {"question": "Frage", "context": "Text", "answer": "Antwort"},
    ),
    "reviews": (
        [
            {
                **{"domain": "hotels", "nn_asp": "view", "query_mod": "good", "item_id": "x"},
                **{"question": "How was the breakfast?", "review": REVIEW, "review_id": "r1"},
                **{"human_ans_spans": "Breakfast was cold", "human_ans_indices": "(19, 37)"},
            },
            {
                **{"domain": "hotels", "nn_asp": "dear", "query_mod": "bad", "item_id": "x"},
                **{"question": "How was the pool?", "review": REVIEW, "review_id": "r1"},
                **{"human_ans_spans": "ANSWERNOTFOUND", "human_ans_indices": "(48, 62)"},
            },
        ],
        {
            **{"question": "question", "context": "review", "answer": "human_ans_spans"},
            "answer_start": "human_ans_indices",
        },
    ),
    "by content alone": (
        [
            {"c1": f"k{n}", "c2": "Where is it?", "c3": f"It is in room {n}.", "c4": f"room {n}"}
            for n in range(3)
        ],
        {"question": "c2", "context": "c3", "answer": "c4"},
    ),
    "nested": (
        [{"query": "Where?", "doc": LAMP, "gold": {"text": ["linen"], "answer_start": [33]}}],
        {"question": "query", "context": "doc", "answer": "gold"},
    ),
    "no answers": (
        [{"q": "Where?", "passage": LAMP, "title": "lamps"}],
        {"question": "q", "context": "passage"},
    ),
    "no text at all": (
        [{"questionText": "Does it fit?", "answerText": "Yes", "snippets": ["It fits well."]}],
        {"question": "questionText", "context": None, "answer": None},
    ),
    "nothing": ([{"x": 1, "y": 2}], {}),
}


@pytest.mark.parametrize("case", TABLES)
def test_columns_are_guessed_by_their_names_and_by_what_they_hold(case):
    rows, expected = TABLES[case]
    found = guess_columns(rows, list(rows[0]))
    assert {key: found.get(key) for key in expected} == expected
    assert set(found) - set(expected) <= {"id"}


def test_the_columns_to_add_are_told(tmp_path):
    rows, guessed = TABLES["other names"]
    file = written(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError) as refused:
        load(file)
    lines = str(refused.value).partition("name them in [data.columns]: ")[2]
    assert lines == 'id = "nr", question = "Frage", context = "Text", answer = "Antwort"'
    assert load(file, **guessed).examples[0].answers == ("gut",)
    assert to_declare({"answer": "answer", "question": "q"}, ["answers", "answer"]) == {
        "answer": "answer",
        "question": "q",
    }


# ---- a format of one's own


def test_the_example_of_another_format_is_one():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "_rows(" in b]
    module: dict = {}
    exec(compile(block, "CONTRIBUTING.md", "exec"), module)
    (layout,) = [value for name, value in module.items() if name.endswith("_rows")]
    line = {"text": LAMP, "spans": [{"start": 24, "end": 38, "label": "ANSWER"}], "question": ASKED}
    for answers in (True, False):
        reading = layout("x.jsonl", RawTable([line], lines=[1]), Columns(), answers=answers)
        assert isinstance(reading, Reading)
        (row,) = reading.rows
        assert (row.question, row.context) == (ASKED, LAMP)
        assert row.answers == ([("washable linen", 24)] if answers else [])
        assert row.place.startswith("x.jsonl:1")
    assert layout("x.jsonl", RawTable([{**QA, **CONTEXT}]), Columns(), answers=True) is None
