"""DeepSpeed's own checkpoint files, written through our store and read back by an allow-list.

DeepSpeed's engine calls its checkpoint engine for every file; this one puts them into the stage of
a checkpoint, and loads only what the manifest names, after it was held against it, without running
any code that a file may hold.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.checkpoint.files import is_lasting
from runner.checkpoint.store import CheckpointStore, Manifest, Stage
from runner.errors import DataError, StorageError
from runner.utils.disk import room
from runner.utils.files import storage_errors

_SCRIPTS = 2**18  # bytes that are more than enough for them


class StoreCheckpointEngine:
    """Takes the place of DeepSpeed's checkpoint engine (`engine.checkpoint_engine`), whose methods
    it has.

    Attributes:
        failure: the first failed write; it is kept until DeepSpeed is done, because an exception in
            the midst of its saving would leave the other ranks waiting.
        loaded: what was read, by file name.
        differences: after `compare`, where the state in memory is not the one in `loaded`.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self.failure: OSError | None = None
        self.loaded: dict[str, Any] = {}
        self.differences: list[str] = []
        self._store = store
        self._stage: Stage | None = None
        self._manifest: Manifest | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    # --- what DeepSpeed calls

    def create(self, info: Any) -> None:
        """A checkpoint is about to be saved."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are the store's."""

    def save(self, state_dict: Any, path: str) -> None:
        """Put a file into the stage; without a stage, compare it with what was loaded."""
        name = Path(path).name
        if self._stage is None:
            self.differences += _differences(state_dict, self.loaded.get(name), name)
            return
        try:
            self._stage.put(name, lambda file: torch.save(state_dict, file))  # type: ignore[arg-type]
        except OSError as error:
            self.failure = self.failure or error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file of the checkpoint that is being loaded."""
        if self._manifest is None:
            raise AssertionError("nothing is being loaded")
        name = Path(path).name
        with storage_errors():
            self._store.check(self._manifest, [name])
        self.loaded[name] = load_tensors(self._store.folder / self._manifest.name / name)
        return self.loaded[name]

    def commit(self, info: Any) -> bool:
        """Committing is the store's."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Rank 0 writes what all ranks have alike."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Files are written when `save` returns."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """Tensors that share memory are written once."""
        return True

    def cleanup(self) -> None:
        """Nothing is held."""

    # --- what we call

    def prepare(self) -> None:
        """Make the place for what DeepSpeed leaves beside its checkpoints: two scripts, which
        nobody is to find in a run and run.

        Raises:
            StorageError: if there is no room for them. Found out later, it would leave ranks
                waiting.
        """
        try:
            self._scratch = tempfile.TemporaryDirectory(prefix="spantune-")
            probe = Path(self._scratch.name, "room")
            probe.write_bytes(bytes(_SCRIPTS))
            probe.unlink()
        except OSError as error:
            if self._scratch is not None:
                self._scratch.cleanup()
                self._scratch = None
            folder = tempfile.tempdir  # None where not even a few bytes found room anywhere
            free = "" if folder is None else f", where {room(Path(folder))}"
            raise StorageError(
                f"{folder or 'temporary files'}: {error.strerror}; a checkpoint needs"
                f" {_SCRIPTS:,} bytes for a moment in the folder of temporary files{free}; free"
                " some space there or set TMPDIR to another folder"
            ) from error

    def write(self, engine: Any, stage: Stage) -> None:
        """Let an engine save itself into a stage, after `prepare`. Every rank must call this.

        Raises:
            OSError: if a file of this rank could not be written.
        """
        self.failure, self._stage = None, stage
        try:
            self._pass(engine)
        finally:
            self._stage = None
        if self.failure is not None:
            raise self.failure

    def read(self, engine: Any, manifest: Manifest) -> None:
        """Let an engine load a checkpoint, and make sure that its state is now the very state that
        was saved. Every rank must call this.

        Raises:
            DataError: if it is not.
        """
        self._manifest = manifest
        self.loaded, self.differences = {}, []
        # It looks for its files by a pattern; `load` goes by their names alone.
        folder = glob.escape(str(self._store.folder))
        try:
            path, _ = engine.load_checkpoint(folder, tag=manifest.name)
        except (RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{manifest.name}: DeepSpeed cannot load it: {reason}") from error
        finally:
            self._manifest = None
        if path is None:
            raise DataError(f"{manifest.name}: DeepSpeed found nothing to load in it")
        self.prepare()
        self._pass(engine)
        self.loaded = {}
        if self.differences:
            raise DataError(
                f"{manifest.name}: DeepSpeed loads another state than it saved:"
                f" {', '.join(self.differences[:3])}"
            )

    def _pass(self, engine: Any) -> None:
        """Let the engine call `save` for each of this rank's files."""
        scratch, self._scratch = self._scratch, None
        if scratch is None:
            raise AssertionError("prepare comes first")
        # A failure in here would be this rank's alone: it must end it, and so the others.
        with scratch, storage_errors(Path(scratch.name)):
            engine.save_checkpoint(scratch.name, tag="files", save_latest=False)


def load_tensors(path: Path) -> Any:
    """Read a file of tensors and plain values to the CPU; nothing else can be in it.

    Raises:
        DataError: if it holds anything else, or is no such file.
        StorageError: if it cannot be read now.
    """
    try:
        with torch.serialization.safe_globals(_allowed()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if is_lasting(error):
            raise DataError(f"{path}: is refused: {error.strerror or error}") from None
        raise StorageError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # torch has no kind of its own for files that it cannot read
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: is refused: {reason}") from None


def _allowed() -> list[Any]:
    """What DeepSpeed's files hold besides tensors and plain values: records without behaviour."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _differences(one: Any, other: Any, place: str) -> list[str]:
    """Where two states differ, bit for bit in their tensors; objects are compared by their
    attributes."""
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and _same_bits(one.detach().cpu(), other)
        return [] if same else [place]
    if isinstance(one, Mapping):
        if not isinstance(other, Mapping) or list(one) != list(other):
            return [place]
        pairs = [(one[key], other[key], f"{place}: {key}") for key in one]
    elif isinstance(one, list | tuple):
        if not isinstance(other, list | tuple) or len(one) != len(other):
            return [place]
        pairs = [(a, b, f"{place}[{n}]") for n, (a, b) in enumerate(zip(one, other, strict=True))]
    elif hasattr(one, "__dict__") and not isinstance(one, Enum) and type(one) is type(other):
        return _differences(vars(one), vars(other), place)
    else:
        return [] if one == other or (one != one and other != other) else [place]
    return [found for a, b, where in pairs for found in _differences(a, b, where)]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one_B, other_B = (t.reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(one_B, other_B)
