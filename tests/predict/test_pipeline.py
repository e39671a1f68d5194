"""The drop-in against the removed pipeline, told again over the whole matrix of spans."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from runner.data.windows import window_blocks
from runner.errors import AssetError
from runner.model.load import load_tokenizer
from runner.predict.qa_pipeline import pipeline

CONTEXT = (
    "The lantern folds flat; its battery lasts nine hours on the bright setting. In 1912 the café "
    "opened near the harbour, serving 30 guests an evening. The shade is washable linen, the base "
    "is beech, and the cable is two metres long."
)
QUESTION = "How long does the paint need to dry?"


@functools.cache
def loaded(folder):
    """Tokenizer and model by plain transformers."""
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder), model.eval()


@functools.cache
def opened(folder):
    """The drop-in, for all calls."""
    return pipeline(model=str(folder), device="cpu")


def old_pipeline(
    folder, question, context, *, top_k=1, handle_impossible_answer=False, max_answer_len=15,
    max_seq_len=64, doc_stride=16, align_to_words=True,
):  # fmt: skip
    """What transformers 4 answered, by the steps of its documentation: probabilities of start and
    end over context and [CLS], their products, the best of each window, words, sums, order."""
    tokenizer, model = loaded(folder)
    encoded = tokenizer(
        question, context, truncation="only_second", max_length=max_seq_len, stride=doc_stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    whole = tokenizer(context).encodings[0]
    wanted = 2 * top_k + 10 if align_to_words else top_k
    answers, null = [], 1e6
    for window in range(len(encoded["input_ids"])):
        names = [name for name in tokenizer.model_input_names if name in encoded]
        with torch.no_grad():
            out = model(**{name: torch.tensor([encoded[name][window]]) for name in names})
        sequence = np.array([1 if s == 1 else 0 for s in encoded.sequence_ids(window)])
        seen = sequence.astype(bool)
        seen[0] = True  # [CLS]
        p = []
        for logits in (out.start_logits, out.end_logits):
            values = np.where(seen, logits[0].double().numpy(), -np.inf)
            weights = np.exp(values - values.max())
            p.append(weights / weights.sum())
        null = min(null, p[0][0] * p[1][0])
        product = np.triu(np.outer(*p)) * (np.tri(len(seen), k=max_answer_len - 1) > 0)
        product[0], product[:, 0] = 0, 0
        encoding = encoded.encodings[window]
        for flat in np.argsort(-product.ravel(), kind="stable")[:wanted]:
            s, e = divmod(int(flat), len(seen))
            if not (product[s, e] > 0 and sequence[s] and sequence[e]):
                continue
            start, end = encoding.offsets[s][0], encoding.offsets[e][1]
            if align_to_words:
                # Of a word that a window cuts in two, the old pipeline gave the part in the window.
                first, last = (whole.offsets.index(encoding.offsets[t]) for t in (s, e))
                start = whole.word_to_chars(whole.token_to_word(first), 0)[0]
                end = whole.word_to_chars(whole.token_to_word(last), 0)[1]
            text = context[start:end]
            same = [a for a in answers if a["answer"].lower() == text.lower()]
            if same:
                same[0]["score"] += product[s, e]
            else:
                entry = {"score": product[s, e], "start": start, "end": end, "answer": text}
                answers.append(entry)
    if handle_impossible_answer:
        answers.append({"score": null, "start": 0, "end": 0, "answer": ""})
    return sorted(answers, key=lambda answer: -answer["score"])[:top_k]


@pytest.fixture(scope="module")
def ask(tiny):
    return pipeline("question-answering", model=str(tiny("bert")), device=-1)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 5},
        {"top_k": 4, "handle_impossible_answer": True},
        {"top_k": 3, "align_to_words": False},
        {"top_k": 5, "max_answer_len": 3, "max_seq_len": 50, "doc_stride": 10},
    ],
)
def test_numbers_and_texts_are_the_old_ones(tiny, kind, options):
    options = {"max_seq_len": 64, "doc_stride": 16} | options
    found = opened(tiny(kind))(question=QUESTION, context=CONTEXT, **options)
    wanted = old_pipeline(tiny(kind), QUESTION, CONTEXT, **options)
    found = [found] if isinstance(found, dict) else found
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert list(mine) == ["score", "start", "end", "answer"]
        assert mine["answer"] == theirs["answer"]
        assert (mine["start"], mine["end"]) == (theirs["start"], theirs["end"])
        assert mine["score"] == pytest.approx(theirs["score"], rel=1e-4)
        assert mine["answer"] == CONTEXT[mine["start"] : mine["end"]]


def test_every_form_of_call_of_the_old_pipeline(ask):
    one = {"question": QUESTION, "context": CONTEXT}
    other = {"question": "Who?", "context": CONTEXT}
    answer, second = ask(**one), ask(**other)
    assert isinstance(answer, dict)
    assert answer != second
    for call in (
        lambda: ask(one),
        lambda: ask([one]),  # a list of one gave no list
        lambda: ask(data=one),
        lambda: ask(X=[one]),
        lambda: ask(QUESTION, CONTEXT),
        lambda: ask(SimpleNamespace(question_text=QUESTION, context_text=CONTEXT)),
        lambda: ask(question=[QUESTION], context=CONTEXT),
        lambda: ask(**one, batch_size=8, padding="longest", max_question_len=64, topk=1),
    ):
        assert call() == answer
    for call in (
        lambda: ask([one, other]),
        lambda: ask(one, other),
        lambda: ask(question=[QUESTION, "Who?"], context=CONTEXT),
        lambda: ask(question=[QUESTION, "Who?"], context=[CONTEXT, CONTEXT]),
        lambda: list(ask(iter([one, other]))),
    ):
        found = call()
        assert [a["answer"] for a in found] == [answer["answer"], second["answer"]]
        assert [a["score"] for a in found] == pytest.approx(
            [answer["score"], second["score"]], rel=1e-4
        )


def test_a_generator_is_answered_as_it_goes(ask):
    asked = []

    def questions():
        for number in itertools.count():
            asked.append(number)
            yield {"question": f"Who is {number}?", "context": CONTEXT}

    answers = ask(questions(), top_k=2)
    assert len(next(answers)) == 2
    assert len(asked) == 1


def test_options_can_be_given_once_for_all_calls(tiny):
    ask = pipeline(model=str(tiny("bert")), device="cpu", top_k=3, max_answer_len=2)
    assert len(ask(question=QUESTION, context=CONTEXT)) == 3
    assert isinstance(ask(question=QUESTION, context=CONTEXT, top_k=1), dict)


def test_a_loaded_model_can_be_given(tiny, ask):
    model = AutoModelForQuestionAnswering.from_pretrained(tiny("bert"))
    tokenizer = AutoTokenizer.from_pretrained(tiny("bert"))
    found = pipeline(model=model, tokenizer=tokenizer)(
        question=QUESTION, context=CONTEXT, max_seq_len=130
    )
    assert found == ask(question=QUESTION, context=CONTEXT)


def test_a_tokenizer_beside_a_name_is_used(tiny, ask):
    one = {"question": QUESTION, "context": CONTEXT}
    name = str(tiny("bert"))
    assert pipeline(model=name, tokenizer=name, device=-1)(**one) == ask(**one)
    loaded = AutoModelForQuestionAnswering.from_pretrained(name)
    assert pipeline(model=loaded, tokenizer=name, device=-1)(**one) == ask(**one)
    other = AutoTokenizer.from_pretrained(name, model_max_length=40)
    assert pipeline(model=name, tokenizer=other, device=-1).predictor.tokenizer is other
    with pytest.raises(AssetError, match="nowhere"):
        pipeline(model=name, tokenizer="no/such/nowhere")


def test_how_a_model_is_loaded(tiny, monkeypatch):
    name, asked = str(tiny("bert")), []

    def load(files):
        asked.append((files.section.name, files.section.revision))
        return load_tokenizer(files)

    monkeypatch.setattr("runner.predict.predictor.load_tokenizer", load)
    pipeline(model=name, revision="v1", framework="pt", device=-1)
    assert asked == [(name, "v1")]
    for keyword in ("torch_dtype", "model_kwargs", "device_map"):
        with pytest.raises(TypeError, match=f"{keyword}: no such keyword here; .* load it and"):
            pipeline(model=name, **{keyword: "auto"})


def test_no_questions_have_no_answers(ask):
    assert ask([]) == ask(data=[]) == ask(question=[], context=CONTEXT) == []


def test_many_questions_are_answered_as_each_alone(ask, monkeypatch):
    # Texts come back in another block of windows: each block counts its characters anew.
    contexts = [CONTEXT, "The cable is two metres long, serving 30 guests."] * 3
    asked = [{"question": f"Who is {n}?", "context": text} for n, text in enumerate(contexts)]
    alone = [ask(one, top_k=3) for one in asked]
    monkeypatch.setattr(
        "runner.data.windows.window_blocks", functools.partial(window_blocks, block=2)
    )
    monkeypatch.setattr("runner.predict.qa_pipeline.GROUP", 2)
    for mine, theirs in zip(ask(asked, top_k=3), alone, strict=True):
        assert [a["answer"] for a in mine] == [a["answer"] for a in theirs]
        assert [a["score"] for a in mine] == pytest.approx([a["score"] for a in theirs], rel=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"question": "", "context": CONTEXT}, ValueError, "`question` cannot be empty"),
        ({"question": QUESTION, "context": None}, ValueError, "question and context are texts"),
        ({"question": ["a", "b"], "context": ["c"]}, ValueError, "not as many questions"),
        ({"question": QUESTION, "context": CONTEXT, "top_k": 0}, ValueError, "top_k"),
        ({"question": QUESTION, "context": CONTEXT, "max_answer_len": 0}, ValueError, "max_ans"),
        (
            {"question": QUESTION, "context": CONTEXT, "max_seq_len": 20, "doc_stride": 30},
            ValueError,
            "doc_stride 30 is larger",
        ),
        ({"question": QUESTION, "context": CONTEXT, "topp_k": 2}, TypeError, "topp_k"),
        ({"data": {"question": QUESTION}}, KeyError, "no context"),
        ({"data": 5}, ValueError, "give question"),
        ({"data": [5]}, ValueError, "no dictionary"),
        ({}, ValueError, "question and context are texts"),
    ],
)
def test_calls_that_cannot_be_understood(ask, call, error, words):
    with pytest.raises(error, match=words):
        ask(**call)


def test_other_tasks_and_half_a_model_are_refused(tiny):
    with pytest.raises(ValueError, match="'fill-mask'"):
        pipeline("fill-mask", model=str(tiny("bert")))
    with pytest.raises(ValueError, match="its tokenizer"):
        pipeline(model=AutoModelForQuestionAnswering.from_pretrained(tiny("bert")))
