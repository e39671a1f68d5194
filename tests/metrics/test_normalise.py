"""Answers in other languages are compared by MLQA's rules, which are written out here once more, in
the plainest way; by rules after them where MLQA has no such language."""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.metrics.normalise import normaliser, rules
from runner.metrics.squad import squad_scores, squad_v2_scores, tune_null_threshold

PUNCTUATION = {c for c in map(chr, range(sys.maxunicode)) if unicodedata.category(c)[0] == "P"}
PUNCTUATION |= set(string.punctuation)
ARTICLES = {
    "es": "un una unos unas el la los las",
    "vi": "của là cái chiếc những",
    "de": "ein eine einen einem eines einer der die das den dem des",
}
MLQA = ("ar", "de", "es", "hi", "vi", "zh")


def by_hand(text: str, language: str) -> list[str]:
    """The words of an answer that MLQA compares."""
    text = "".join(c for c in text.lower() if c not in PUNCTUATION)
    if language in ARTICLES:
        text = re.sub(rf"\b({'|'.join(ARTICLES[language].split())})\b", " ", text)
    elif language == "ar":
        text = text.replace("ال", " ")
    elif language == "zh":
        text = "".join(f" {c} " if "一" <= c <= "龥" else c for c in text)
    return text.split()


def f1_by_hand(answer: str, gold: str, language: str) -> float:
    one, other = by_hand(answer, language), by_hand(gold, language)
    common = sum((Counter(one) & Counter(other)).values())
    return 200 * common / (len(one) + len(other)) if common else 0.0


PAIRS = {
    "de": ("Der Grüne Turm, am Markt", "dem grünen turm am „Markt“"),
    "es": ("¿La Casa de los Tres?", "casa de tres"),
    "vi": ("những ngôi nhà của họ", "ngôi nhà họ"),
    "hi": ("दिल्ली। भारत", "दिल्ली भारत"),
    "ar": ("القاهرة، مصر", "قاهرة مصر"),
    "zh": ("北京、中国 in 1990", "北京 中国"),
}


@pytest.mark.parametrize("language", MLQA)
def test_scores_are_those_of_mlqas_rules(language):
    answer, gold = PAIRS[language]
    found = squad_scores({"a": answer}, {"a": [gold]}, language)
    assert found.f1 == pytest.approx(f1_by_hand(answer, gold, language), abs=1e-12)
    assert found.f1 > squad_scores({"a": answer}, {"a": [gold]}).f1
    same = by_hand(answer, language) == by_hand(gold, language)
    assert found.exact_match == 100.0 * same


def texts():
    signs = st.sampled_from(
        [*"abz AZ.,'-", "der ", "la ", "của ", "ال", "。", "、", "中", "文", "ß"]
    )
    return st.lists(signs | st.characters(exclude_categories=("Cs",)), max_size=12).map("".join)


@given(texts())
def test_words_are_those_of_mlqas_rules(text):
    for language in MLQA:
        assert normaliser(language)(text).split() == by_hand(text, language)


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [
        ("fr", "L'homme de la rue", "homme rue"),
        ("fr", "lettre", "lettre"),
        ("it", "un'idea, l’arte", "idea arte"),  # noqa: RUF001
        ("ja", "東京タワー", "東 京 タ ワ ー"),
        ("th", "กรุง", "ก ร ุ ง"),
        ("ru", "«Война» и мир", "война и мир"),
        ("pt", "a casa", "casa"),
    ],
)
def test_other_languages_are_compared_alike(language, one, other):
    assert normaliser(language)(one) == other


def test_words_are_not_cut_to_articles():
    assert normaliser("fr")("lettre des unités") == "lettre unités"
    assert normaliser("de")("derselbe") == "derselbe"


def test_english_is_squads_script():
    """ASCII's punctuation alone, and no word of another language."""
    assert normaliser("en")("The «der» – a b.") == "«der» – b"  # noqa: RUF001


def test_unanswered_questions_and_thresholds_use_the_language_too():
    predictions, references = {"a": "der Turm", "b": "x"}, {"a": ["Turm"], "b": []}
    differences = {"a": -1.0, "b": 2.0}
    assert squad_v2_scores(predictions, references, differences, 0.0, "de").exact_match == 100.0
    assert squad_v2_scores(predictions, references, differences, 0.0).exact_match == 50.0
    tuned = tune_null_threshold(predictions, references, differences, "exact_match", "de")
    assert tuned.score == 100.0
    assert tune_null_threshold(predictions, references, differences, "exact_match").score == 50.0


def test_it_is_said_whose_rules_they_are():
    assert rules("en", v2=True) == "SQuAD v2.0"
    assert rules("de", v2=False) == "SQuAD v1.1 with MLQA's rules for de"
    assert rules("fr", v2=False) == "SQuAD v1.1 with rules after MLQA's for fr"
