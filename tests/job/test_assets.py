"""What a job needs of the hub, whether it is cached, and a hub that does not answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runner.errors import AssetError
from runner.job import assets
from runner.job.assets import check_assets, hub_assets, not_cached
from runner.job.load import dump_job
from runner.job.schema import Job

ROOT = Path(__file__).parents[2]
# Of a model only what is loaded, not the weights of four frameworks.
SAFETENSORS = (
    "--include '*.json' --include '*.txt' --include '*.model' --include '*.safetensors'"
    " --exclude '*/*'"
)


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
        ("model", "o/m", f"hf download o/m --revision main {SAFETENSORS}"),
        ("dataset", "o/d", "hf download o/d --repo-type dataset"),
    ]
    assert hub_assets(job("/d.json", "/d.json[:5]", "/models/m")) == []
    assert hub_assets(job("/d.json", "/d.json", "package:p/m")) == []
    [asset] = hub_assets(job("o/d@v1#en:train", "/d.json", "/m"))
    assert asset.fetch == "hf download o/d --repo-type dataset --revision v1"


def test_what_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert [asset.name for asset in not_cached(job(), {})] == ["o/m", "o/d"]
    folder = tmp_path / "hub/models--o--m/snapshots/abc"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    (tmp_path / "hub/datasets--o--d/snapshots").mkdir(parents=True)
    assert [asset.name for asset in not_cached(job(), {})] == ["o/d"]
    # The run's own settings count, not those of the machine that submits.
    assert len(not_cached(job(), {"HF_HOME": "/nowhere"})) == 2
    assert len(not_cached(job(), {"HF_HUB_CACHE": str(tmp_path / "hub")})) == 1


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_model_is_cached_with_its_weights(tmp_path, monkeypatch, weights):
    """A repository that turned out to have no safetensors is fetched with what it has."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = tmp_path / "hub/models--o--m/snapshots/abc"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    (folder / "pytorch_model.generator.bin").touch()
    [model, _] = not_cached(job(), {})
    pickles = "--include pytorch_model.bin --include 'pytorch_model-*.bin'"
    wanted = SAFETENSORS.replace("--include '*.safetensors'", pickles)
    assert model.fetch == f"hf download o/m {wanted}"
    (folder / weights).touch()
    assert [asset.name for asset in not_cached(job(), {})] == ["o/d"]


@pytest.fixture
def door():
    """A port that answers, and one where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield server.getsockname()[1], taken.getsockname()[1]


def test_a_hub_that_answers(door, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{door[0]}")
    check_assets(job())
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.fixture
def no_hub(door, monkeypatch, tmp_path):
    """A hub that cannot be reached, and an empty cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # so that what is told is taken back
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{door[1]}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path


def test_all_that_is_missing_is_named(no_hub):
    with pytest.raises(AssetError) as caught:
        check_assets(job())
    assert str(caught.value) == (
        "not in the cache, and 127.0.0.1 cannot be reached: o/m and o/d; on a machine with network"
        f" run: hf download o/m {SAFETENSORS} && hf download o/d --repo-type dataset"
    )
    assert caught.value.exit_code == 69


def test_what_is_cached_is_used_without_asking_again(no_hub):
    for name in ("models--o--m/snapshots/abc", "datasets--o--d/snapshots/abc"):
        (no_hub / "hub" / name).mkdir(parents=True)
    (no_hub / "hub/models--o--m/snapshots/abc/model.safetensors").touch()
    check_assets(job())
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_job_of_files_asks_nobody(monkeypatch):
    monkeypatch.setattr(assets, "_answers", lambda *_: pytest.fail("asked"))
    check_assets(job("/d.json", "/d.json", "/m"))


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_who_is_told_to_be_offline_asks_nobody(no_hub, monkeypatch, name):
    monkeypatch.setattr(assets, "_answers", lambda *_: pytest.fail("asked"))
    monkeypatch.setenv(name, "true")
    with pytest.raises(AssetError, match=f"{name} is set: o/m and o/d"):
        check_assets(job())


def test_the_proxy_is_the_door(door, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://nowhere.invalid")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{door[0]}")
    check_assets(job())
    monkeypatch.setenv("no_proxy", "nowhere.invalid")
    assert assets._hub_address() == ("nowhere.invalid", 443)


def test_a_black_hole_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(assets, "HUB_ANSWER_S", -0.9)  # a second more is waited
    over, waited_for = threading.Event(), []

    def hang(*_):
        waited_for.append(not over.wait(10))
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hang)
    assert assets._answers("10.0.0.1", 443) is False
    over.set()
    assert waited_for != [True]


@pytest.mark.parametrize("verb", ["rank", "check"])
def test_a_job_without_its_assets_ends_at_once(no_hub, tmp_path, verb):
    path = tmp_path / "job.toml"
    path.write_text(dump_job(job()))
    options = ["--data"] if verb == "check" else ["--run-dir", tmp_path / "run"]
    script = (
        "import sys\nfrom runner.cli import main, run\n"
        "run._exit = lambda code: code\ncode = main(sys.argv[1:])\n"
        "sys.exit(code if 'torch' not in sys.modules else 'torch was imported')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, verb, path, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 69, done.stderr
    assert done.stderr.startswith("not in the cache, and 127.0.0.1 cannot be reached: o/m and o/d;")
    assert done.stderr.count("\n") == 1
