"""What a job needs from the Hugging Face hub: whether it is in the cache already, and whether the
hub can be reached at all, tried once and with a time limit."""

from __future__ import annotations

import os
import shlex
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from runner.errors import AssetError
from runner.job.schema import Job
from runner.job.sources import parse_data
from runner.utils.text import one_of

HUB_ANSWER_S = 5.0  # seconds for a connection; the libraries would try for minutes
# What is fetched of a repository, and what never (subfolders of a model: onnx/ and the like).
WANTED = {
    "model": ("*.json", "*.txt", "*.model"),
    "dataset": (
        *("README.md", ".huggingface.yaml", "*.json", "*.jsonl", "*.csv", "*.tsv", "*.parquet"),
        *("*.json.gz", "*.jsonl.gz", "*.csv.gz", "*.tsv.gz"),
    ),
}
# Weights, besides: pickles where a repository has nothing else, never both.
SAFE_WEIGHTS = ("*.safetensors",)
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*.bin")
UNWANTED = {"model": ("*/*",), "dataset": ()}
AssetKind = Literal["model", "dataset"]
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = {"1", "ON", "YES", "TRUE"}  # as the libraries read them


@dataclass(frozen=True)
class Asset:
    """A repository of the hub.

    Attributes:
        kind: "model" or "dataset".
        name: its id, owner/name.
        revision: which one is asked for; None is the newest.
        files: names of its files, as far as they are known.
    """

    kind: AssetKind
    name: str
    revision: str | None
    files: tuple[str, ...] = ()

    @property
    def fetch(self) -> str:
        """A command that fills the cache with it, on a machine with a network."""
        return fetch_command(self.kind, self.name, self.revision, self.files)


def hub_assets(job: Job) -> list[Asset]:
    """The repositories that a job reads; files, folders and packages are none."""
    wanted: list[tuple[AssetKind, str, str | None]] = []
    if not job.model.name.startswith(("/", "package:")):  # a folder's name has been made absolute
        wanted.append(("model", job.model.name, job.model.revision))
    for source in map(parse_data, job.data.names):
        if source.kind == "hub":
            wanted.append(("dataset", source.location, source.revision))
    return [Asset(*found) for found in dict.fromkeys(wanted)]


def wanted_files(kind: AssetKind, names: Iterable[str] = ()) -> list[str]:
    """Patterns of the files that are fetched of a repository.

    Args:
        kind: "model" or "dataset".
        names: its files, as far as they are known.
    """
    if kind == "dataset":
        return list(WANTED[kind])
    top = [name for name in names if "/" not in name]
    pickled = bool(top) and not _some(top, SAFE_WEIGHTS)
    return [*WANTED[kind], *(PICKLED_WEIGHTS if pickled else SAFE_WEIGHTS)]


def _some(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for name in names for pattern in patterns)


def fetch_command(
    kind: AssetKind, name: str, revision: str | None, names: Iterable[str] = ()
) -> str:
    """The command that brings a repository, whose files may be known, into the cache of a machine
    with network."""
    words = ["hf", "download", name]
    words += ["--repo-type", "dataset"] if kind == "dataset" else []
    words += ["--revision", revision] if revision else []
    # All files of a data set; of a model not the weights of four frameworks.
    patterns = wanted_files(kind, names) if kind == "model" else ()
    words += [word for pattern in patterns for word in ("--include", pattern)]
    words += [word for pattern in UNWANTED[kind] for word in ("--exclude", pattern)]
    return shlex.join(words)


def not_cached(job: Job, environment: Mapping[str, str]) -> list[Asset]:
    """Those of a job's repositories that the hub's cache has nothing of, or of a model no weights.

    Args:
        job: the job.
        environment: variables of the run that say where its cache is, HF_HOME first of all.
    """

    def first(*names: str) -> str | None:
        tables = (environment, os.environ)
        return next((t[name] for t in tables for name in names if t.get(name)), None)

    base = first("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = first("HF_HOME") or f"{base}/huggingface"
    hub = Path(first("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") or f"{home}/hub")

    lacking = []
    for asset in hub_assets(job):
        folder = hub / f"{asset.kind}s--{asset.name.replace('/', '--')}"
        files = tuple(path.name for path in folder.glob("snapshots/*/*"))
        there = (
            _some(files, SAFE_WEIGHTS + PICKLED_WEIGHTS)
            if asset.kind == "model"
            else any(folder.glob("snapshots/*"))
        )
        lacking += [] if there else [replace(asset, files=files)]
    return lacking


def check_assets(job: Job) -> None:
    """Where a job needs the hub and it cannot be reached, tell the libraries so (HF_HUB_OFFLINE):
    what is cached is then used at once. Call it before they are imported.

    Raises:
        AssetError: naming what is not cached, and how to fetch it.
    """
    needed = hub_assets(job)
    offline = next((name for name in _OFFLINE if os.environ.get(name, "").upper() in _TRUE), None)
    if not needed or (offline is None and _answers(*_hub_address())):
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    missing = not_cached(job, {})
    if missing:
        why = f"{offline} is set" if offline else f"{_hub_address()[0]} cannot be reached"
        fetch = " && ".join(asset.fetch for asset in missing)
        names = one_of(tuple(asset.name for asset in missing)).replace(" or ", " and ")
        raise AssetError(
            f"not in the cache, and {why}: {names}; on a machine with network run: {fetch}"
        )


def _hub_address() -> tuple[str, int]:
    """Host and port at which the hub is reached: its own, or a proxy's."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = urllib.parse.urlsplit(endpoint)
    host = url.hostname or "huggingface.co"
    proxies = urllib.request.getproxies()
    if not urllib.request.proxy_bypass(host):
        suitable = [proxies[kind] for kind in (url.scheme, "all") if kind in proxies]
        if suitable:
            url = urllib.parse.urlsplit(suitable[0])
            host = url.hostname or host
    return host, url.port or (80 if url.scheme == "http" else 443)


def _answers(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), HUB_ANSWER_S).close()
            answered.set()
        except OSError:
            pass
        finally:
            done.set()

    # In a thread, since looking up a name has no time limit.
    done = threading.Event()
    threading.Thread(target=connect, daemon=True).start()
    done.wait(HUB_ANSWER_S + 1)
    return answered.is_set()
