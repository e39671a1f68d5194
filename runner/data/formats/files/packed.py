"""Files that gzip has packed: known by their first bytes, whatever they are called."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

from runner.errors import DataError
from runner.utils.text import first_line

MAGIC = b"\x1f\x8b"
_EXPANSION, _FREE = 100, 2**28  # times that a file may grow when it is read, beyond 256 MiB


def expansion_limit(size: int) -> int:
    """Bytes that a file of `size` bytes may hold: a few kilobytes can stand for any number."""
    return _EXPANSION * size + _FREE


def too_large(path: Path, size: int) -> DataError:
    """What to say of a file of `size` bytes that holds more than its limit."""
    return DataError(
        f"{path}: its {size:,} bytes hold more than {expansion_limit(size):,} of content"
    )


def unpacked(path: Path, raw: bytes) -> bytes:
    """The bytes of a file, without gzip around them.

    Raises:
        DataError: if it is damaged, or larger than any data set.
    """
    if not raw.startswith(MAGIC):
        return raw
    limit = expansion_limit(len(raw))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            content = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not valid gzip: {first_line(error)}") from None
    if len(content) > limit:
        raise too_large(path, len(raw))
    return content
