"""What of an answer is compared, by language: as in SQuAD's script for English, by MLQA's rules for
its other six languages, in the same way for further ones.

MLQA (Lewis et al., arXiv:1910.07475, mlqa_evaluation_v1.py): lower case, Unicode's punctuation and
the language's articles go; Chinese is compared by characters. Articles of the languages behind it:
those that MKQA lists (Longpre et al., arXiv:2007.15207), as whole words.
"""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache

from runner.job.schema import Language

OF_MLQA = ("ar", "de", "es", "hi", "vi", "zh")

_ARTICLES = {
    "ar": r"\sال^|ال",  # noqa: RUF001 (as in the script)
    "da": r"\b(en|et)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "fr": r"\b(le|la|les|du|de|des|un|une)\b",
    "hu": r"\b(a|az|egy)\b",
    "it": r"\b(il|lo|la|i|gli|le|un|uno|una|del|dello|della|dei|degli|delle)\b",
    "nl": r"\b(de|het|een|des|der|den)\b",
    "no": r"\b(en|et|ei)\b",
    "pt": r"\b(o|a|os|as|um|uma|uns|umas)\b",
    "sv": r"\b(en|ett)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
}
# Articles that lose a vowel: with their apostrophe, before punctuation goes.
_ELIDED = {"fr": r"\b[ld]['’]", "it": r"\b(?:l|un|dell|degl)['’]"}  # noqa: RUF001

# Characters that are compared one by one, since no blank parts their words.
_HAN_OF_MLQA = "\u4e00-\u9fa5"
_UNPARTED = {
    "ja": "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff",
    "km": "\u1780-\u17ff",
    "lo": "\u0e80-\u0eff",
    "my": "\u1000-\u109f",
    "th": "\u0e00-\u0e7f",
    "zh": _HAN_OF_MLQA,
}
# The language that a script is most often met in.
SCRIPTS = {
    "CJK": "zh",
    **{"HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "CYRILLIC": "ru", "ARABIC": "ar"},
    **{"DEVANAGARI": "hi", "THAI": "th", "GREEK": "el", "HEBREW": "he", "BENGALI": "bn"},
}
# Words that nearly every text of a language in Latin script has.
_FREQUENT = {
    "da": "og er det af på til hvad",
    "de": "der die und ist das ein wie",
    "en": "the of and is to in what",
    "es": "el los y es que del cuál",
    "fr": "le les et est des une quel",
    "it": "il di che è della gli quale",
    "nl": "de het een en van wat is",
    "pt": "os e é que uma não qual",
    "sv": "och är det av på till vad",
    "vi": "là của và các có những gì",
}
_THE = re.compile(_ARTICLES["en"])
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normaliser(language: Language) -> Callable[[str], str]:
    """The function that makes of an answer the words that are compared, single blanks between."""
    return _english if language == "en" else _by_mlqa(language)


def rules(language: Language, *, v2: bool) -> str:
    """Whose evaluation it is, for people."""
    official = f"SQuAD {'v2.0' if v2 else 'v1.1'}"
    if language == "en":
        return official
    whose = "MLQA's rules" if language in OF_MLQA else "rules after MLQA's"
    return f"{official} with {whose} for {language}"


def script_of(letter: str) -> str:
    """The first word of a letter's name in Unicode, such as LATIN."""
    return unicodedata.name(letter, "NONE").partition(" ")[0]


def likely_language(texts: Iterable[str]) -> str | None:
    """The language that texts are probably in: by the script of most of their letters, or by their
    most frequent words; None where neither tells."""
    joined = " ".join(texts).lower()
    scripts = Counter(script_of(letter) for letter in joined if letter.isalpha())
    if not scripts:
        return None
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > scripts["CJK"] / 10:
        scripts["HIRAGANA"] += scripts.pop("CJK", 0)  # Japanese is written in both
    ((script, _),) = scripts.most_common(1)
    if script != "LATIN":
        return SCRIPTS.get(script)
    words = Counter(re.findall(r"\w+", joined))
    seen = {name: sum(words[w] for w in some.split()) for name, some in _FREQUENT.items()}
    best = max(seen, key=seen.__getitem__)
    ordinary = (
        seen[best] >= max(3, words.total() / 10) and list(seen.values()).count(seen[best]) == 1
    )
    return best if ordinary else None


def foreign_answers(answers: Iterable[str], language: Language, key: str) -> str | None:
    """What to say where English rules are for answers that are none, as far as letters tell; `key`
    is how the user sets the language."""
    if language != "en":
        return None
    texts = list(answers)
    scripts = ({script_of(letter) for letter in text if letter.isalpha()} for text in texts)
    foreign = sum("LATIN" not in names for names in scripts if names)
    if 2 * foreign <= len(texts):
        return None
    likely = likely_language(texts)
    return (
        f"{foreign:,} of {len(texts):,} right answers hold no Latin letter, and are scored by the"
        f" rules for English; set {key}{f', perhaps to {likely}' if likely else ''}"
    )


def _english(text: str) -> str:
    # ASCII's punctuation alone, as in SQuAD's scripts; MLQA's English takes all of Unicode's.
    return " ".join(_THE.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split())


@cache
def _by_mlqa(language: str) -> Callable[[str], str]:
    articles, elided = (
        re.compile(table[language]) if language in table else None for table in (_ARTICLES, _ELIDED)
    )
    unparted = re.compile(f"([{_UNPARTED[language]}])") if language in _UNPARTED else None

    def normalise(text: str) -> str:
        text = text.lower()
        if elided is not None:
            text = elided.sub(" ", text)
        text = text.translate(_unicode_punctuation())
        if articles is not None:
            text = articles.sub(" ", text)
        if unparted is not None:
            text = unparted.sub(r" \1 ", text)
        return " ".join(text.split())

    return normalise


@cache
def _unicode_punctuation() -> dict[int, None]:
    """Of Unicode's punctuation all characters, and ASCII's signs such as + and $."""
    codes = (n for n in range(sys.maxunicode) if unicodedata.category(chr(n)).startswith("P"))
    return dict.fromkeys([*codes, *map(ord, string.punctuation)])
