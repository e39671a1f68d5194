"""Tokenizers that transformers makes of a sentencepiece model (spm.model, sentencepiece.bpe.model,
spiece.model): what it leaves out is put back, and the result is held against sentencepiece itself.
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from runner.errors import DataError
from runner.model.config import reading
from runner.utils.text import first_line

# The general class, to be saved by the name that transformers 4 knows too.
_General: Any = type("PreTrainedTokenizerFast", (PreTrainedTokenizerFast,), {})

# Texts that every vocabulary of a language in Latin letters cuts into pieces, and rarer ones.
PLAIN = (
    "Who wrote the old guide, and when was it printed?",
    "the lantern folds flat; its battery lasts nine hours on the bright setting.",
    "a lamp 2 costs 15,000.50 euros (in 1912)",
)
RARE = (
    "café naïve Ångström cafe\u0301",
    "東京は大きい。서울 Москва",
    "x² ½ … ﬁne \uff21\uff22\uff12 ™",
    "it\u2019s “fine” \u2013 no\u00a0break",
    "😀 ok 👩\u200d🚀",
    "a\nb\tc  d",
)


def restored(
    tokenizer: PreTrainedTokenizerBase, folder: Path, name: str
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer with the table of characters that its files have and that transformers' class
    may leave out, as those of DeBERTa-v2 and BigBird do: full-width letters, ligatures, dots and
    the like would be unknown to a model that has learnt them as others.

    Args:
        tokenizer: as transformers opened it.
        folder: with its files.
        name: of the model, for messages.

    Returns:
        It, or one of transformers' general class, which every program opens alike; and lines for
        the log.

    Raises:
        DataError: if it cuts plain texts otherwise than its sentencepiece model.
    """
    notes: list[str] = []
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return tokenizer, notes  # not a fast one, which is refused where its tokens are asked for
    file = _model_file(folder)
    if file is not None and not _adds_special_tokens(tokenizer):
        tokenizer = _opened_again(tokenizer, folder)
    table = b"" if b'"Precompiled"' in _spelt(tokenizer) else _published_table(folder)
    if table:
        with reading(f"{name}: the table of characters of its tokenizer"):
            tokenizer = _with_table(tokenizer, table)
        notes.append(
            "tokenizer: the table of characters in its files, which transformers leaves out, is"
            " in use"
        )
    if file is None:
        return tokenizer, notes
    found = list(_differences(tokenizer, file))
    plain = [sentence for text, sentence in found if text is None or text in PLAIN]
    if plain:
        raise DataError(
            f"{name}: the tokenizer that transformers makes of {file.name} is not the one of that"
            f" file: {plain[0]}; put the tokenizer.json of this model beside it"
        )
    rare = "tokenizer: transformers makes of {} what differs for rare characters: {}"
    return tokenizer, notes + [rare.format(file.name, sentence) for _, sentence in found[:1]]


def refuse_damaged(folder: Path, name: str) -> None:
    """Say which sentencepiece model is none: transformers takes it for a file of tiktoken's then.

    Raises:
        DataError: naming the file, or the package that reads it.
    """
    file = _model_file(folder)
    if file is not None:
        try:
            _proto(file)
        except ImportError as error:
            raise DataError(
                f"{name}: {file.name} is read with a package that is not here: {error}; run: pip"
                " install sentencepiece protobuf"
            ) from None
        except Exception as error:
            raise DataError(
                f"{name}: {file.name} is no sentencepiece model: {first_line(error)}"
            ) from None


def _model_file(folder: Path) -> Path | None:
    """The sentencepiece model that a tokenizer is made of; None where there is a tokenizer.json."""
    if (folder / "tokenizer.json").is_file():
        return None
    return next((path for path in sorted(folder.glob("*.model")) if path.is_file()), None)


def _proto(file: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(file.read_bytes())
    if not proto.pieces:
        raise ValueError("has no pieces")
    return proto


def _published_table(folder: Path) -> bytes:
    """The table of characters of a tokenizer's files, as sentencepiece compiles it; may be
    empty."""
    file = _model_file(folder)
    if file is not None:
        return bytes(_proto(file).normalizer_spec.precompiled_charsmap)
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        # Of a large vocabulary the rest would take a second to read.
        if '"Precompiled"' not in text:
            return b""
        found = json.loads(text)["normalizer"]
        parts = found.get("normalizers", [found])
        tables = [part["precompiled_charsmap"] for part in parts if part["type"] == "Precompiled"]
        return base64.b64decode(tables[0]) if tables else b""
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return b""  # whoever reads the file says what is wrong with it


def _spelt(tokenizer: Any) -> bytes:
    normaliser = tokenizer.backend_tokenizer.normalizer
    return normaliser.__getstate__() if normaliser is not None else b""


def _adds_special_tokens(tokenizer: Any) -> bool:
    return (
        tokenizer("a", "b")["input_ids"]
        != tokenizer("a", "b", add_special_tokens=False)["input_ids"]
    )


def _opened_again(tokenizer: Any, folder: Path) -> Any:
    """A tokenizer as it is after being saved: of a sentencepiece model alone, transformers makes
    RemBERT's without the special tokens around a pair, and forgets only then that it has none."""
    with tempfile.TemporaryDirectory(prefix="spantune-") as place:
        tokenizer.save_pretrained(place)
        shutil.copy(folder / "config.json", place)
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def _with_table(tokenizer: Any, table: bytes) -> PreTrainedTokenizerBase:
    backend = tokenizer.backend_tokenizer
    rest = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Precompiled(table), *rest])  # type: ignore[assignment]
    kept = ("model_input_names", "model_max_length", "padding_side", "truncation_side")
    return _General(
        tokenizer_object=backend,
        **tokenizer.special_tokens_map,
        **{name: getattr(tokenizer, name) for name in kept},
    )


def _differences(tokenizer: Any, file: Path) -> Iterator[tuple[str | None, str]]:
    """Texts that a tokenizer cuts otherwise than sentencepiece, each with a sentence on it; None
    for a text of which it makes special tokens: it takes a wrong piece for the unknown one."""
    from sentencepiece import SentencePieceProcessor

    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    pieces: Any = SentencePieceProcessor(model_file=str(file))
    normaliser, unknown = tokenizer.backend_tokenizer.normalizer, tokenizer.unk_token_id
    for text in (*PLAIN, *RARE):
        # What a family does before sentencepiece sees a text, such as lower case, is its own.
        written = text if normaliser is None else normaliser.normalize_str(text)
        theirs = [
            unknown
            if pieces.is_unknown(n)
            else tokenizer.convert_tokens_to_ids(pieces.IdToPiece(n))
            for n in pieces.encode(written)
        ]
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        # Unknown characters in a row are one token here and several there.
        ours, theirs = ([id for id, _ in groupby(ids)] for ids in (ours, theirs))
        if ours != theirs:
            spelt = (" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (ours, theirs))
            yield (
                None if special & {*ours} else text,
                "{!r} gives {}, sentencepiece gives {}".format(text, *spelt),
            )
