"""Writing `model/`; what is in it is tested in test_train and test_predict."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from runner.errors import StorageError
from runner.export.save import export_model, publish_model
from runner.job.inference import KEY


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Exception("No space left on device (os error 28)"), "No space left on device"),
        (SafetensorError("Error while serializing: I/O error (os error 5)"), "Input/output error"),
        (SafetensorError("no number"), "Input/output error"),
    ],
)
def test_a_library_that_finds_no_room_is_an_oserror_of_the_folder(tmp_path, error, expected):
    """tokenizers and safetensors raise kinds of their own, which no caller would know."""

    def fail(*_: object, **__: object) -> None:
        raise error

    model = SimpleNamespace(config=SimpleNamespace(), save_pretrained=lambda *_, **__: None)
    answering = SimpleNamespace(model_dump=lambda **_: {})
    with pytest.raises(OSError, match=expected) as caught:
        export_model(tmp_path, model, {}, SimpleNamespace(save_pretrained=fail), "", answering)
    assert caught.value.filename == str(tmp_path)
    assert hasattr(model.config, KEY)


def test_a_mistake_stays_one(tmp_path):
    def fail(*_: object) -> None:
        raise KeyError("os error")

    model = SimpleNamespace(config=SimpleNamespace(), save_pretrained=lambda *_, **__: None)
    answering = SimpleNamespace(model_dump=lambda **_: {})
    with pytest.raises(KeyError):
        export_model(tmp_path, model, {}, SimpleNamespace(save_pretrained=fail), "", answering)


@pytest.mark.parametrize("number", [1, 2])
def test_a_model_that_cannot_be_published_leaves_the_one_before(tmp_path, monkeypatch, number):
    """Whichever rename fails; the next call succeeds whatever it left behind."""
    exported, folder, calls = tmp_path / "exported", tmp_path / "model", []
    for place, text in ((exported, "new"), (folder, "old")):
        place.mkdir()
        (place / "model.safetensors").write_text(text)
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        calls.append(path.name)
        if len(calls) == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(StorageError, match="Input/output error"):
            publish_model(exported, folder)
    assert (folder / "model.safetensors").read_text() == "old"
    publish_model(exported, folder)
    assert (folder / "model.safetensors").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "model"]


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_who_may_read_a_model_is_what_the_umask_says(tmp_path, umask, mode):
    def save_pretrained(folder: Path, **_: object) -> None:
        save_file({"w": np.zeros(2)}, folder / "model.safetensors")

    model = SimpleNamespace(config=SimpleNamespace(), save_pretrained=save_pretrained)
    tokenizer = SimpleNamespace(save_pretrained=lambda _: None)
    answering = SimpleNamespace(model_dump=lambda **_: {})
    before = os.umask(umask)
    try:
        export_model(tmp_path, model, {}, tokenizer, "a card", answering)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"model.safetensors": mode, "README.md": mode}
