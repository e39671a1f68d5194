"""Windows and labels against the tokenizer's own overflow and run_qa's procedure."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from runner.data.dataset import Example, load_dataset
from runner.data.tokenize import plain_backend
from runner.data.windows import Windows, build_windows, window_blocks
from runner.errors import DataError
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


# ---- the oracle


def run_qa_windows(examples, tokenizer, max_length, stride):
    """What run_qa's prepare_train_features makes of each question, window by window.

    Three things differ from the script, all on purpose. It may let the start run past the context
    into special tokens or padding ("edge case" in its own comment): here it stays inside. For an
    answer of one character that is several byte-level tokens its start lies behind its end: here
    the pair is turned round. RoBERTa's post-processor with add_prefix_space takes the first token
    of every later window for the text's first and leaves it the space before it: here it goes.
    """
    asked = [(e.question.lstrip(), e.context) for e in examples]
    options = {"return_offsets_mapping": True, "return_token_type_ids": True, "padding": False}
    cut = tokenizer(
        asked,
        **options,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
    )
    adds_space = isinstance(tokenizer, RobertaTokenizer) and tokenizer.add_prefix_space
    rows = []
    for window, (place, ids) in enumerate(
        zip(cut["overflow_to_sample_mapping"], cut["input_ids"], strict=True)
    ):
        offsets = cut["offset_mapping"][window]
        inside = [n for n, part in enumerate(cut.sequence_ids(window)) if part == 1]
        if adds_space and rows and rows[-1][0] == place:
            begin, end = offsets[inside[0]]
            begin += asked[place][1][begin : begin + 1] == " "
            offsets[inside[0]] = (begin, max(begin, end))
        chars = [offsets[n] for n in inside]
        cls = ids.index(tokenizer.cls_token_id)
        label = (cls, cls)
        if examples[place].answers and inside:
            begin = examples[place].answer_starts[0]
            end = begin + len(examples[place].answers[0])
            first, last = inside[0], inside[-1]
            if offsets[first][0] <= begin and offsets[last][1] >= end:
                while first <= inside[-1] and offsets[first][0] <= begin:
                    first += 1
                while last >= inside[0] and offsets[last][1] >= end:
                    last -= 1
                label = tuple(sorted((first - 1, last + 1)))
        rows.append((place, ids, cut["token_type_ids"][window], inside, chars, cls, label))
    return rows


def as_rows(windows):
    """Windows spelled like the oracle's rows."""
    rows = []
    for n in range(len(windows)):
        part = slice(*windows.firsts_N1[n : n + 2])
        low, high = windows.contexts_N2[n].tolist()
        chars = windows.chars_C2[windows.chars_firsts_N[n] + low : windows.chars_firsts_N[n] + high]
        rows.append(
            (
                int(windows.questions_N[n]),
                windows.tokens_T[part].tolist(),
                windows.types_T[part].tolist(),
                list(range(low, high)),
                [tuple(pair) for pair in chars.tolist()],
                int(windows.cls_N[n]),
                (int(windows.starts_N[n]), int(windows.ends_N[n])),
            )
        )
    return rows


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
def test_windows_and_labels_are_run_qas(tokenizer_of, kind, asked, max_length, stride):
    tokenizer = tokenizer_of(kind)
    windows = build_windows(asked, tokenizer, max_length, stride)
    assert as_rows(windows) == run_qa_windows(asked, tokenizer, max_length, stride)


def test_every_real_question_has_the_windows_and_labels_of_run_qa(real_data, minilm):
    data = load_dataset(
        str(real_data / "squadshifts_new_wiki_v1.0.json"),
        columns=Columns(),
        unanswerable=False,
        on_bad_row="fail",
    )
    tokenizer = load_tokenizer(ModelFiles.locate(Model(name=minilm)))
    windows = build_windows(data.examples, tokenizer, 384, 128)
    assert (len(data.examples), len(windows)) == (7938, 8034)
    assert as_rows(windows) == run_qa_windows(data.examples, tokenizer, 384, 128)


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
    told = (
        rf"long-one: its {words} tokens and 3 special tokens leave {left} of max_length 40 .*\(1 "
    )
    with pytest.raises(DataError, match=told):
        build_windows(asked, tokenizer_of("bert"), 40, 8)


@pytest.mark.parametrize(
    ("context", "words", "stride"), [(CONTEXT, 28, 8), (CONTEXT, 36, 0), ("The river", 30, 8)]
)
def test_a_question_with_just_enough_room(tokenizer_of, context, words, stride):
    windows = build_windows([ask(context, "the " * words)], tokenizer_of("bert"), 40, stride)
    assert windows.lengths_N.max() == 40 if context == CONTEXT else len(windows) == 1


def test_a_context_without_tokens_makes_an_empty_window(tokenizer_of):
    asked = [ask("\u200b", answer=(0, 1)), ask(CONTEXT, answer=(4, 11))]
    windows = build_windows(asked, tokenizer_of("bert"), 200, 8)
    assert np.diff(windows.contexts_N2, axis=1)[0] == 0
    assert windows.answered_N.tolist() == [False, True]


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
