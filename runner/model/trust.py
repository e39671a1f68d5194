"""Refuses model folders that ask for code of their own: a model is weights and words, and none of
its files is ever run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.errors import DataError

# Keys by which a configuration names Python files of its repository.
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
_KERNELS = "attn_implementation"  # part of keys that may name compiled code of the hub
_LIMIT = 2**24  # bytes of a configuration


def refuse_code(name: str, folder: Path) -> None:
    """Look through a model folder's configurations before any library reads them.

    Args:
        name: the model, as the job names it.
        folder: its files.

    Raises:
        DataError: naming the file and the key that asks for code.
    """
    for path in sorted(folder.glob("*config.json")):
        try:
            if path.stat().st_size > _LIMIT:
                raise DataError(f"{name}: {path.name} has more than {_LIMIT:,} bytes")
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # who reads it says what is wrong with it
        for key, value in _entries(table):
            kernel = _KERNELS in key and any(sign in str(value) for sign in "/:")
            if (key in _CODE and value) or kernel:
                raise DataError(
                    f"{name}: {path.name} asks for code that comes with the model ({key}), which is"
                    " never run; remove that key if the model is of an architecture that"
                    " transformers has"
                )


def _entries(table: Any) -> Iterator[tuple[str, Any]]:
    """Every key at any depth, with its value."""
    waiting = [table]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            yield from part.items()
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
