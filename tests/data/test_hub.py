"""Hub models and data sets: fetched from a hub-shaped server on loopback, then without any."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

from runner.data.hub import Snapshot
from runner.errors import StorageError
from runner.job.schema import Columns
from runner.job.sources import parse_data
from tests.forked import command

CHECKOUT = Path(__file__).resolve().parents[2]
MODEL, DATA = "tiny-owner/tiny-bert", "tiny-owner/product-qa"
CARD = """---
configs:
- config_name: plain_text
  data_files:
  - split: train
    path: plain_text/train-*
  - split: validation
    path: plain_text/validation-*
dataset_info:
  config_name: plain_text
  splits:
  - name: train
    num_examples: {train}
  - name: validation
    num_examples: {validation}
---
# Questions about products
"""
JOB = """
name = "from-the-hub"
[data]
train = "{data}@{data_commit}:train[:16]"
validation = "{data}@{data_commit}:validation[:8]"
max_length = 128
stride = 32
[model]
name = "{model}"
revision = "{model_commit}"
[train]
epochs = 1
batch_size = 8
learning_rate = 1e-3
"""


class Hub:
    """What the hub's HTTP interface says of a few repositories. `commits[kind, name]` maps a commit
    to its files, the last one being the branch main."""

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                status, headers, body = hub.answer(unquote(urlsplit(self.path).path))
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def push(self, kind: str, name: str, files: dict[str, bytes]) -> str:
        """Add a commit on main; returns its hash."""
        commits = self.commits.setdefault((kind, name), {})
        text = repr([len(commits), kind, name, sorted(files)])
        commit = hashlib.sha1(text.encode()).hexdigest()
        commits[commit] = files
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        found = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?/?", path)
        if found:
            kind, name, what, revision = found.groups()
        else:
            found = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if not found:
                return 404, {}, b"{}"
            data, name, revision, what = found.groups()
            kind = "dataset" if data else "model"
        commits = self.commits.get((kind, name))
        if commits is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "not found"}'
        commit = [*commits][-1] if revision in (None, "main") else revision
        files = commits.get(commit)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b'{"error": "not found"}'
        headers = {"X-Repo-Commit": commit, "Content-Type": "application/json"}
        if path.startswith("/api/") and what == "tree":
            tree = [
                {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for p, b in files.items()
            ]
            return 200, headers, json.dumps(tree).encode()
        if path.startswith("/api/"):
            siblings = [{"rfilename": p} for p in files]
            about = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
            return 200, headers, json.dumps(about).encode()
        if what not in files:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        body = files[what]
        return 200, {**headers, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}, body

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    """For a process that finds this hub and an empty cache."""
    unset = {"HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN"}
    mine = {key: value for key, value in os.environ.items() if key not in unset}
    return mine | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "huggingface"),
        "SPANTUNE_CACHE": str(tmp_path / "spantune"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def model_files(tiny) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in tiny("bert").iterdir()}
    # What no run needs: the oldest repositories hold them all.
    return files | {"README.md": b"# tiny", "tf_model.h5": b"tf", "onnx/config.json": b"{}"}


@pytest.fixture
def data_files() -> dict[str, bytes]:
    """The questions of jobs/data as the hub's squad has them: a card with a configuration, one
    Parquet file a split."""
    import io

    import pyarrow
    import pyarrow.parquet

    files, counts = {}, {}
    for split in ("train", "validation"):
        source = CHECKOUT / "jobs" / "data" / f"product_qa_{split}.json"
        rows = [
            {
                "id": qa["id"],
                "title": article["title"],
                "context": paragraph["context"],
                "question": qa["question"],
                "answers": {
                    "text": [answer["text"] for answer in qa["answers"]],
                    "answer_start": [answer["answer_start"] for answer in qa["answers"]],
                },
            }
            for article in json.loads(source.read_text(encoding="utf-8"))["data"]
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
        counts[split] = len(rows)
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        files[f"plain_text/{split}-00000-of-00001.parquet"] = file.getvalue()
    return files | {"README.md": CARD.format(**counts).encode()}


ASK = """
import json, sys
from runner.data import hub
from runner.errors import AssetError
questions, patience = json.loads(sys.argv[1])
hub.HUB_TIMEOUT_S = patience
for question in questions:
    try:
        found = hub.snapshot(*question)
        print(found.commit, *sorted(path.name for path in found.folder.rglob("*")))
    except AssetError as error:
        print("AssetError:", error)
"""


def ask(
    environment: dict[str, str],
    *questions: tuple[str, str, str | None],
    patience: float = 10,
    **more: str,
) -> list[str]:
    """Ask for snapshots (kind, name, revision) in a process of their own; returns the commit and
    the names of the files of each, or the error's sentence."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps([questions, patience])],
        cwd=CHECKOUT,
        env={**environment, **more},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = done.stdout.splitlines()
    assert len(answers) == len(questions)
    return answers


def model(revision: str | None = None) -> tuple[str, str, str | None]:
    return "model", MODEL, revision


def data(revision: str | None = None) -> tuple[str, str, str | None]:
    return "dataset", DATA, revision


def test_a_model_is_fetched_once_without_what_no_run_needs(hub, environment, model_files):
    old = hub.push("model", MODEL, model_files | {"config.json": b"{}"})
    commit = hub.push("model", MODEL, model_files)
    needed = sorted(set(model_files) - {"README.md", "tf_model.h5", "onnx/config.json"})
    newest, earlier = " ".join([commit, *needed]), " ".join([old, *needed])
    assert ask(environment, model(), model("main"), model(old)) == [newest, newest, earlier]
    # A commit in the cache needs no hub, not even a look at it.
    hub.requests.clear()
    assert ask(environment, model(commit)) == [newest]
    assert hub.requests == []
    assert ask(environment, model()) == [newest]
    assert hub.requests


def test_of_a_data_set_every_file_that_can_be_read_is_fetched(hub, environment):
    names = ("a.json", "a.json.gz", "b.jsonl", "b.jsonl.gz", "c.csv", "c.csv.gz", "d.parquet")
    names += ("e.tsv", "e.tsv.gz", "README.md")
    left = ("paper.pdf", "raw/all.zip", "model.safetensors", "x.py", "weights.bin.gz")
    commit = hub.push("dataset", DATA, dict.fromkeys((*names, *left), b"{}"))
    assert ask(environment, data()) == [" ".join([commit, *sorted(names)])]


def test_a_branch_that_moved_is_fetched_anew_and_a_commit_stays(hub, environment, data_files):
    first = hub.push("dataset", DATA, data_files)
    (found,) = ask(environment, data())
    assert found.startswith(first)
    second = hub.push("dataset", DATA, data_files | {"README.md": b"# other"})
    moved, stayed = ask(environment, data(), data(first))
    assert moved.startswith(second)
    assert stayed.startswith(first)


@pytest.mark.parametrize("network", ["offline", "refused", "silent", "broken"])
def test_the_cache_is_used_where_the_hub_gives_nothing(hub, environment, data_files, network):
    """And never another revision than the pinned one, as `datasets` would."""
    first = hub.push("dataset", DATA, data_files)
    second = hub.push("dataset", DATA, data_files | {"README.md": b"# other"})
    assert ask(environment, data("main"))[0].startswith(second)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        more = {
            "offline": {"HF_HUB_OFFLINE": "1"},
            "refused": {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "silent": {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"},
            "broken": {"HF_ENDPOINT": f"{hub.url}/elsewhere"},
        }[network]
        questions = [data(revision) for revision in (None, "main", second, first)]
        *found, told = ask(environment, *questions, patience=0.5, **more)
    assert {text.split()[0] for text in found} == {second}
    assert told.startswith(f"AssetError: {DATA}: ")
    if network != "broken":  # a hub that answers says that there is no such data set
        assert told.endswith(f"hf download {DATA} --repo-type dataset --revision {first}")
        why = {"offline": "HF_HUB_OFFLINE keeps", "refused": "refused", "silent": "timed out"}
        assert why[network] in told


def test_what_the_hub_does_not_have(hub, environment, model_files):
    hub.push("model", MODEL, model_files)
    revision, name = ask(environment, model("v9"), ("model", "nobody/nothing", None))
    assert revision == f"AssetError: {MODEL}: the hub has no revision v9 of this model"
    assert name.startswith(
        "AssetError: nobody/nothing: the hub has no model of this name, or it is"
    )
    assert name.endswith("run: hf auth login")


def test_pickled_weights_are_fetched_where_there_are_no_others(
    hub, environment, model_files, tmp_path
):
    """Never both, which would be twice the download; nor what is called alike."""
    pickles = {
        "pytorch_model.bin": b"weights",
        "pytorch_model.generator.bin": b"of another model",
        "training_args.bin": b"settings",
    }
    both = hub.push("model", MODEL, model_files | pickles)
    safe = {n: b for n, b in model_files.items() if n != "model.safetensors"}
    alone = hub.push("model", MODEL, safe | pickles | {"onnx/model.safetensors": b"?"})
    shards = {f"pytorch_model-0000{n}-of-00002.bin": b"weights" for n in (1, 2)}
    index = {"pytorch_model.bin.index.json": b"{}"}
    cut = hub.push("model", MODEL, safe | shards | index)
    found = [text.split() for text in ask(environment, model(both), model(alone), model(cut))]
    weights = [{n for n in names if n.endswith((".bin", ".safetensors"))} for names in found]
    assert weights == [{"model.safetensors"}, {"pytorch_model.bin"}, {*shards}]
    assert "pytorch_model.bin.index.json" in found[2]
    # What is cached needs no hub; what is missing of it is named, with the command that brings it.
    hub.requests.clear()
    assert [text.split() for text in ask(environment, model(alone), model(cut))] == found[1:]
    assert hub.requests == []
    for file in (tmp_path / "huggingface").rglob("pytorch_model*.bin"):
        file.unlink()
    (told,) = ask(environment, model(alone), HF_HUB_OFFLINE="1")
    assert "1 file(s) are missing (pytorch_model.bin) from the local cache" in told
    assert "--include pytorch_model.bin --include 'pytorch_model-*.bin' --exclude" in told
    assert "safetensors" not in told


def test_a_download_that_was_cut_short_is_no_snapshot(hub, environment, model_files, tmp_path):
    commit = hub.push("model", MODEL, model_files)
    ask(environment, model(commit))
    (weights,) = (tmp_path / "huggingface").rglob("model.safetensors")
    weights.unlink()
    (told,) = ask(environment, model(commit), HF_HUB_OFFLINE="1")
    assert "1 file(s) are missing (model.safetensors) from the local cache" in told
    assert "hf download" in told
    assert "model.safetensors" in ask(environment, model(commit))[0]  # the rest is fetched


def push_both(hub: Hub, owner: str, model_files: dict, data_files: dict) -> tuple[str, str, str]:
    """The text of a job with a model and a data set of an owner, and the names of the two."""
    model, data = f"{owner}/tiny-bert", f"{owner}/product-qa"
    data_commit = hub.push("dataset", data, data_files)
    model_commit = hub.push("model", model, model_files)
    # Both have moved on since the job was written.
    hub.push("dataset", data, {"README.md": b"# empty"})
    hub.push("model", model, {"config.json": b"{}"})
    text = JOB.format(data=data, data_commit=data_commit, model=model, model_commit=model_commit)
    return text, model, data


@pytest.fixture
def login_node(environment) -> dict[str, str]:
    """For a process that finds this hub, and fills the cache of the zygote, which has none."""
    return environment | {"HF_HOME": os.environ["HF_HOME"]}


def test_check_on_the_login_node_brings_all_that_the_run_needs(
    hub, login_node, zygote, model_files, data_files, tmp_path, tiny
):
    """The run is one without network, as HF_HUB_OFFLINE makes it."""
    job = tmp_path / "job.toml"
    text, model, _ = push_both(hub, "checked", model_files, data_files)
    job.write_text(text)
    checked = subprocess.run(
        [sys.executable, CHECKOUT / "runner" / "main.py", "check", "--data", job],
        env=login_node,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr[-3000:]
    assert re.search(r"train +16 ", checked.stdout)
    hub.close()
    codes, said = zygote.run(job, "--run-dir", tmp_path / "run")
    assert codes == [0], said
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    pinned = re.findall("[0-9a-f]{40}", text)
    weights = (tiny("bert") / "model.safetensors").read_bytes()
    assert record["model"]["name"] == model
    assert record["model"]["revision"] == pinned[2]
    assert record["model"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert {part["revision"] for part in record["data"].values()} == {pinned[0]}
    exported = (tmp_path / "run" / "model").iterdir()
    written = "".join(p.read_text() for p in exported if p.suffix in (".json", ".md"))
    assert f"base_model: {model}" in written
    assert os.environ["HF_HOME"] not in written  # the cache's folder stays here
    assert str(tmp_path) not in written


def test_what_is_missing_offline_ends_the_run_with_the_commands_that_fetch_it(
    hub, login_node, zygote, model_files, data_files, tmp_path
):
    """And the commands, followed to the letter, are enough."""
    job = tmp_path / "job.toml"
    text, *assets = push_both(hub, "missing", model_files, data_files)
    job.write_text(text)
    codes, said = zygote.run(job, "--runs", tmp_path / "runs")
    assert codes == [69], said
    assert " and ".join(assets) in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    hf = Path(sys.executable).with_name("hf")
    assert hf.is_file()
    commands = said.partition("on a machine with network run: ")[2].strip().split(" && ")
    for asset, words in zip(assets, map(shlex.split, commands), strict=True):
        assert words[:3] == ["hf", "download", asset]
        fetched = subprocess.run(
            [str(hf), *words[1:]],
            env=login_node,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert fetched.returncode == 0, fetched.stderr[-2000:]
    code, said = command(zygote, "check", "--data", job)
    assert code == 0, said


def test_a_full_cache_is_no_silent_hub(monkeypatch):
    from runner.data import hub

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hub, "_cached", lambda *_: (None, None))
    about = SimpleNamespace(siblings=())
    monkeypatch.setattr(hub.HfApi, "repo_info", lambda *_, **__: about)
    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(StorageError, match=rf"^{re.escape(hub.HF_HUB_CACHE)}: No space left on"):
        hub.snapshot.__wrapped__("model", MODEL, None)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_full_cache_is_no_unreadable_data_set(monkeypatch, tmp_path, wrapped):
    import datasets

    from runner.data.formats import hub_split

    def full(*_, **__):
        if not wrapped:  # what it says after a look at the disk
            raise OSError("Not enough disk space. Needed: 8 GB")
        try:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(hub_split, "snapshot", lambda *_: Snapshot(tmp_path, "0"))
    monkeypatch.setattr(datasets, "load_dataset", full)
    words = os.strerror(errno.EDQUOT) if wrapped else "Not enough disk space. Needed: 8 GB"
    with pytest.raises(StorageError) as caught:
        hub_split.hub_rows(parse_data(f"{DATA}:train"), Columns())
    assert str(caught.value).startswith(f"{datasets.config.HF_DATASETS_CACHE}: {words}")
