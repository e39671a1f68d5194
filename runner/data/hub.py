"""Brings a hub repository, at one commit, into this machine's cache; or says within seconds that it
is not here and how to fetch it.

Models and data sets go the same way: one look at the hub, and none at all where the job pins a
commit whose files are in the cache. What is loaded afterwards is a folder.
"""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, httpx

from runner.errors import AssetError, StorageError
from runner.job.assets import UNWANTED, AssetKind, fetch_command, wanted_files
from runner.utils.disk import full_disk, no_room
from runner.utils.text import first_line

# Seconds to wait for the hub's first answer. Its client waits for ever by itself, and the firewalls
# of compute nodes swallow packets without a word.
HUB_TIMEOUT_S = 10
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Snapshot:
    """A repository's files as they are at one commit."""

    folder: Path
    commit: str


@functools.cache  # a run sees one commit, even if somebody pushes meanwhile
def snapshot(kind: AssetKind, name: str, revision: str | None) -> Snapshot:
    """Get a model's configuration, tokenizer and weights (safetensors; where it has none, pickles),
    or a data set's card and data files.

    Raises:
        AssetError: saying why they are not to be had, and how to fetch them.
        StorageError: if the cache has no room for them.
    """
    names = _cached_names(kind, name, revision)
    cached, missing = _cached(kind, name, revision, names)
    if cached and missing == "" and _COMMIT.fullmatch(revision or ""):
        return cached
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        # Asked first because it takes a time limit; snapshot_download does not.
        about: Any = HfApi().repo_info(
            name, repo_type=kind, revision=revision, timeout=HUB_TIMEOUT_S
        )
        names = [file.rfilename for file in about.siblings or ()]
        return _at(
            snapshot_download(
                name,
                repo_type=kind,
                revision=revision,
                allow_patterns=wanted_files(kind, names),
                ignore_patterns=list(UNWANTED[kind]),
            )
        )
    except RevisionNotFoundError:
        raise AssetError(f"{name}: the hub has no revision {revision} of this {kind}") from None
    except (OSError, httpx.HTTPError) as error:
        if cached:
            return cached
        full = full_disk(error)
        if full is not None:
            raise StorageError(no_room(full, full.filename or HF_HUB_CACHE)) from None
        if isinstance(error, RepositoryNotFoundError):
            raise AssetError(
                f"{name}: the hub has no {kind} of this name, or it is a private or gated one; for"
                " those, run: hf auth login"
            ) from None
        raise AssetError(
            f"{name}: {missing or 'not in the local cache'}, and {_reason(error)}; on a machine"
            f" with network run: {fetch_command(kind, name, revision, names or ())}"
        ) from None


def _cached_names(kind: AssetKind, name: str, revision: str | None) -> list[str] | None:
    """The files of a revision, as the cache remembers them; None where it does not."""
    try:
        return [f.path for f in get_cached_repo_tree(name, repo_type=kind, revision=revision)]
    except CachedRepoTreeNotFoundError:
        return None


def _cached(
    kind: AssetKind, name: str, revision: str | None, names: list[str] | None
) -> tuple[Snapshot | None, str | None]:
    """What the cache holds of a revision, and what it lacks: "" for nothing, None if unknown,
    because another program fetched single files."""
    try:
        folder = snapshot_download(
            name,
            repo_type=kind,
            revision=revision,
            allow_patterns=wanted_files(kind, names or ()),
            ignore_patterns=list(UNWANTED[kind]),
            local_files_only=True,
        )
    except IncompleteSnapshotError as error:
        found = re.search(r"\d+ file\(s\) are missing \(.*?\)", str(error))
        return None, f"{found[0] if found else 'files are missing'} from the local cache"
    except LocalEntryNotFoundError:
        return None, None
    return _at(folder), None if names is None else ""


def _at(folder: str) -> Snapshot:
    return Snapshot(Path(folder), Path(folder).name)


def _reason(error: Exception) -> str:
    """Why the hub gave nothing, in a few words."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps this process from the hub"
    return f"the hub cannot be reached ({first_line(error)})"
