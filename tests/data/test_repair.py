"""Answers that stand a little elsewhere are mended, each to its own words, and none by a guess."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from runner.data.dataset import load_dataset
from runner.data.formats.repair import Repairer
from runner.data.formats.rows import Row
from runner.errors import DataError
from runner.job.schema import Columns

DATA = Path(os.environ.get("SPANTUNE_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))
CONTEXT = "The shade is washable linen, the base beech. It is 40 cm high; the cord is 2 m long."


def mend(text, start, context=CONTEXT, others=()):
    rows = [Row("d", "a", "?", context, [(text, start), *others])]
    return Repairer(rows).mend(text, start, context)


@pytest.mark.parametrize(
    ("text", "start", "used", "why"),
    [
        ("washable linen", 14, (13, "washable linen"), "stands 1 character earlier"),
        ("washable linen", 8, (13, "washable linen"), "stands 5 characters later"),
        (" washable linen", 13, (13, "washable linen"), "blanks around it"),
        ("washable  linen ", 13, (13, "washable linen"), "white space differs"),
        ("Washable Linen", 12, (13, "washable linen"), "stands 1 character later, case differs"),
        ("beech", 5, (38, "beech"), "stands 33 characters later"),  # its only place
        ("beech", None, (38, "beech"), "its only place"),
        ("BEECH", "38-43", (38, "beech"), "case differs"),
    ],
)
def test_an_answer_is_mended(text, start, used, why):
    # Beside an answer that stands where it should: what is wrong is not how the file counts.
    found = mend(text, start, others=[("40 cm", 51)])
    assert found == (used[1], used[0], why)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("the", 500),  # four places, none near
        ("is", 47),  # the nearest is not the only one near
        ("linen shade", 13),  # other words
        ("washable", None),
        ("cotton", 13),
        ("", 13),
        ("2", 55),
    ],
)
def test_a_guess_is_none(text, start):
    contexts = {"washable": "washable or washable", "is": "x is is is y", "2": "2 m, 2 cm"}
    context = contexts.get(text, CONTEXT)
    start = context.index("is") + 2 if text == "is" else start
    assert mend(text, start, context, others=[("x", 0)]) is None


def test_words_come_before_letters_inside_one():
    context = "Ann's part, art too."
    assert context.index("art") == 7  # nearer to 9, and inside a word
    assert mend("art", 9, context, [("Ann", 0)]) == ("art", 12, "stands 3 characters later")
    assert mend("art", 6, context, [("Ann", 0)]) == ("art", 7, "stands 1 character later")


def _damaged(way, context, text, start):
    words = text.split(" ")
    return {
        "one later": lambda: (text, start + 1),
        "one earlier": lambda: (text, start - 1),
        "three later": lambda: (text, start + 3),
        "leading blank": lambda: (f" {text}", start),
        "trailing blanks": lambda: (f"{text}  ", start),
        "leading blank, one off": lambda: (f" {text}", start + 1),
        "upper case": lambda: (text.upper(), start),
        "double blanks": lambda: ("  ".join(words), start),
        "line breaks": lambda: ("\n".join(words), start),
        "other form": lambda: (unicodedata.normalize("NFD", text), start),
    }[way]()


def real_questions():
    path = DATA / "xquad_en_v1.1.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    for article in json.loads(path.read_text("utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answer = qa["answers"][0]
                yield qa["question"], paragraph["context"], answer["text"], answer["answer_start"]


WAYS = (
    *("one later", "one earlier", "three later", "leading blank", "trailing blanks"),
    *("leading blank, one off", "upper case", "double blanks", "line breaks", "other form"),
)


def load(tmp_path, rows, on_bad_row="repair", name="d.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return load_dataset(str(path), columns=Columns(), unanswerable=False, on_bad_row=on_bad_row)


def as_row(number, question, context, text, start):
    answers = {"text": [text], "answer_start": [start]}
    return {"id": f"q{number}", "question": question, "context": context, "answers": answers}


@pytest.mark.parametrize("way", WAYS)
def test_real_answers_damaged_come_back_whole(way):
    """All that are one off or have other blanks or letters, nearly all three off; none wrongly."""
    whole = list(real_questions())
    damaged = [_damaged(way, context, text, start) for _, context, text, start in whole]
    rows = [Row("d", "a", "?", w[1], [answer]) for w, answer in zip(whole, damaged, strict=True)]
    # One that is right: what is wrong with the others is not how the file counts.
    repairer = Repairer([*rows, Row("d", "x", "?", "Ann ran.", [("Ann", 0)])])
    mended = 0
    for (_, context, text, start), answer in zip(whole, damaged, strict=True):
        found = repairer.mend(*answer, context)
        if found is not None:
            used, at, _ = found
            blanks = len(used) - len(used.lstrip())
            assert (used.strip(), at + blanks) == (text, start)
            mended += 1
    assert mended >= (0.99 if way == "three later" else 1) * len(whole)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("in bytes", lambda before: len(before.encode())),
        ("in UTF-16 units", lambda before: len(before.encode("utf-16-le")) // 2),
        ("from 1", lambda before: len(before) + 1),
        ("with \\r\\n line ends", lambda before: len(before) + before.count("\n")),
    ],
)
def test_a_file_that_counts_otherwise_is_converted_whole(name, count, tmp_path):
    context = "Ein Café 😀 am Fluß.\nEs öffnet um 7, um 8 öffnet der Markt, um 99 ist 9 nah."
    texts = ["Café", "am Fluß", "öffnet", "um 8", "Markt", "9"]
    places = [context.rindex(text) for text in texts]
    rows = [
        as_row(n, "was?", context, text, count(context[:at]))
        for n, (text, at) in enumerate(zip(texts, places, strict=True))
    ]
    found = load(tmp_path, rows)
    assert [e.answer_starts for e in found.examples] == [(at,) for at in places]
    assert all(e.answers == (text,) for e, text in zip(found.examples, texts, strict=True))
    assert {repair.why for repair in found.repairs} == {f"counted {name}"}
    # Where one says otherwise, nobody knows how the others count.
    found = load(tmp_path, [rows[0], as_row("x", "wer?", "Ann, Ann ran", "Ann", 5)])
    assert "counted" not in str(found.repairs)


def test_refused_data_say_what_can_be_mended(tmp_path):
    rows = [
        as_row("a", "what?", CONTEXT, "linen", 23),
        as_row("b", "who?", CONTEXT, "nobody", 3),
        as_row("c", "what?", CONTEXT, "beech", 38),
    ]
    with pytest.raises(DataError, match='"repair" would mend 1 of them, "drop" leaves out all'):
        load(tmp_path, rows, "fail")
    with pytest.raises(DataError, match="1 of 3 rows refused: 1 x answer is not in the context"):
        load(tmp_path, [rows[0], as_row("b", "who?", CONTEXT, "nobody", None), rows[2]])
    (repair,) = load(tmp_path, [rows[0], rows[2]]).repairs
    assert str(repair) == (
        'd.jsonl:1: "linen" at 23 taken as "linen" at 22 (stands 1 character earlier)'
    )


def test_a_text_may_mean_no_answer(tmp_path):
    """Subjective reviews are annotated so: a marker ends each text, to be chosen there."""
    rows = [
        as_row("a", "how is it?", f"{CONTEXT} NOANSWER", "washable linen", "(13, 27)"),
        as_row("b", "who?", f"{CONTEXT} NOANSWER", "NOANSWER", f"({len(CONTEXT) + 1}, 99)"),
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found = load_dataset(
        str(path), columns=Columns(), unanswerable=True, on_bad_row="fail", no_answer="NOANSWER"
    )
    assert [(e.context, e.answers, e.answer_starts) for e in found.examples] == [
        (CONTEXT, ("washable linen",), (13,)),
        (CONTEXT, (), ()),
    ]
    assert found.contradictions == (
        "1 of 2 questions are answered NOANSWER: taken as without an answer",
        "1 context(s) end in NOANSWER, which is cut off",
    )
