"""Keeps windows as memory-mapped arrays, so that ranks share one copy and a second run has none to
make."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from runner.data import tokenize, windows
from runner.data.dataset import Example
from runner.data.tokenize import tokenizer_sha256
from runner.data.windows import (
    Windows,
    build_windows,
    continued,
    one_block,
    ranges,
    window_blocks,
)
from runner.errors import StorageError
from runner.utils.files import file_sha256, folder_aside, storage_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SUMS = "SHA256SUMS"
_DRAWN = 16  # questions whose windows are made anew when they are found in the cache
_FIELDS = tuple(field.name for field in dataclasses.fields(Windows))


def cached_windows(
    examples: Sequence[Example],
    content_sha256: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    on_block: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda line: None,
) -> tuple[Windows, bool]:
    """Load the windows from the cache, or build and store them. Returns them and whether the cache
    had them.

    The key is made of the questions' content, the tokenizer, both settings and the code, so nothing
    stale is ever read. What stands under a key is held against its hashes, and the windows of some
    questions, drawn anew each time, against windows made now: whoever may write in the cache could
    have put there what belongs to other questions. Only one rank should build; the others call this
    afterwards and map the same files. Windows are written as they are made: memory does not grow
    with their number.

    `on_block` is called before each block of questions that is tokenised; it may end that by an
    exception, and nothing is stored then. `warn` is told why they cannot be stored.
    """
    key = cache_key(content_sha256, tokenizer, max_length, stride)
    folder = cache_root() / "features" / key
    found = _load(folder)
    if found is not None:
        if _are_of(found, examples, tokenizer, max_length, stride):
            return found, True
        shutil.rmtree(folder, ignore_errors=True)
    try:
        blocks = window_blocks(examples, tokenizer, max_length, stride)
        _store(_announced(blocks, on_block), folder)
        found = _load(folder)
    except StorageError as error:  # a full cache disk costs time, never the run
        warn(f"windows are not kept for the next run: {error}; SPANTUNE_CACHE names another")
    return found or build_windows(examples, tokenizer, max_length, stride), False


def _are_of(
    found: Windows,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
) -> bool:
    """Whether windows are those of the questions: all of some questions are, and none is of a
    question that is not there."""
    count = len(examples)
    drawn = np.random.default_rng().choice(count, min(count, _DRAWN), replace=False)
    places = np.unique([*drawn.tolist(), *([0, count - 1] if count else [])]).astype(np.int64)
    made = one_block([examples[place] for place in places], tokenizer, max_length, stride)
    lengths_N, questions_N = found.lengths_N, found.questions_N
    if not ((lengths_N > 0) & (lengths_N <= max_length)).all():
        return False
    if not ((questions_N >= 0) & (questions_N < count)).all():
        return False
    inside = np.isin(questions_N, places)
    if not np.array_equal(questions_N[inside], places[made.questions_N]):
        return False
    try:
        theirs = _content(found, np.flatnonzero(inside))
    except (IndexError, ValueError):  # bounds that lead nowhere
        return False
    return all(map(np.array_equal, theirs, _content(made, np.arange(len(made)))))


def _content(part: Windows, rows: np.ndarray) -> list[np.ndarray]:
    """All that some windows hold, wherever they lie: tokens, types, bounds, labels, characters."""
    tokens = ranges(part.firsts_N1[rows], part.lengths_N[rows])
    low_N, high_N = part.contexts_N2[rows].T.astype(np.int64)
    characters = ranges(part.chars_firsts_N[rows] + low_N, high_N - low_N)
    per_window = (part.contexts_N2, part.starts_N, part.ends_N, part.cls_N, part.lengths_N)
    return [
        *(array[rows] for array in per_window),
        *(part.tokens_T[tokens], part.types_T[tokens], part.chars_C2[characters]),
    ]


def _announced(blocks: Iterable[Windows], on_block: Callable[[], None]) -> Iterator[Windows]:
    on_block()
    for block in blocks:
        yield block
        on_block()


def cache_key(
    content_sha256: str, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> str:
    """Name of the cache folder, 32 hex digits."""
    # All code that decides an array: windows of an older version are never read.
    files = (tokenize.__file__, windows.__file__, __file__)
    code = [Path(file).read_bytes() for file in files]
    parts = {
        "content": content_sha256,
        "tokenizer": tokenizer_sha256(tokenizer),
        "max_length": max_length,
        "stride": stride,
        "code": hashlib.sha256(b"".join(code)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cache_root() -> Path:
    """`$SPANTUNE_CACHE`, else the user's cache folder."""
    given = os.environ.get("SPANTUNE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spantune"


def _store(blocks: Iterable[Windows], folder: Path) -> None:
    # Also what is only found out when a file is closed.
    with storage_errors(folder), folder_aside(folder) as aside:
        _write(blocks, aside)
        (aside / _SUMS).write_text(_sums(aside), encoding="utf-8")


def _write(blocks: Iterable[Windows], folder: Path) -> None:
    """Write the arrays of all blocks end to end, one block after another."""
    rows = dict.fromkeys(_FIELDS, 0)
    files: dict[str, BinaryIO] = {}
    last: dict[str, np.ndarray] = {}
    with contextlib.ExitStack() as stack:
        for number, block in enumerate(blocks):
            for name in _FIELDS:
                values = continued(block, name, first=number == 0)
                if number == 0:
                    files[name] = stack.enter_context((folder / f"{name}.npy").open("wb"))
                    _header(files[name], values, 0)
                files[name].write(np.ascontiguousarray(values).tobytes())
                rows[name] += len(values)
                last[name] = values
        for name, file in files.items():
            file.seek(0)  # numpy leaves room in the header for the number of rows to grow
            _header(file, last[name], rows[name])


def _header(file: BinaryIO, values: np.ndarray, rows: int) -> None:
    shape = (rows, *values.shape[1:])
    header = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _load(folder: Path) -> Windows | None:
    """Map the arrays of a cache folder; None where it is absent or damaged, and so removed."""
    try:
        if not folder.is_dir():
            return None
        if (folder / _SUMS).read_text(encoding="utf-8") != _sums(folder):
            raise ValueError("not what was stored")
        # Plain arrays of the mapped memory: numpy's memmap costs more than the indexing itself.
        return Windows(
            **{
                name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
                for name in _FIELDS
            }
        )
    except (OSError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _sums(folder: Path) -> str:
    """Hashes of the arrays in a cache folder, in the form of `sha256sum`."""
    names = [f"{name}.npy" for name in _FIELDS]
    return "".join(f"{file_sha256(folder / name)}  {name}\n" for name in names)


def windows_sha256(*parts: Windows) -> str:
    """Hash of all arrays of windows: of the tokens and labels themselves."""
    digest = hashlib.sha256()
    for part in parts:
        for name in _FIELDS:
            digest.update(memoryview(getattr(part, name)).cast("B"))
    return digest.hexdigest()
