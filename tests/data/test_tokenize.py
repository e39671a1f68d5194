"""The characters that tokens stand for, and the labels made of them, in many scripts and kinds of
tokenizers."""

from __future__ import annotations

import contextlib
import functools
import unicodedata

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as split
from transformers import PreTrainedTokenizerFast

from runner.data.dataset import Example
from runner.data.tokenize import plain_backend, true_offsets
from runner.data.windows import build_windows
from runner.errors import DataError
from runner.metrics.squad import exact_match

# Words whose ends are hard to find: marks, joiners, selectors and letters that normalisers drop or
# join, characters of several bytes, ones that are rewritten longer.
WORDS = [
    "linen",
    "Cafe\u0301",
    "Cafe\u0301s",
    "Ti\u1ebfng",
    "Tie\u0302\u0301ng",
    "Jose\u0301\u200b",
    "X200\u200f",
    "\u200fX200",
    "co\u00adoperate\u00ad",
    "\u0643\u0650\u062a\u064e\u0627\u0628\u064c",  # Arabic with vowel marks
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",  # Hebrew with points
    "\u0939\u093f\u0928\u094d\u0926\u0940",  # Devanagari
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\u0e1c\u0e39\u0e49\u0e1d\u0e36\u0e01",  # Thai
    "\u65e5\u672c",
    "\ud55c\uad6d\uc5b4",
    "\u1112\u1161\u11ab",  # a syllable as three letters, joined by NFC
    "\uff76\uff9e",  # half-width katakana and its voicing mark
    "\u2764\ufe0f",
    "\U0001f469\U0001f3fd\u200d\U0001f680",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1f3\U0001f1f4",
    "1\ufe0f\u20e3",
    "\ufb01n",
    "\u0130stanbul",
    "\u00bd",
    "\u1e9e\u0323",
]
MARKS = str.maketrans("", "", "Ġ▁#")  # of spaces and of pieces of a word
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAIR = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
)


def _word_pieces(*, lowercase: bool, strip_accents: bool | None) -> Tokenizer:
    letters = sorted(
        {letter for word in WORDS for letter in word} | set("abcdefghijklmnoprstuw,.?")
    )
    vocabulary = [*SPECIALS, *letters, *(f"##{letter}" for letter in letters)]
    raw = Tokenizer(models.WordPiece({t: n for n, t in enumerate(vocabulary)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    raw.pre_tokenizer = split.BertPreTokenizer()
    return raw


def _byte_pairs(pre_tokenizer, post=None, normalizer=None) -> Tokenizer:
    raw = Tokenizer(models.BPE())
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.pre_tokenizer = pre_tokenizer
    alphabet = sorted(split.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(["the linen was linen and what was washable"] * 3, trainer)
    if post is not None:
        raw.post_processor = post
    return raw


def _pieces(normalizer) -> Tokenizer:
    vocabulary = [(token, 0.0) for token in SPECIALS]
    vocabulary += [("▁", -3.0), ("▁lin", -4.0), ("en", -4.0), ("Caf", -4.0), ("日本", -4.0)]
    vocabulary += [(letter, -6.0) for letter in "abcdefghijklmnoprstuwzCX0123,.?\u200d\u2764"]
    raw = Tokenizer(models.Unigram(vocabulary, unk_id=1))
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.pre_tokenizer = split.Metaspace()
    return raw


def _llama() -> Tokenizer:
    raw = _pieces(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )
    raw.pre_tokenizer = split.Split("▁", "merged_with_next")
    return raw


def _roberta(trim: bool = True) -> processors.RobertaProcessing:
    return processors.RobertaProcessing(
        ("[SEP]", 3), ("[CLS]", 2), trim_offsets=trim, add_prefix_space=True
    )


# Its post-processor takes each word's first letter for the space that was put before it.
_SHIFTING = split.Sequence(
    [split.Whitespace(), split.ByteLevel(add_prefix_space=True), split.Punctuation()]
)
KINDS = {
    "uncased": lambda: _word_pieces(lowercase=True, strip_accents=None),
    "cased": lambda: _word_pieces(lowercase=False, strip_accents=False),
    "bytes": lambda: _byte_pairs(split.ByteLevel(add_prefix_space=False)),
    "bytes, composed": lambda: _byte_pairs(
        split.ByteLevel(add_prefix_space=False), normalizer=normalizers.NFC()
    ),
    "bytes, trimmed": lambda: _byte_pairs(split.ByteLevel(add_prefix_space=True), _roberta()),
    "bytes, untrimmed": lambda: _byte_pairs(
        split.ByteLevel(add_prefix_space=True), _roberta(trim=False)
    ),
    "bytes, shifted": lambda: _byte_pairs(_SHIFTING, _roberta()),
    "pieces": lambda: _pieces(None),
    "pieces, rewritten": lambda: _pieces(
        normalizers.Sequence(
            [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
        )
    ),
    "pieces, compatible": lambda: _pieces(normalizers.NFKC()),
    "pieces, space in front": _llama,
}


@pytest.fixture(scope="module")
def tokenizer_of():
    made = {}

    def make(kind: str) -> PreTrainedTokenizerFast:
        if kind not in made:
            raw = KINDS[kind]()
            if raw.post_processor is None:
                raw.post_processor = PAIR
            made[kind] = PreTrainedTokenizerFast(
                tokenizer_object=raw, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
            )
        return made[kind]

    return make


def label_of(tokenizer, context: str, start: int, end: int):
    """Tokens' characters, and the first and last token of the answer context[start:end]."""
    asked = [Example("q", "what", context, (context[start:end],), (start,))]
    windows = build_windows(asked, tokenizer, 2000, 0)
    assert len(windows) == 1
    low = int(windows.contexts_N2[0, 0])
    first, last = int(windows.starts_N[0]) - low, int(windows.ends_N[0]) - low
    return windows.chars_C2, first, last


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", WORDS, ids=ascii)
def test_a_word_is_labelled_from_its_first_sign_to_its_last(tokenizer_of, kind, word):
    between = " " if kind.startswith("pieces") else "\n\n"  # these know no other blank
    for before, after in (("", ""), ("so it was ", between + "was"), ("what , ", " , what")):
        context = f"{before}{word}{after}"
        chars_C2, first, last = label_of(
            tokenizer_of(kind), context, len(before), len(before) + len(word)
        )
        labelled = context[chars_C2[first, 0] : chars_C2[last, 1]]
        assert labelled == word
        assert exact_match(labelled, [word])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["lamps", "wasps", "w"])
def test_a_label_is_all_tokens_of_its_answer_and_a_space_has_no_character(tokenizer_of, kind, word):
    tokenizer = tokenizer_of(kind)
    context = f"so it was {word} , end"
    chars_C2, first, last = label_of(tokenizer, context, 10, 10 + len(word))
    ids = plain_backend(tokenizer).encode(context, add_special_tokens=False).ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert "".join(tokens[first : last + 1]).translate(MARKS) == word
    for token, (low, high) in zip(tokens, chars_C2.tolist(), strict=True):
        if token in ("Ġ", "▁"):
            assert low >= high


@pytest.mark.parametrize("kind", KINDS)
def test_outer_blanks_of_an_answer_take_no_neighbour_in(tokenizer_of, kind):
    context = "what was washable linen and was"
    inside = label_of(tokenizer_of(kind), context, 9, 23)[1:]
    for start, end in ((8, 23), (9, 24), (8, 24)):
        assert label_of(tokenizer_of(kind), context, start, end)[1:] == inside
    chars_C2 = label_of(tokenizer_of(kind), context, 9, 23)[0]
    assert context[chars_C2[inside[0], 0] : chars_C2[inside[1], 1]] == "washable linen"


SEPARATORS = st.sampled_from(
    [" ", " ", "  ", "", ", ", "\n", "\u00a0", "\u3000", " \u0301", "\ufffd"]
)
CONTEXTS = st.lists(
    st.tuples(st.sampled_from(WORDS) | st.text(max_size=3), SEPARATORS), min_size=1, max_size=8
).map(lambda parts: "".join(word + gap for word, gap in parts).replace("\0", ""))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(context=CONTEXTS, data=st.data())
def test_a_label_is_the_shortest_run_of_tokens_that_covers_the_answer(
    tokenizer_of, kind, context, data
):
    assume(context.strip())
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, len(context)))
    answer = context[start:end]
    begin = start + len(answer) - len(answer.lstrip())
    stop = begin + len(answer.strip())
    assume(begin < stop)
    build = functools.partial(label_of, tokenizer_of(kind), context, start, end)
    if not any(map(_kept, context[begin:stop])):
        with contextlib.suppress(DataError):  # the normaliser may leave nothing of it
            build()
        return
    chars_C2, first, last = build()
    assert (np.diff(chars_C2, axis=0) >= 0).all()
    spans = [(int(low), int(high)) for low, high in chars_C2]
    for low, high in spans:
        assert low >= high or context[low:high] == context[low:high].strip()
    over = [n for n, (low, high) in enumerate(spans) if low < stop and high > begin and low < high]
    assert (first, last) == (over[0], over[-1])
    if spans[first][0] == begin and all(high <= stop for _, high in spans[first : last + 1]):
        labelled = context[begin : spans[last][1]]
        assert labelled == context[begin:stop] or not _kept(context[stop - 1])


def _kept(character: str) -> bool:
    """Whether no normaliser here drops it: neither mark nor control, nor an accent by itself."""
    forms = unicodedata.normalize("NFKD", character)
    return character != "\ufffd" and all(unicodedata.category(form)[0] in "LNPS" for form in forms)


# ---- offsets as such


def offsets(texts, spans, rewrite=str):
    lengths = np.array([len(row) for row in spans], dtype=int)
    flat = np.array([pair for row in spans for pair in row], dtype=int).reshape(-1, 2)
    return true_offsets(texts, lengths, flat, rewrite, "a-tokenizer").tolist()


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        pytest.param([(0, 3), (3, 8)], [[0, 3], [4, 8]], id="the space before a word"),
        pytest.param([(0, 4), (4, 8)], [[0, 3], [4, 8]], id="the space after a word"),
        pytest.param([(0, 3), (3, 4), (4, 8)], [[0, 3], [4, 3], [4, 8]], id="a space alone"),
        pytest.param([(0, 3), (3, 3), (4, 8)], [[0, 3], [4, 3], [4, 8]], id="a token of nothing"),
        pytest.param([(0, 0), (0, 3), (4, 8)], [[0, 0], [0, 3], [4, 8]], id="nothing first"),
        pytest.param([(0, 3), (4, 8), (8, 8)], [[0, 3], [4, 8], [8, 8]], id="nothing last"),
        pytest.param([(0, 3), (5, 8)], [[0, 3], [4, 8]], id="a first letter lost"),
        pytest.param([(0, 2), (4, 7)], [[0, 3], [4, 8]], id="last letters lost"),
        pytest.param([(0, 3), (4, 8), (4, 8)], [[0, 3], [4, 8], [4, 8]], id="shared"),
    ],
)
def test_offsets_are_mended(spans, expected):
    assert offsets(["The lamp", "The lamp"], [spans, spans]) == expected * 2


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([(4, 8), (0, 3)], "go back"),
        ([(0, 3), (4, 9)], "outside the text"),
        ([(-1, 3), (4, 8)], "outside the text"),
        ([(3, 0), (4, 8)], "outside the text"),
        ([(0, 3)], "U+006C in 'The lamp' is in none of its tokens"),
        ([], "U+0054"),
    ],
)
def test_offsets_that_cannot_be_mended_are_refused_by_the_tokenizers_name(spans, words):
    with pytest.raises(DataError) as refused:
        offsets(["So", "The lamp"], [[(0, 2)], spans])
    assert str(refused.value).startswith("a-tokenizer: ")
    assert words in str(refused.value)


def test_what_the_normaliser_drops_may_be_in_no_token():
    drop = normalizers.Replace("\ufffd", "").normalize_str
    assert offsets(["a \ufffd b\ufffd"], [[(0, 1), (4, 5)]], drop) == [[0, 1], [4, 5]]
    with pytest.raises(DataError, match=r"U\+FFFD"):
        offsets(["a \ufffd b\ufffd"], [[(0, 1), (4, 5)]])


def test_no_texts_and_no_tokens():
    assert offsets([], []) == []
    assert offsets([" \n"], [[]]) == []
