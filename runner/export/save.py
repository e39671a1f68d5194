"""Writes `model/` as transformers reads it."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runner.job.inference import KEY, InferenceSettings
from runner.utils.files import Fence, is_there, rust_errors, storage_errors


def gathered_state(engine: Any, stage: int) -> dict[str, Tensor]:
    """Return all weights on the CPU: on rank 0 complete, elsewhere empty. Every rank must call
    this.

    Taken from the module itself and never from optimiser shards, so that frozen parameters are
    always in it. The weights keep the precision that was trained and scored.
    """
    module = engine.module
    main = engine.global_rank == 0
    if stage < 3:
        return (
            {name: t.detach().cpu().clone() for name, t in module.state_dict().items()}
            if main
            else {}
        )
    import deepspeed

    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if main:
                state[name] = parameter.detach().cpu().clone()
    if main:
        state |= {
            name: t.detach().cpu().clone()
            for name, t in module.named_buffers()
            if name in module.state_dict()
        }
    return state


def export_model(
    folder: Path,
    model: Any,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    settings: InferenceSettings,
) -> None:
    """Write weights (safetensors), configuration (with the settings of inference), tokenizer and
    model card into a new folder.

    Raises:
        OSError: if they cannot be written.
    """
    setattr(model.config, KEY, settings.model_dump(mode="json"))
    with rust_errors(folder):
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
    card_file = folder / "README.md"
    card_file.write_text(card, encoding="utf-8")
    mode = card_file.stat().st_mode & 0o777  # as the umask has it
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)  # safetensors writes files that only their owner can read


def publish_model(exported: Path, folder: Path, fence: Fence = lambda: None) -> None:
    """Let `folder` be the exported model of a checkpoint: the same files, not copies, where the
    file system has links. `fence`, asked before what is there is removed or renamed, raises if it
    is no longer ours.

    Raises:
        StorageError: if it cannot be made; what stood there before is untouched.
    """
    # Names of its own: what a start that was succeeded still copies lands in none of its heir's.
    mark = f".{folder.name}.{secrets.token_hex(4)}"
    aside, old = folder.with_name(f"{mark}.new"), folder.with_name(f"{mark}.old")
    with storage_errors(folder):
        fence()
        for leftover in folder.parent.glob(f".{folder.name}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            shutil.copytree(exported, aside, copy_function=_link)
            fence()
            if is_there(folder):
                folder.rename(old)
            try:
                aside.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
        finally:
            for leftover in (aside, old):
                shutil.rmtree(leftover, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        with storage_errors(Path(target)):  # else it would be one of a list of failures
            shutil.copy2(source, target)
