"""Tokenises questions and contexts, each text once, and lays special tokens around them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

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
    settings."""
    copy = Tokenizer.from_str(_backend(tokenizer).to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


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
    def of(cls, backend: Tokenizer, tokenizer: PreTrainedTokenizerBase) -> Template:
        pair = backend.encode("a", "b")
        sequence = list(pair.sequence_ids)
        first, last = sequence.index(0), len(sequence) - 1 - sequence[::-1].index(0)
        second, final = sequence.index(1), len(sequence) - 1 - sequence[::-1].index(1)
        parts = (slice(0, first), slice(last + 1, second), slice(final + 1, None))
        place = pair.ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in pair.ids else 0
        return cls(
            ids=tuple(tuple(pair.ids[part]) for part in parts),  # type: ignore[arg-type]
            types=tuple(tuple(pair.type_ids[part]) for part in parts),  # type: ignore[arg-type]
            question_type=pair.type_ids[first],
            context_type=pair.type_ids[second],
            cls=place if place < second else place - len(sequence),
        )


@dataclass(frozen=True)
class Encoded:
    """Texts as flat token ids; text i is ids[firsts[i]:firsts[i] + lengths[i]]."""

    ids: np.ndarray
    offsets: np.ndarray
    firsts: np.ndarray
    lengths: np.ndarray


def encode(backend: Tokenizer, texts: Sequence[str], *, offsets: bool) -> Encoded:
    ids: list[np.ndarray] = []
    spans: list[np.ndarray] = []
    lengths: list[int] = []
    # Without offsets the tokenizer has less to do.
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    for place in range(0, len(texts), _CHUNK):
        encodings = encode(list(texts[place : place + _CHUNK]), add_special_tokens=False)
        rows = [encoding.ids for encoding in encodings]
        sizes = list(map(len, rows))
        ids.append(np.fromiter(chain.from_iterable(rows), np.int32, sum(sizes)))
        lengths += sizes
        if offsets:
            pairs = chain.from_iterable(encoding.offsets for encoding in encodings)
            flat = np.fromiter(chain.from_iterable(pairs), np.int32, 2 * sum(sizes))
            spans.append(flat.reshape(-1, 2))
    length = np.array(lengths, dtype=np.int64)
    return Encoded(
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        offsets=np.concatenate(spans) if spans else np.zeros((0, 2), np.int32),
        firsts=np.cumsum(length) - length,
        lengths=length,
    )
