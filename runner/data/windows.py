"""Cuts contexts into windows of tokens and maps character answers to token labels.

Legend: N windows, T tokens of all windows end to end, C context tokens of all distinct contexts, Q
questions. Each context and each question is tokenised once; windows are ranges into them, assembled
by array arithmetic (Hugging Face's example tokenises a context again for each of its questions).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from runner.data.dataset import Example
from runner.data.formats.rows import short_value
from runner.data.tokenize import (
    Encoded,
    Template,
    bare_backend,
    encode,
    encode_with_offsets,
    overlapping_tokens,
    plain_backend,
)
from runner.errors import BadRowsError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_QUESTIONS = 16_384  # questions whose windows are made together: it bounds the memory

LABELS = "the tokens that overlap it"  # an answer's label; `answer_tokens` finds them


@dataclass(frozen=True)
class Windows:
    """The windows of a data set as flat arrays.

    Attributes:
        tokens_T: int32, token ids of all windows end to end, special tokens included, no padding.
        types_T: uint8, segment ids (0 question, 1 context where the tokenizer distinguishes them).
        firsts_N1: int64, window n is tokens_T[firsts_N1[n]:firsts_N1[n + 1]].
        questions_N: int32, position of the window's question in the data set, ascending.
        contexts_N2: int32, [lo, hi) positions in the window that hold context tokens.
        starts_N: int32, position of the answer's first token; the [CLS] position where the answer
            is not inside.
        ends_N: int32, position of the answer's last token (inclusive).
        cls_N: int32, position of the token that stands for "no answer here".
        chars_C2: int32, [start, end) character offsets of each context token, as
            `tokenize.true_offsets` makes them.
        chars_firsts_N: int64, row of chars_C2 that a token at position 0 of the window would have;
            the token at position p of the context has row chars_firsts_N[n] + p.
    """

    tokens_T: np.ndarray
    types_T: np.ndarray
    firsts_N1: np.ndarray
    questions_N: np.ndarray
    contexts_N2: np.ndarray
    starts_N: np.ndarray
    ends_N: np.ndarray
    cls_N: np.ndarray
    chars_C2: np.ndarray
    chars_firsts_N: np.ndarray

    def __len__(self) -> int:
        return len(self.questions_N)

    @property
    def lengths_N(self) -> np.ndarray:
        """Tokens in each window, int64."""
        return np.diff(self.firsts_N1)

    @property
    def answered_N(self) -> np.ndarray:
        """Whether the answer lies inside the window, bool."""
        return self.starts_N != self.cls_N


def build_windows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> Windows:
    """Make the windows that the tokenizer's own `truncation="only_second"` with overflow would
    make.

    The question is stripped on the left, as in Hugging Face's run_qa.py. Labels are the tokens that
    overlap a question's first answer, outer blanks aside, in windows that hold all of them.

    Args:
        examples: questions, in order.
        tokenizer: a fast tokenizer; its padding and truncation settings are ignored.
        max_length: tokens in a window at most.
        stride: tokens shared by neighbouring windows of a context.

    Raises:
        BadRowsError: for questions that leave too little room for their contexts, and answers of
            which no token holds anything.
        DataError: if the tokenizer is not a fast one, or its offsets cannot be used.
    """
    blocks = list(window_blocks(examples, tokenizer, max_length, stride))
    if len(blocks) == 1:
        return blocks[0]
    return Windows(
        **{
            field.name: np.concatenate(
                [continued(block, field.name, first=n == 0) for n, block in enumerate(blocks)]
            )
            for field in dataclasses.fields(Windows)
        }
    )


def continued(block: Windows, name: str, *, first: bool) -> np.ndarray:
    """What a block adds to an array of all windows: everything, but its first bound is the last of
    the block before."""
    values = getattr(block, name)
    return values if first or name != "firsts_N1" else values[1:]


def window_blocks(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    block: int = BLOCK_QUESTIONS,
) -> Iterator[Windows]:
    """Make windows for a block of questions at a time; positions count on from block to block.

    At least one block comes, an empty one where there is no question. Blocks end with a context,
    since questions that follow each other often share one.

    Raises:
        DataError: as `build_windows`.
    """
    begin = tokens = characters = 0
    bad: dict[int, str] = {}
    while begin == 0 or begin < len(examples):
        end = min(begin + block, len(examples))
        while 0 < end < len(examples) and examples[end].context == examples[end - 1].context:
            end += 1
        some = examples[begin:end]
        try:
            made = one_block(some, tokenizer, max_length, stride)
        except BadRowsError as error:  # all that are bad are told of at once
            bad |= {begin + place: why for place, why in error.rows.items()}
        else:
            if begin == 0:
                backend = plain_backend(tokenizer)
                backend.enable_truncation(max_length, stride=stride, strategy="only_second")
                _compare_with_tokenizer(made, some[:2], backend, _name(tokenizer))
            yield dataclasses.replace(
                made,
                firsts_N1=made.firsts_N1 + tokens,
                questions_N=(made.questions_N + begin).astype(np.int32),
                chars_firsts_N=made.chars_firsts_N + characters,
            )
            tokens += len(made.tokens_T)
            characters += len(made.chars_C2)
        begin = end
        if end == len(examples):
            break
    if bad:
        first = min(bad)
        more = f" and {len(bad) - 1} more questions" if len(bad) > 1 else ""
        raise BadRowsError(bad, f"question {examples[first].id}: {bad[first]}{more}")


def one_block(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> Windows:
    """Make the windows of some questions at once, not held against the tokenizer's own.

    Raises:
        DataError: as `build_windows`.
    """
    (backend, template), name = bare_backend(tokenizer), _name(tokenizer)
    context_of: dict[str, int] = {}
    place_Q = np.array(
        [context_of.setdefault(e.context, len(context_of)) for e in examples], dtype=np.int64
    )
    questions = encode(backend, [e.question.lstrip() for e in examples])
    contexts, chars_C2 = encode_with_offsets(backend, list(context_of), name)

    room_Q = max_length - template.specials - questions.lengths
    _check_room(room_Q, contexts.lengths[place_Q], template, max_length, stride)
    # Windows of one question start every `room - stride` context tokens until one reaches the
    # context's end.
    length_Q = contexts.lengths[place_Q]
    step_Q = np.maximum(room_Q - stride, 1)
    count_Q = 1 + np.maximum(0, -(-(length_Q - room_Q) // step_Q))
    questions_N = np.repeat(np.arange(len(examples)), count_Q)
    nth_N = np.arange(len(questions_N)) - np.repeat(np.cumsum(count_Q) - count_Q, count_Q)
    from_N = nth_N * step_Q[questions_N]
    to_N = np.minimum(from_N + room_Q[questions_N], length_Q[questions_N])

    tokens_T, types_T, firsts_N1 = _assemble(
        template, questions, contexts, place_Q, questions_N, from_N, to_N
    )
    low_N = template.before + questions.lengths[questions_N] + template.between
    cls_N = np.full(len(questions_N), template.cls, dtype=np.int64)
    if template.cls < 0:  # counted from the end, as in XLNet
        cls_N += np.diff(firsts_N1)
    chars_firsts_N = contexts.firsts[place_Q[questions_N]] + from_N - low_N
    first_Q, last_Q = answer_tokens(examples, contexts, chars_C2, place_Q)
    first_N, last_N = first_Q[questions_N], last_Q[questions_N]
    inside_N = (from_N <= first_N) & (first_N <= last_N) & (last_N < to_N)
    starts_N, ends_N = (
        np.where(inside_N, low_N + token_N - from_N, cls_N) for token_N in (first_N, last_N)
    )
    return Windows(
        tokens_T=tokens_T,
        types_T=types_T,
        firsts_N1=firsts_N1,
        questions_N=questions_N.astype(np.int32),
        contexts_N2=np.stack([low_N, low_N + to_N - from_N], axis=1).astype(np.int32),
        starts_N=starts_N.astype(np.int32),
        ends_N=ends_N.astype(np.int32),
        cls_N=cls_N.astype(np.int32),
        chars_C2=chars_C2,
        chars_firsts_N=chars_firsts_N,
    )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__


def _check_room(
    room_Q: np.ndarray, length_Q: np.ndarray, template: Template, max_length: int, stride: int
) -> None:
    """Refuse questions that leave too little room for their contexts' tokens (`length_Q`)."""
    tight_Q = (room_Q <= stride) & ((length_Q > room_Q) | (room_Q < 1))
    bad = {
        place: "question is too long for its window"
        f" (its {max_length - template.specials - room_Q[place]} tokens and"
        f" {template.specials} special tokens leave {max(0, room_Q[place])} of max_length"
        f" {max_length} for the context, which must be more than stride {stride};"
        " raise max_length or lower stride)"
        for place in np.flatnonzero(tight_Q).tolist()
    }
    if bad:
        raise BadRowsError(bad)


def _assemble(
    template: Template,
    questions: Encoded,
    contexts: Encoded,
    place_Q: np.ndarray,
    questions_N: np.ndarray,
    from_N: np.ndarray,
    to_N: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, types and bounds of all windows."""
    # Each window is five ranges of one pool: special, question, special, context, special.
    specials = np.array([token for part in template.ids for token in part], dtype=np.int32)
    special_types = np.array([kind for part in template.types for kind in part], dtype=np.uint8)
    pool = np.concatenate([specials, questions.ids, contexts.ids])
    pool_types = np.concatenate(
        [
            special_types,
            np.full(len(questions.ids), template.question_type, np.uint8),
            np.full(len(contexts.ids), template.context_type, np.uint8),
        ]
    )
    before, between = template.before, template.between
    after = template.specials - before - between
    count = len(questions_N)
    starts = np.stack(
        [
            np.zeros(count, np.int64),
            len(specials) + questions.firsts[questions_N],
            np.full(count, before),
            len(specials) + len(questions.ids) + contexts.firsts[place_Q[questions_N]] + from_N,
            np.full(count, before + between),
        ],
        axis=1,
    ).reshape(-1)
    sizes = np.stack(
        [
            np.full(count, before),
            questions.lengths[questions_N],
            np.full(count, between),
            to_N - from_N,
            np.full(count, after),
        ],
        axis=1,
    ).reshape(-1)
    index_T = ranges(starts, sizes)
    firsts_N1 = np.concatenate([[0], np.cumsum(sizes.reshape(-1, 5).sum(axis=1))]).astype(np.int64)
    return pool[index_T], pool_types[index_T], firsts_N1


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Concatenate `arange(start, start + size)` over all pairs, without a Python loop. int64."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)


def answer_tokens(
    examples: Sequence[Example], contexts: Encoded, chars_C2: np.ndarray, place_Q: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """First and last of the tokens that overlap each question's first answer, in its context's
    tokens, int64 [Q] each; (-1, -1) without an answer.

    Not run_qa's rule, the first token that ends at or after the answer's last character: where that
    character is in no token (a blank, a mark that the normaliser drops), it is the next word.
    """
    answered_Q = np.array([bool(e.answers) for e in examples], dtype=bool)
    char_Q2 = np.zeros((len(examples), 2), dtype=np.int64)
    spans = [
        (e.answer_starts[0], e.answer_starts[0] + len(e.answers[0])) for e in examples if e.answers
    ]
    char_Q2[answered_Q] = np.array(spans, dtype=np.int64).reshape(-1, 2)
    context_C = np.repeat(np.arange(len(contexts.lengths)), contexts.lengths)
    first_Q, last_Q = overlapping_tokens(chars_C2, context_C, place_Q, char_Q2)
    lost_Q = answered_Q & (first_Q > last_Q)
    if lost_Q.any():
        raise BadRowsError(
            {
                place: "answer is in no token: the tokenizer drops its characters"
                f" ({short_value(examples[place].answers[0])})"
                for place in np.flatnonzero(lost_Q).tolist()
            }
        )
    first_C = contexts.firsts[place_Q]
    return np.where(answered_Q, first_Q - first_C, -1), np.where(answered_Q, last_Q - first_C, -1)


def _compare_with_tokenizer(
    windows: Windows, examples: Sequence[Example], truncating: Tokenizer, name: str
) -> None:
    """Hold windows against the tokenizer's own: a misread template must not train a wrong model."""
    for place, example in enumerate(examples):
        encoding = truncating.encode(example.question.lstrip(), example.context)
        theirs = [encoding.ids, *(piece.ids for piece in encoding.overflowing)]
        mine = [
            windows.tokens_T[windows.firsts_N1[n] : windows.firsts_N1[n + 1]].tolist()
            for n in np.flatnonzero(windows.questions_N == place)
        ]
        if mine != theirs:
            raise DataError(
                f"question {example.id}: {name} builds pairs in a way that"
                " spantune does not know; please report the model's name"
            )
