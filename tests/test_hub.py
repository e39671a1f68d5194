"""What a job needs of the hub, whether it is cached, and a hub that does not answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner import hub
from runner.hub import hub_assets, not_cached, offline_if_unreachable
from runner.job import Job

ROOT = Path(__file__).parents[1]


def job(train="o/d:train[:10]", validation="o/d:validation", model="o/m", **parts) -> Job:
    return Job.model_validate(
        {
            "name": "n",
            "data": {"train": train, "validation": validation},
            "model": {"name": model, **parts},
            "train": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-4},
        }
    )


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in list(os.environ):
        if name.startswith("HF_") or name.lower().endswith("_proxy") or "OFFLINE" in name:
            monkeypatch.delenv(name)


def test_what_is_needed():
    assert [(a.kind, a.name, a.fetch) for a in hub_assets(job(revision="main"))] == [
        ("models", "o/m", "hf download o/m --revision main"),
        ("datasets", "o/d", "python -c \"import datasets; datasets.load_dataset('o/d')\""),
    ]
    assert hub_assets(job("/d.json", "/d.json[:5]", "/models/m")) == []
    assert hub_assets(job("/d.json", "/d.json", "package:p/m")) == []
    [asset] = hub_assets(job("o/d@v1#en:train", "/d.json", "/m"))
    assert "load_dataset('o/d', 'en', revision='v1')" in asset.fetch


def test_what_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert [asset.name for asset in not_cached(job(), {})] == ["o/m", "o/d"]
    (tmp_path / "hub/models--o--m/snapshots/abc").mkdir(parents=True)
    (tmp_path / "hub/datasets--o--d/snapshots").mkdir(parents=True)
    assert [asset.name for asset in not_cached(job(), {})] == ["o/d"]
    # The run's own settings count, not those of the machine that submits.
    assert len(not_cached(job(), {"HF_HOME": "/nowhere"})) == 2
    assert len(not_cached(job(), {"HF_HUB_CACHE": str(tmp_path / "hub")})) == 1


@pytest.fixture
def door():
    """A port that answers, and one where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield server.getsockname()[1], taken.getsockname()[1]


def test_a_hub_that_answers(door, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{door[0]}")
    assert offline_if_unreachable(job()) is False
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_hub_that_does_not(door, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "x")  # so that the test's own setting is undone
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{door[1]}")
    assert offline_if_unreachable(job()) is True
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert offline_if_unreachable(job()) is False  # told already


def test_a_job_of_files_asks_nobody(monkeypatch):
    monkeypatch.setattr(hub, "_answers", lambda *_: pytest.fail("asked"))
    assert offline_if_unreachable(job("/d.json", "/d.json", "/m")) is False


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_who_is_told_asks_nobody(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(hub, "_answers", lambda *_: pytest.fail("asked"))
    assert offline_if_unreachable(job()) is False


def test_the_proxy_is_the_door(door, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://nowhere.invalid")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{door[0]}")
    assert offline_if_unreachable(job()) is False
    monkeypatch.setenv("no_proxy", "nowhere.invalid")
    assert hub._door() == ("nowhere.invalid", 443)


def test_a_black_hole_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.1)

    def hang(*_):
        time.sleep(30)

    monkeypatch.setattr(socket, "create_connection", hang)
    assert hub._answers("10.0.0.1", 443) is False


@pytest.mark.parametrize("part", ["model", "data"])
def test_a_run_without_its_assets_ends_with_69_and_says_how_to_fetch_them(
    part, door, tmp_path, tiny
):
    names = {"model": "o/m", "data": f"{ROOT}/jobs/data/product_qa_train.json"}
    if part == "data":
        names = {"model": str(tiny("bert")), "data": "o/d:train"}
    path = tmp_path / "job.toml"
    path.write_text(
        f'name = "n"\n[data]\ntrain = "{names["data"]}"\nvalidation = "{names["data"]}"\n'
        f'[model]\nname = "{names["model"]}"\n'
        "[train]\nepochs = 1\nbatch_size = 8\nlearning_rate = 1e-4\n"
    )
    # Not told to be offline: the hub itself does not answer.
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{door[1]}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "runner", "rank", path, "--run-dir", tmp_path / "run"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 69, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert names[part].split(":")[0] in last
    assert ("hf download o/m" if part == "model" else "datasets.load_dataset('o/d')") in last
    assert "Traceback" not in done.stderr
