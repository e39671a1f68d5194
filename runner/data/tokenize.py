"""Tokenises texts, each once: their tokens, the characters that each stands for, and the special
tokens around a pair."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tokenizers import Encoding, Tokenizer

from runner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts handed to the tokenizer at once: enough for its threads, little enough for memory.
_CHUNK = 2048


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides the tokens: vocabulary, merges, normaliser, special tokens, and
    which of them is [CLS]."""
    text = _backend(tokenizer).to_str()
    # The version of the format, padding and truncation stand in front of this; a checkpoint may
    # carry the last two, and neither decides anything here.
    deciding = text[max(0, text.find('"added_tokens"')) :]
    return hashlib.sha256(f"{deciding} {tokenizer.cls_token_id}".encode()).hexdigest()


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Copy the Rust tokenizer without padding and truncation, which some checkpoints carry in their
    settings. Special tokens that stand in a text are text to the copy."""
    return _plain(_plain_text(tokenizer))


def bare_backend(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer, Template]:
    """The same without what it puts around a text, and that. One copy for all, which nobody
    changes: to read it takes longer than all else of a start that finds its windows in the
    cache."""
    text = _plain_text(tokenizer)
    cls: Any = tokenizer.cls_token_id
    return _bare(text, cls)


@lru_cache(maxsize=4)
def _bare(text: str, cls_token_id: int | None) -> tuple[Tokenizer, Template]:
    bare = _plain(text)
    template = Template.of(bare, cls_token_id)
    # All that it does without special tokens is to trim blanks off offsets, and RoBERTa's trims
    # letters too behind some pre-tokenizers. Blanks go in `encode_with_offsets`.
    bare.post_processor = None  # type: ignore[assignment]
    return bare, template


def _plain_text(tokenizer: PreTrainedTokenizerBase) -> str:
    text = _backend(tokenizer).to_str()
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    special.pop(str(tokenizer.unk_token), None)  # what a text has that is in no vocabulary
    return _without_specials(text, tuple(special.items()))


@lru_cache(maxsize=4)  # a second for a large vocabulary, and asked for with each question
def _without_specials(text: str, special: tuple[tuple[str, int], ...]) -> str:
    """A tokenizer.json that makes none of these special tokens (name, id) of a text."""
    texts = [f"a {name} a" for name, _ in special]
    found = _plain(text).encode_batch(texts, add_special_tokens=False)
    ids = {id for _, id in special}
    spelt = any(not ids.isdisjoint(encoding.ids) for encoding in found)
    return _unspelt(text, [name for name, _ in special]) if spelt else text


def _plain(text: str) -> Tokenizer:
    copy = Tokenizer.from_str(text)
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = True
    return copy


def _unspelt(text: str, names: Iterable[str]) -> str:
    """A tokenizer.json whose model cannot make special tokens of a text: a vocabulary that is
    searched for pieces (Unigram) or whole words has them as if they were some of these."""
    table = json.loads(text)
    vocabulary = table["model"]["vocab"]
    hidden = {name: f"\0{name}" for name in names}  # no text that is asked about has a NUL
    table["model"]["vocab"] = (
        {hidden.get(piece, piece): place for piece, place in vocabulary.items()}
        if isinstance(vocabulary, dict)
        else [[hidden.get(piece, piece), score] for piece, score in vocabulary]
    )
    return json.dumps(table)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{type(tokenizer).__name__} has no fast tokenizer; character offsets need one"
        )
    return backend


@dataclass(frozen=True)
class Template:
    """The special tokens around a question and its context, read off the tokenizer itself."""

    ids: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    types: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    question_type: int
    context_type: int
    cls: int

    @property
    def specials(self) -> int:
        return sum(map(len, self.ids))

    @property
    def before(self) -> int:
        return len(self.ids[0])

    @property
    def between(self) -> int:
        return len(self.ids[1])

    @classmethod
    def of(cls, backend: Tokenizer, cls_token_id: int | None) -> Template:
        pair = backend.encode("a", "b")
        sequence = list(pair.sequence_ids)
        first, last = sequence.index(0), len(sequence) - 1 - sequence[::-1].index(0)
        second, final = sequence.index(1), len(sequence) - 1 - sequence[::-1].index(1)
        parts = (slice(0, first), slice(last + 1, second), slice(final + 1, None))
        place = pair.ids.index(cls_token_id) if cls_token_id in pair.ids else 0
        return cls(
            ids=tuple(tuple(pair.ids[part]) for part in parts),  # type: ignore[arg-type]
            types=tuple(tuple(pair.type_ids[part]) for part in parts),  # type: ignore[arg-type]
            question_type=pair.type_ids[first],
            context_type=pair.type_ids[second],
            cls=place if place < second else place - len(sequence),
        )


@dataclass(frozen=True)
class Encoded:
    """Texts as flat token ids, int32 [C]; text i is ids[firsts[i]:firsts[i] + lengths[i]]."""

    ids: np.ndarray
    firsts: np.ndarray
    lengths: np.ndarray


def encode(backend: Tokenizer, texts: Sequence[str]) -> Encoded:
    """Tokenise texts without special tokens and without offsets, which cost the tokenizer time."""
    return _encode(backend.encode_batch_fast, texts)[0]


def encode_with_offsets(
    backend: Tokenizer, texts: Sequence[str], name: str
) -> tuple[Encoded, np.ndarray]:
    """Tokenise texts with a bare tokenizer; also the characters [start, end) of each token in its
    text, int32 [C, 2], as `true_offsets` makes them of the tokenizer's own.

    Raises:
        DataError: naming the tokenizer by `name`, as `true_offsets`.
    """
    encoded, offsets_C2 = _encode(backend.encode_batch, texts, offsets=True)
    # A space that the tokenizer puts in front of a word has no character, whatever it says.
    marks = [id for mark in "Ġ▁" if (id := backend.token_to_id(mark)) is not None]
    in_front_C = np.isin(encoded.ids, marks)
    in_front_C &= offsets_C2[:, 0] == np.append(offsets_C2[1:, 0], -1)
    offsets_C2[in_front_C, 1] = offsets_C2[in_front_C, 0]
    rewrite = backend.normalizer.normalize_str if backend.normalizer is not None else str
    return encoded, true_offsets(texts, encoded.lengths, offsets_C2, rewrite, name)


def _encode(
    batch: Callable[..., list[Encoding]], texts: Sequence[str], *, offsets: bool = False
) -> tuple[Encoded, np.ndarray]:
    ids: list[np.ndarray] = [np.zeros(0, np.int32)]
    spans: list[np.ndarray] = [np.zeros((0, 2), np.int32)]
    lengths: list[int] = []
    for place in range(0, len(texts), _CHUNK):
        encodings = batch(list(texts[place : place + _CHUNK]), add_special_tokens=False)
        rows = [encoding.ids for encoding in encodings]
        sizes = list(map(len, rows))
        ids.append(np.fromiter(chain.from_iterable(rows), np.int32, sum(sizes)))
        lengths += sizes
        if offsets:
            pairs = chain.from_iterable(encoding.offsets for encoding in encodings)
            flat = np.fromiter(chain.from_iterable(pairs), np.int32, 2 * sum(sizes))
            spans.append(flat.reshape(-1, 2))
    length = np.array(lengths, dtype=np.int64)
    return Encoded(np.concatenate(ids), np.cumsum(length) - length, length), np.concatenate(spans)


# --- the characters of tokens -------------------------------------------------------------------

_TEXT = 1 << 40  # more characters than a text has
_BLANK = np.array([chr(code).isspace() for code in range(0x3001)])  # none is above U+3000
_SIGNS = ("Mn", "Mc", "Me", "Cf")  # marks; joiners, selectors, soft hyphens, direction marks


def true_offsets(
    texts: Sequence[str],
    lengths: np.ndarray,
    offsets_C2: np.ndarray,
    rewrite: Callable[[str], str],
    name: str,
) -> np.ndarray:
    """What a tokenizer says of its tokens' characters, checked and mended.

    - Blanks around a token's text are not its own: many tokenizers count the space before a word.
    - A sign (`_SIGNS`) in no token, since the normaliser drops it, belongs to the token it touches:
      the one before, else the one after. So does a letter that the normaliser joins to the one
      before it, or that is left out.
    - A token without characters, such as a lone space, gets the next token's start and the end of
      the one before: a span that begins or ends with it holds whole tokens, alone it is empty.

    Args:
        texts, lengths: what was tokenised, and how many tokens each text has, int64.
        offsets_C2: characters [start, end) of each token in its text, int [C, 2].
        rewrite: the tokenizer's normaliser, text to text.
        name: of the tokenizer, for errors.

    Returns:
        Characters [start, end) of each token, int32 [C, 2]; neither column goes back in a text.

    Raises:
        DataError: if offsets go back or leave their text, or a character that the normaliser keeps
            is in no token and touches none.
    """
    # All texts end to end, U positions, each closed by a line break, which no token holds.
    text = "".join(f"{text}\n" for text in texts)
    codes_U = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    blank_U = _BLANK[np.minimum(codes_U, len(_BLANK) - 1)] & (codes_U < len(_BLANK))
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    low_C = np.repeat(np.cumsum(sizes + 1) - sizes - 1, lengths)
    high_C = low_C + np.repeat(sizes, lengths)
    start_C, end_C = low_C + offsets_C2[:, 0], low_C + offsets_C2[:, 1]
    if not ((low_C <= start_C) & (start_C <= end_C) & (end_C <= high_C)).all():
        raise DataError(f"{name}: offsets of its tokens lie outside the text{_UNUSABLE}")
    start_C = _moved(start_C, blank_U, 1, end_C)
    end_C = _moved(end_C, blank_U, -1, start_C)
    some_C = start_C < end_C
    starts, ends = start_C[some_C], end_C[some_C]
    if (np.diff(starts) < 0).any() or (np.diff(ends) < 0).any():
        raise DataError(f"{name}: offsets of its tokens go back in the text{_UNUSABLE}")
    lost_U = ~blank_U & ~_covered(starts, ends, len(text))
    if lost_U.any():
        starts, ends, still_lost_U = _bring_back(lost_U, codes_U, starts, ends, rewrite)
        if still_lost_U.any():
            raise DataError(f"{name}: {_lost(texts, int(still_lost_U.argmax()))}{_UNUSABLE}")
    start_C[some_C], end_C[some_C] = starts, ends
    if not some_C.all():
        start_C[~some_C], end_C[~some_C] = len(text), 0
        start_C = np.minimum(np.minimum.accumulate(start_C[::-1])[::-1], high_C)
        end_C = np.maximum(np.maximum.accumulate(end_C), low_C)
    return np.stack([start_C - low_C, end_C - low_C], axis=1).astype(np.int32)


def _bring_back(
    lost_U: np.ndarray,
    codes_U: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    rewrite: Callable[[str], str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts and ends of tokens drawn out over what is in none of them (`lost_U`), and what that
    the normaliser keeps is lost even so, bool [U]."""
    seen = {int(code): chr(code) for code in np.unique(codes_U[lost_U])}
    signs = [code for code, character in seen.items() if _is_sign(character)]
    kept = [code for code in seen if code not in signs and _keeps(rewrite, seen[code])]
    lost_U = lost_U & np.isin(codes_U, [*signs, *kept])
    ends = _moved(ends, lost_U, 1)
    lost_U &= ~_covered(starts, ends, len(lost_U))
    starts = _moved(starts, lost_U, -1)
    lost_U &= ~_covered(starts, ends, len(lost_U)) & np.isin(codes_U, kept)
    return starts, ends, lost_U


def overlapping_tokens(
    chars_C2: np.ndarray, text_C: np.ndarray, text_A: np.ndarray, span_A2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """First and last row of chars_C2 that overlap each answer, int64 [A] each; the first is greater
    where none does.

    Args:
        chars_C2: as `true_offsets` gives them.
        text_C: number of each token's text, ascending.
        text_A: number of each answer's text.
        span_A2: characters [start, end) of each answer, int64; its outer blanks are in no token.
    """
    # One search over all texts at once: a text's characters count from its number.
    begin_A, end_A = (text_A * _TEXT + span_A2[:, side] for side in (0, 1))
    start_C, stop_C = (text_C * _TEXT + chars_C2[:, side] for side in (0, 1))
    first_A = np.searchsorted(stop_C, begin_A, side="right")
    return first_A, np.searchsorted(start_C, end_A, side="left") - 1


def _lost(texts: Sequence[str], place: int) -> str:
    """Says which character is in no token, by its place in all texts end to end."""
    number = 0
    while place > len(texts[number]):
        place -= len(texts[number]) + 1
        number += 1
    around = texts[number][max(0, place - 10) : place + 10]
    code = ord(texts[number][place])
    return f"U+{code:04X} in {around!r} is in none of its tokens, so answers would lose it"


_UNUSABLE = "; character offsets must be right: use another tokenizer for this model"


def _moved(
    place_C: np.ndarray, over_U: np.ndarray, step: Literal[1, -1], limit_C: np.ndarray | None = None
) -> np.ndarray:
    """Positions moved on to the right (1) or left (-1) over characters that are marked, none past
    its limit."""
    place_C, look = place_C.copy(), min(step, 0)  # to the left: the character before
    moving = np.flatnonzero(over_U[place_C + look])
    while len(moving):
        if limit_C is not None:
            moving = moving[place_C[moving] != limit_C[moving]]
        place_C[moving] += step
        moving = moving[over_U[place_C[moving] + look]]
    return place_C


def _covered(starts: np.ndarray, ends: np.ndarray, size: int) -> np.ndarray:
    """Whether each of `size` characters is in a range [start, end), bool."""
    edges = np.bincount(starts, minlength=size + 1) - np.bincount(ends, minlength=size + 1)
    return np.cumsum(edges)[:size] > 0


def _is_sign(character: str) -> bool:
    """Whether it only changes the character beside it; a half-width voicing mark does too."""
    return all(unicodedata.category(c) in _SIGNS for c in unicodedata.normalize("NFKD", character))


def _keeps(rewrite: Callable[[str], str], character: str) -> bool:
    """Whether a normaliser leaves anything of a character but a blank."""
    return rewrite(f"a{character}a") not in (rewrite("aa"), rewrite("a a"))
