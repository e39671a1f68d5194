"""Weights of any size that take no room on the disk: their header, and a hole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path


def save_hollow(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Write a file of safetensors in float32, all of them zeros, of which the header alone is
    there."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": [*shape], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
