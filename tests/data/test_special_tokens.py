"""What a text becomes: its own tokens, whatever stands in it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    XLMRobertaTokenizer,
)

from runner.data.dataset import Example
from runner.data.tokenize import Template, plain_backend
from runner.data.windows import build_windows

LETTERS = "abcdefghijklmnopqrstuvwxyz<>/[]"


def unigram() -> PreTrainedTokenizerBase:
    """Its vocabulary is searched for pieces, and has special tokens among them."""
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    pieces = [(piece, 0.0) for piece in special] + [("▁", -3.0)]
    return XLMRobertaTokenizer(vocab=pieces + [(letter, -6.0) for letter in LETTERS])


def words() -> PreTrainedTokenizerBase:
    """Its vocabulary is looked up word by word."""
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


@pytest.fixture(params=["bert", "roberta", "albert", "unigram", "words"])
def tokenizer(request, tiny) -> PreTrainedTokenizerBase:
    made = {"unigram": unigram, "words": words}
    if request.param in made:
        return made[request.param]()
    return AutoTokenizer.from_pretrained(tiny(request.param))


def test_a_special_token_in_a_text_is_text(tokenizer):
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    backend = plain_backend(tokenizer)
    for name in tokenizer.all_special_tokens:
        for text in (name, f"a {name} a", f"a{name}{name}a"):
            found = backend.encode(text, add_special_tokens=False)
            assert special.isdisjoint(found.ids), text
            assert found.offsets[-1][1] == len(text)


def test_the_special_tokens_around_a_pair_are_the_tokenizers_own(tokenizer):
    template = Template.of(plain_backend(tokenizer), tokenizer.cls_token_id)
    (inner,) = set(tokenizer("a", add_special_tokens=False)["input_ids"][-1:])
    wanted = [token for token in tokenizer("a", "a")["input_ids"] if token != inner]
    assert [token for part in template.ids for token in part] == [
        token for token in wanted if token in tokenizer.all_special_ids
    ]


def test_windows_have_as_many_special_tokens_whatever_is_asked(tokenizer):
    """Longformer refuses a window with a separator too many."""
    text = f"a {tokenizer.sep_token} a a {tokenizer.cls_token} a"
    examples = [Example("1", "a a", "a a a", ("a",), (0,)), Example("2", text, text, ("a",), (0,))]
    windows = build_windows(examples, tokenizer, 128, 16)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    counts = [
        sum(token in special for token in windows.tokens_T[low:high].tolist())
        for low, high in zip(windows.firsts_N1[:-1], windows.firsts_N1[1:], strict=True)
    ]
    assert len(counts) == 2
    assert counts[0] == counts[1]
