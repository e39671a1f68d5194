"""Windows against the tokenizer's own overflow, labels against their definition and run_qa's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from runner.data.dataset import Example, load_dataset
from runner.data.tokenize import plain_backend
from runner.data.windows import Windows, build_windows, window_blocks
from runner.errors import BadRowsError, DataError
from runner.job.schema import Columns, Model
from runner.model.load import ModelFiles, load_tokenizer

TOKENIZERS = (
    "bert",
    "distilbert",
    "roberta",
    "electra",
    "albert",
    "roberta-prefix",
    "roberta-untrimmed",
    "bert-left",
    "bert-settings",
    "trailing-cls",
)
FIELDS = dataclasses.fields(Windows)
CONTEXT = "The lantern folds flat; its battery lasts nine hours on the bright setting. " * 3


@pytest.fixture(scope="module")
def tokenizer_of(tiny):
    """`tokenizer_of(kind)`: a tiny tokenizer; "trailing-cls" ends its pairs in [CLS], as XLNet."""
    made = {}

    def make(kind):
        if kind not in made:
            trailing = kind == "trailing-cls"
            made[kind] = AutoTokenizer.from_pretrained(tiny("bert" if trailing else kind))
            if trailing:
                backend = made[kind].backend_tokenizer
                backend.post_processor = processors.TemplateProcessing(
                    single="$A:0 [SEP]:0 [CLS]:2",
                    pair="$A:0 [SEP]:0 $B:1 [SEP]:1 [CLS]:2",
                    special_tokens=[("[SEP]", 3), ("[CLS]", 2)],
                )
                made[kind] = PreTrainedTokenizerFast(
                    tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]"
                )
        return made[kind]

    return make


# ---- the oracles


def own_windows(examples, tokenizer, max_length, stride):
    """What the tokenizer itself cuts, window by window: question, token ids, segment ids, positions
    of the context, and the tokenizer's offsets there."""
    cut = tokenizer(
        [(e.question.lstrip(), e.context) for e in examples],
        return_offsets_mapping=True,
        return_token_type_ids=True,
        padding=False,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
    )
    rows = []
    for window, place in enumerate(cut["overflow_to_sample_mapping"]):
        inside = [n for n, part in enumerate(cut.sequence_ids(window)) if part == 1]
        offsets = [cut["offset_mapping"][window][n] for n in inside]
        ids, types = cut["input_ids"][window], cut["token_type_ids"][window]
        rows.append((place, ids, types, inside, offsets))
    return rows


def run_qa_label(example, inside, offsets, cls):
    """First and last token as run_qa's prepare_train_features has them.

    Where its start would run past the context into special tokens or padding ("edge case" in its
    own comment), it stays inside.
    """
    if not example.answers or not inside:
        return cls, cls
    begin = example.answer_starts[0]
    end = begin + len(example.answers[0])
    if offsets[0][0] > begin or offsets[-1][1] < end:
        return cls, cls
    first = max(n for n, (low, _) in enumerate(offsets) if low <= begin)
    last = min(n for n, (_, high) in enumerate(offsets) if high >= end)
    return inside[first], inside[last]


def window_rows(windows, n):
    """Rows of chars_C2 that the context of window n has."""
    return range(*(int(windows.chars_firsts_N[n]) + windows.contexts_N2[n]).tolist())


def as_own(windows):
    """Windows spelled like the tokenizer's, without offsets."""
    rows = []
    for n in range(len(windows)):
        part = slice(*windows.firsts_N1[n : n + 2])
        inside = list(range(*windows.contexts_N2[n].tolist()))
        tokens, types = windows.tokens_T[part].tolist(), windows.types_T[part].tolist()
        rows.append((int(windows.questions_N[n]), tokens, types, inside))
    return rows


def overlapping(windows, asked):
    """Labels as they are defined: the tokens that overlap the first answer without its outer blanks
    in windows that hold all of these, else [CLS]."""
    over = [set() for _ in asked]
    held = [set(window_rows(windows, n)) for n in range(len(windows))]
    for n, question in enumerate(windows.questions_N.tolist()):
        for text, start in zip(asked[question].answers, asked[question].answer_starts, strict=True):
            begin = start + len(text) - len(text.lstrip())
            end = begin + len(text.strip())
            over[question] |= {
                row
                for row in held[n]
                if windows.chars_C2[row, 0] < end and windows.chars_C2[row, 1] > begin
            }
    labels = []
    for n, question in enumerate(windows.questions_N.tolist()):
        mine = sorted(row - int(windows.chars_firsts_N[n]) for row in over[question])
        whole = mine and over[question] <= held[n]
        labels.append((mine[0], mine[-1]) if whole else (int(windows.cls_N[n]),) * 2)
    return labels


def labels_of(windows):
    return list(zip(windows.starts_N.tolist(), windows.ends_N.tolist(), strict=True))


def ask(context, question="When?", answer=None, name="q"):
    """A question whose answer is context[answer[0]:answer[1]]."""
    if answer is None:
        return Example(name, question, context, (), ())
    return Example(name, question, context, (context[slice(*answer)],), (answer[0],))


# ---- windows and labels

WORDS = [
    "lantern",
    "Café",
    "NINE",
    "hours",
    "folds",
    "x",
    "1912",
    "(",
    "résumé",
    "naïve",
    "de\u0301",
]
ODD = [
    "😀",
    "日本",
    "é",
    "e\u0301",
    "\u200b",
    "\u00ad",
    "\ufb01",
    "İ",
    "ß",
    "\u3000",
    "\r\n",
    "½",
    "ﷺ",
]
pieces = st.sampled_from(WORDS + ODD) | st.text(max_size=4)
texts = st.lists(
    st.tuples(pieces, st.sampled_from([" ", " ", "", "  ", "\n", "\t", "\u00a0", ", "])),
    max_size=40,
).map(lambda parts: "".join(piece + gap for piece, gap in parts).replace("\0", ""))


@st.composite
def questions(draw):
    contexts = draw(st.lists(texts.filter(str.strip), min_size=1, max_size=2))
    asked = []
    for number in range(draw(st.integers(1, 4))):
        context = contexts[number % len(contexts)]
        begin = draw(st.integers(0, len(context) - 1))
        end = min(len(context), begin + draw(st.integers(1, 12)))
        answer = None if draw(st.integers(0, 9)) == 0 else (begin, end)
        question = draw(st.sampled_from(["Who?", "  When was it printed?", "日本 what", " "]))
        asked.append(ask(context, question, answer, f"q{number}"))
    return asked


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(asked=[ask("Well 😀 done", "Who?", (5, 6))], max_length=64, stride=4)
@example(asked=[ask("日本日本日本日本日本", "Who?", (4, 5))], max_length=24, stride=3)
@given(asked=questions(), max_length=st.integers(40, 90), stride=st.integers(0, 8))
def test_windows_are_the_tokenizers_and_labels_the_tokens_of_the_answer(
    tokenizer_of, kind, asked, max_length, stride
):
    tokenizer = tokenizer_of(kind)
    try:
        windows = build_windows(asked, tokenizer, max_length, stride)
    except DataError as error:
        assume("answer is in no token" not in str(error))
        raise
    own = own_windows(asked, tokenizer, max_length, stride)
    assert as_own(windows) == [row[:4] for row in own]
    for n, (_, ids, *_) in enumerate(own):
        assert int(windows.cls_N[n]) == ids.index(tokenizer.cls_token_id)
    assert labels_of(windows) == overlapping(windows, asked)


REAL = {  # questions, windows, answers that end inside a token, labels in which run_qa's rule errs
    "squadshifts_new_wiki_v1.0.json": (7938, 8034, 12, 0),
    "squad_v2_dev_half.json": (6078, 6284, 2, 0),
    "xquad_en_v1.1.json": (1190, 1219, 1, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_every_real_question_has_the_tokens_of_its_answer(real_data, minilm, name):
    data = load_dataset(
        str(real_data / name), columns=Columns(), unanswerable=True, on_bad_row="fail"
    )
    tokenizer = load_tokenizer(ModelFiles.locate(Model(name=minilm)))
    windows = build_windows(data.examples, tokenizer, 384, 128)
    own = own_windows(data.examples, tokenizer, 384, 128)
    assert as_own(windows) == [row[:4] for row in own]
    inexact, wrong = set(), set()
    for n, (place, _, _, inside, offsets) in enumerate(own):
        asked = data.examples[place]
        label = int(windows.starts_N[n]), int(windows.ends_N[n])
        if windows.answered_N[n]:
            first = int(windows.chars_firsts_N[n])
            low, high = windows.chars_C2[first + label[0], 0], windows.chars_C2[first + label[1], 1]
            if asked.context[low:high] != asked.answers[0].strip():
                begin = asked.answer_starts[0]
                end = begin + len(asked.answers[0])
                chars_C2 = windows.chars_C2[window_rows(windows, n)]
                assert not (begin in chars_C2[:, 0] and end in chars_C2[:, 1])
                inexact.add(asked.id)
        if run_qa_label(asked, inside, offsets, int(windows.cls_N[n])) != label:
            wrong.add(asked.id)
    assert (len(data.examples), len(windows), len(inexact), len(wrong)) == REAL[name]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param((4, 9), [(6, 6), (0, 0)], id="in the first window"),
        pytest.param((16, 30), [(8, 9), (5, 6)], id="in both"),
        pytest.param((31, 36), [(0, 0), (7, 7)], id="in the second"),
        pytest.param((10, 36), [(0, 0), (0, 0)], id="in none whole"),
        pytest.param(None, [(0, 0), (0, 0)], id="nowhere"),
    ],
)
def test_windows_without_the_answer_point_at_cls(tokenizer_of, answer, expected):
    # [CLS] wrote wrote ? [SEP], five tokens of the context, two of them shared, [SEP]
    context = "The river folds battery before beech the"
    asked = [ask(context, "wrote wrote?", answer)]
    windows = build_windows(asked, tokenizer_of("bert"), 11, 2)
    labels = list(zip(windows.starts_N.tolist(), windows.ends_N.tolist(), strict=True))
    assert labels == expected
    assert windows.answered_N.tolist() == [label != (0, 0) for label in expected]


def test_the_question_is_stripped_on_the_left_only(tokenizer_of):
    spaced, plain = (
        build_windows([ask(CONTEXT, question)], tokenizer_of("roberta-untrimmed"), 200, 8)
        for question in (" \n When? ", "When? ")
    )
    assert spaced.tokens_T.tolist() == plain.tokens_T.tolist()


@pytest.mark.parametrize(("words", "left"), [(30, 7), (29, 8), (60, 0)])
def test_a_question_that_leaves_no_room_is_refused(tokenizer_of, words, left):
    asked = [ask(CONTEXT), ask(CONTEXT, "the " * words, name="long-one"), ask("Short.", "the " * 9)]
    told = rf"long-one: .* \(its {words} tokens and 3 special tokens leave {left} of max_length 40 "
    with pytest.raises(DataError, match=told):
        build_windows(asked, tokenizer_of("bert"), 40, 8)


@pytest.mark.parametrize(
    ("context", "words", "stride"), [(CONTEXT, 28, 8), (CONTEXT, 36, 0), ("The river", 30, 8)]
)
def test_a_question_with_just_enough_room(tokenizer_of, context, words, stride):
    windows = build_windows([ask(context, "the " * words)], tokenizer_of("bert"), 40, stride)
    assert windows.lengths_N.max() == 40 if context == CONTEXT else len(windows) == 1


def test_a_context_without_tokens_makes_an_empty_window(tokenizer_of):
    asked = [ask("\u200b"), ask(CONTEXT, answer=(4, 11))]
    windows = build_windows(asked, tokenizer_of("bert"), 200, 8)
    assert np.diff(windows.contexts_N2, axis=1)[0] == 0
    assert windows.answered_N.tolist() == [False, True]


def test_all_questions_that_cannot_be_used_are_told_of_at_once(tokenizer_of):
    odd = ask("so \u200b it was", answer=(3, 4), name="odd")
    asked = [ask(CONTEXT), odd, ask(CONTEXT, answer=(4, 11)), ask("It was.", "the " * 60), odd]
    with pytest.raises(
        BadRowsError, match=r"question odd: answer is in no token.* and 2 more"
    ) as e:
        list(window_blocks(asked, tokenizer_of("bert"), 40, 8, block=1))
    assert list(e.value.rows) == [1, 3, 4]
    assert e.value.rows[3].startswith("question is too long for its window (its 60 tokens")
    assert (
        e.value.rows[4] == 'answer is in no token: the tokenizer drops its characters ("\\u200b")'
    )


@pytest.mark.parametrize("pair", ["[CLS] $B [SEP] $A [SEP]", "[CLS] $A [SEP] $B [SEP] $A"])
def test_a_tokenizer_that_builds_pairs_otherwise_is_refused(tokenizer_of, pair):
    backend = plain_backend(tokenizer_of("bert"))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair=pair, special_tokens=[("[SEP]", 3), ("[CLS]", 2)]
    )
    odd = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]")
    with pytest.raises(DataError, match=r"q: .* builds pairs in a way"):
        build_windows([ask(CONTEXT, "Who wrote the guide?")], odd, 64, 8)


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(DataError, match="int has no fast tokenizer"):
        build_windows([ask(CONTEXT)], 1, 64, 8)


# ---- blocks


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_blocks_are_the_same_windows(tokenizer_of, block):
    """Positions count on, and questions of one context stay together."""
    asked = [
        ask(CONTEXT, answer=(4, 11), name="a"),
        ask(CONTEXT, answer=(20, 24), name="b"),
        ask("The shade is linen.", answer=(13, 18), name="c"),
        ask(CONTEXT, name="d"),
        ask("In 1912 the harbour opened.", answer=(3, 7), name="e"),
    ]
    bert = tokenizer_of("bert")
    whole = build_windows(asked, bert, 48, 8)
    blocks = list(window_blocks(asked, bert, 48, 8, block))
    ends = np.cumsum([len(set(b.questions_N)) for b in blocks]).tolist()
    assert ends == {1: [2, 3, 4, 5], 2: [2, 4, 5], 3: [3, 5], 100: [5]}[block]
    for name in (
        "tokens_T",
        "types_T",
        "questions_N",
        "contexts_N2",
        "starts_N",
        "ends_N",
        "cls_N",
    ):
        found = np.concatenate([getattr(b, name) for b in blocks])
        assert np.array_equal(found, getattr(whole, name)), name
    assert blocks[-1].firsts_N1[-1] == whole.firsts_N1[-1]
    chars = np.concatenate([b.chars_C2 for b in blocks])
    rows = np.concatenate([b.chars_firsts_N for b in blocks])
    for n in range(len(whole)):
        low, high = whole.contexts_N2[n]
        mine = chars[rows[n] + low : rows[n] + high]
        assert np.array_equal(
            mine, whole.chars_C2[whole.chars_firsts_N[n] + low : whole.chars_firsts_N[n] + high]
        )


def test_no_questions_make_one_empty_block(tokenizer_of):
    (block,) = window_blocks([], tokenizer_of("bert"), 48, 8)
    assert len(block) == 0
    assert block.firsts_N1.tolist() == [0]


def test_many_blocks_are_joined(tokenizer_of, monkeypatch):
    asked = [ask(f"{CONTEXT}{n}", answer=(4, 11), name=str(n)) for n in range(9)]
    whole = build_windows(asked, tokenizer_of("bert"), 48, 8)
    monkeypatch.setattr("runner.data.windows.BLOCK_QUESTIONS", 2)
    monkeypatch.setattr(window_blocks, "__defaults__", (2,))
    joined = build_windows(asked, tokenizer_of("bert"), 48, 8)
    for field in FIELDS:
        assert np.array_equal(getattr(whole, field.name), getattr(joined, field.name)), field.name
