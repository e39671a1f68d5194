"""What a job needs from the Hugging Face hub: whether it is in the cache already, and whether the
hub can be reached at all, asked once and with a time limit."""

from __future__ import annotations

import os
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.job import Job
from runner.sources import parse_data

PATIENCE = 5.0  # seconds for a connection; the libraries would try for minutes


@dataclass(frozen=True)
class Asset:
    """A repository of the hub.

    Attributes:
        kind: "models" or "datasets".
        name: its id, owner/name.
        fetch: a command that fills the cache with it, on a machine with a network.
    """

    kind: str
    name: str
    fetch: str


def hub_assets(job: Job) -> list[Asset]:
    """The repositories that a job reads; files, folders and packages are none."""
    assets = []
    name = job.model.name
    if not name.startswith(("/", "package:")):  # a folder's name has been made absolute
        revision = f" --revision {job.model.revision}" if job.model.revision else ""
        assets.append(Asset("models", name, f"hf download {name}{revision}"))
    for text in (job.data.train, job.data.validation):
        source = parse_data(text)
        if source.kind == "hub":
            given = [source.location, *([source.config] if source.config else [])]
            revision = f", revision={source.revision!r}" if source.revision else ""
            call = f"datasets.load_dataset({', '.join(map(repr, given))}{revision})"
            fetch = f'python -c "import datasets; {call}"'
            assets.append(Asset("datasets", source.location, fetch))
    return list({(asset.kind, asset.fetch): asset for asset in assets}.values())


def not_cached(job: Job, environment: Mapping[str, str]) -> list[Asset]:
    """Those of a job's repositories that the hub's cache has nothing of.

    Args:
        job: the job.
        environment: variables of the run; HF_HOME and HF_HUB_CACHE say where its cache is.
    """
    home = _first(environment, "HF_HOME") or f"{_first(environment, 'XDG_CACHE_HOME')}/huggingface"
    if home == "/huggingface":
        home = os.path.expanduser("~/.cache/huggingface")
    cache = Path(_first(environment, "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") or f"{home}/hub")
    return [
        asset
        for asset in hub_assets(job)
        if not any((cache / f"{asset.kind}--{asset.name.replace('/', '--')}").glob("snapshots/*"))
    ]


def offline_if_unreachable(job: Job) -> bool:
    """Where a job needs the hub and it cannot be reached, tell the libraries so (HF_HUB_OFFLINE):
    what is cached is then used at once, and what is missing is an error at once. Call it before
    they are imported.

    Returns:
        whether it has told them.
    """
    told = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"} & set(os.environ)
    if told or not hub_assets(job) or _answers(*_door()):
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"
    return True


def _door() -> tuple[str, int]:
    """Host and port behind which the hub is: its own, or a proxy's."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = urllib.parse.urlsplit(endpoint)
    host = url.hostname or "huggingface.co"
    proxies = urllib.request.getproxies()
    if not urllib.request.proxy_bypass(host):
        named = [proxies[kind] for kind in (url.scheme, "all") if kind in proxies]
        if named:
            url = urllib.parse.urlsplit(named[0])
            host = url.hostname or host
    return host, url.port or (80 if url.scheme == "http" else 443)


def _answers(host: str, port: int) -> bool:
    """Whether somebody listens there; a thread asks, since looking up a name has no time limit."""
    answered = threading.Event()

    def knock() -> None:
        try:
            socket.create_connection((host, port), PATIENCE).close()
            answered.set()
        except OSError:
            pass
        finally:
            done.set()

    done = threading.Event()
    threading.Thread(target=knock, daemon=True).start()
    done.wait(PATIENCE + 1)
    return answered.is_set()


def _first(environment: Mapping[str, str], *names: str) -> str | None:
    for table in (environment, os.environ):
        for name in names:
            if name in table:
                return table[name]
    return None
