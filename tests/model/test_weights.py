"""Weights that were published as pickles: which are read, as what, and what never runs."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.errors import DataError, StorageError
from runner.job.schema import Model
from runner.model.load import (
    ModelFiles,
    check_forward,
    load_finetuned,
    load_outline,
    load_pretrained,
    load_tokenizer,
)
from runner.model.load.weights import readable_weights
from runner.run.folder import RunDir
from tests.forked import command
from tests.hollow import save_hollow
from tests.interruptions import DATA, FAULT_JOB, outcome

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """spantune's cache folder of a test."""
    monkeypatch.setenv("SPANTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def pickled(tiny, tmp_path):
    """`pickled()`: a tiny BERT's folder without weights, and its weights; `pickled(write)` has
    `write(folder, weights)` put them there."""

    def make(write=None):
        folder = tmp_path / "bert"
        shutil.copytree(tiny("bert"), folder)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if write:
            write(folder, weights)
        return folder, weights

    return make


def files_of(folder, **section):
    return ModelFiles.locate(Model(name=str(folder), **section))


def save(name="pytorch_model.bin", change=lambda weights: weights, **options):
    """Writes the weights as torch.save does, changed."""

    def write(folder, weights):
        torch.save(change(weights), folder / name, **options)

    return write


def shards(folder, weights):
    names = sorted(weights)
    places = {name: f"pytorch_model-0000{1 + n % 2}-of-00002.bin" for n, name in enumerate(names)}
    for place in set(places.values()):
        torch.save({n: weights[n] for n in names if places[n] == place}, folder / place)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def tied(weights):
    """Two names of one tensor, as heads of language models have, and two halves of another."""
    both = torch.cat([weights["qa_outputs.weight"].reshape(-1), torch.zeros(64)])
    word = weights["bert.embeddings.word_embeddings.weight"]
    return weights | {
        "qa_outputs.weight": both[:64].reshape(2, 32),
        "other.half": both[64:],
        "cls.predictions.decoder.weight": word,
    }


def transposed(weights):
    return {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in weights.items()}


def of_a_gpu(folder, weights):
    """As a GPU's tensors are noted in a pickle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        torch.save(weights, folder / "pytorch_model.bin")


FORMS = {
    "of a GPU": of_a_gpu,
    "zip": save(),
    "before torch 1.6": save(_use_new_zipfile_serialization=False),
    "shards with an index": shards,
    "parameters": save(change=lambda w: {n: torch.nn.Parameter(t) for n, t in w.items()}),
    "state_dict in a table": save(change=lambda w: {"epoch": 3, "state_dict": w}),
    "model in a table": save(change=lambda w: {"model": w, "step": 5}),
    "both": save(change=lambda w: {"state_dict": {"model": w}}),
    "names of DistributedDataParallel": save(
        change=lambda w: {f"module.{n}": t for n, t in w.items()}
    ),
    "names of torch.compile": save(
        change=lambda w: {f"_orig_mod.module.{n}": t for n, t in w.items()}
    ),
    "shared memory": save(change=tied),
    "shared memory before torch 1.6": save(change=tied, _use_new_zipfile_serialization=False),
    "other strides": save(change=transposed),
}


@pytest.mark.parametrize("form", FORMS)
def test_pickled_weights_are_the_same_weights(pickled, form, cache):
    folder, weights = pickled(FORMS[form])
    model = load_pretrained(files_of(folder), 0)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    (kept,) = cache.iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["SHA256SUMS", "model.safetensors"]
    assert load_file(kept / "model.safetensors").keys() >= weights.keys()
    # What is looked at before, and what answers questions, are the same too.
    outline = load_outline(files_of(folder))
    assert {n: t.shape for n, t in outline.state_dict().items()} == {
        n: t.shape for n, t in weights.items()
    }
    answering = load_finetuned(files_of(folder), CPU, "x")
    assert all(torch.equal(answering.state_dict()[name], weights[name]) for name in weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pickled_weights_keep_their_precision_in_the_cache(pickled, dtype, cache):
    change = lambda weights: {n: t.to(dtype) for n, t in weights.items()}  # noqa: E731
    folder, weights = pickled(save(change=change))
    model = load_pretrained(files_of(folder), 0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(t.equal(weights[n].to(dtype).float()) for n, t in model.state_dict().items())
    (kept,) = cache.glob("*/model.safetensors")
    assert {t.dtype for t in load_file(kept).values()} == {dtype}


def test_the_names_of_the_first_checkpoints_are_known(pickled):
    """As BERT's were published: norms with gamma and beta, and the head of its pretraining."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def change(weights):
        table = {"cls.seq_relationship.bias": torch.zeros(2)}
        for name, tensor in weights.items():
            for new, then in old.items():
                name = name.replace(new, then)
            table |= {} if name.startswith("qa_outputs") else {name: tensor}
        return table

    folder, weights = pickled(save(change=change))
    assert load_outline(files_of(folder)).num_parameters() > 0
    found = load_pretrained(files_of(folder), 0).state_dict()
    body = {name for name in weights if not name.startswith("qa_outputs")}
    assert all(torch.equal(found[name], weights[name]) for name in body)


def test_safetensors_come_first_and_the_pickle_beside_them_is_never_opened(tiny, tmp_path, cache):
    folder = tmp_path / "both"
    shutil.copytree(tiny("bert"), folder)
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    files = files_of(folder)
    load_pretrained(files, 0)
    load_outline(files)
    weights = folder / "model.safetensors"
    assert files.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert files.notes == []
    assert not cache.exists()
    # Of an adapter's safetensors beside pickled weights no model can be made.
    weights.rename(folder / "adapter_model.safetensors")
    with pytest.raises(DataError, match=r"pytorch_model\.bin: cannot be read as pickled weights"):
        load_pretrained(files_of(folder), 0)


def test_the_hash_is_that_of_the_file_that_was_published(pickled):
    folder, _ = pickled(save())
    found = hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()
    files = files_of(folder, sha256=found)
    load_pretrained(files, 0)
    assert files.weights_sha256 == found
    assert files.weights.converted_from == {"pytorch_model.bin": found}
    # Another file is refused before it is opened.
    (folder / "pytorch_model.bin").write_bytes(b"another")
    told = r"pytorch_model.bin: sha256 is \w+, the job declares "
    with pytest.raises(DataError, match=told):
        load_pretrained(files_of(folder, sha256=found), 0)


def test_shards_have_no_hash_to_declare(pickled):
    folder, _ = pickled(shards)
    assert files_of(folder).weights_sha256 is None
    with pytest.raises(DataError, match=r"there are 2 files \*\.bin to hash, not one"):
        load_pretrained(files_of(folder, sha256="0" * 64), 0)
    assert len(files_of(folder).weights.converted_from) == 2


# ---- the cache


def test_they_are_read_once(pickled, cache, monkeypatch):
    folder, weights = pickled(save())
    first = files_of(folder).weights
    assert first.now
    assert first.notes() == [
        f"weights: pytorch_model.bin converted into safetensors, kept in {first.folder}"
    ]
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled again"))
    second = files_of(folder).weights
    assert (second.now, second.folder) == (False, first.folder)
    assert second.notes() == [
        f"weights: pytorch_model.bin read as safetensors, kept in {first.folder}"
    ]
    model = load_pretrained(files_of(folder), 0)
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert [path.stat().st_mode & 0o777 for path in cache.iterdir()] == [0o700]


def spoil(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        spoil,
        lambda file: file.write_bytes(file.read_bytes()[:-10]),
        Path.unlink,
        lambda file: file.with_name("SHA256SUMS").unlink(),
        lambda file: file.with_name("SHA256SUMS").write_bytes(b"\xff"),
    ],
    ids=["a bit", "cut", "gone", "no sums", "no text"],
)
def test_what_was_damaged_in_the_cache_is_made_anew(pickled, cache, damage):
    folder, weights = pickled(save())
    (kept,) = [files_of(folder).weights.folder]
    damage(kept / "model.safetensors")
    files = files_of(folder)
    model = load_pretrained(files, 0)
    assert files.weights.now
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert list(cache.iterdir()) == [kept]


def test_another_file_of_the_same_name_is_another_model(pickled, cache):
    folder, weights = pickled(save())
    load_pretrained(files_of(folder), 0)
    other = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save(other, folder / "pytorch_model.bin")
    model = load_pretrained(files_of(folder), 0)
    assert all(torch.equal(model.state_dict()[name], other[name]) for name in other)
    assert len(list(cache.iterdir())) == 2


def test_a_place_that_cannot_be_written_is_named(pickled, tmp_path, monkeypatch):
    folder, _ = pickled(save())
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPANTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"file/weights.*; SPANTUNE_CACHE names another$"):
        readable_weights(folder)


# A file may have 8 kB: what is written beyond that fails, as on a full disk.
NO_ROOM = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import runner.model.load.weights as weights
store = weights._store
def limited(*arguments):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        store(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
weights._store = limited
"""


@pytest.fixture
def job(tmp_path):
    """`job(folder)`: the file of a small job on the model in a folder."""

    def write(folder):
        path = tmp_path / f"{folder.parent.name}-{folder.name}.toml"
        path.write_text(FAULT_JOB.format(data=DATA, model=folder))
        return path

    return write


def test_no_room_ends_the_run_with_the_place(zygote, job, pickled, tmp_path, cache):
    folder, _ = pickled(save())
    codes, said = zygote.run(
        job(folder), "--run-dir", tmp_path / "run", code=NO_ROOM, SPANTUNE_CACHE=str(cache.parent)
    )
    assert codes == [74], said
    assert re.search(rf"{cache}\S+: .*; SPANTUNE_CACHE names another", said)
    assert "Traceback" not in said
    assert list(cache.iterdir()) == []


def test_two_processes_convert_at_once(zygote, job, pickled, tmp_path, cache):
    """Each waits until the other has its tensors, and finds nothing in the cache."""
    folder, _ = pickled(save())
    meet = """
import os, time
import runner.model.load.weights as weights
from pathlib import Path
store = weights._store
def together(tensors, folder):
    Path({place!r}, str(os.getpid())).touch()
    while len(os.listdir({place!r})) < 2:
        time.sleep(0.01)
    store(tensors, folder)
weights._store = together
"""
    (tmp_path / "meet").mkdir()
    code = meet.format(place=str(tmp_path / "meet"))
    options = {"code": code, "SPANTUNE_CACHE": str(cache.parent)}
    started = [zygote.start(job(folder), "--run-dir", tmp_path / name, **options) for name in "ab"]
    assert [one.wait() for one in started] == [[0], [0]], started[0].text() + started[1].text()
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert len(list(cache.iterdir())) == 1


# ---- runs


def test_a_run_on_a_pickle_is_the_run_on_its_safetensors(
    zygote, job, pickled, tiny, tmp_path, cache
):
    folder, _ = pickled(save())
    variables = {"SPANTUNE_CACHE": str(cache.parent)}
    codes, said = zygote.run(job(folder), "--run-dir", tmp_path / "pickle", ranks=2, **variables)
    assert codes == [0, 0], said
    plain = ("--run-dir", tmp_path / "plain")
    codes, told = zygote.run(job(tiny("bert")), *plain, ranks=2, **variables)
    assert codes == [0, 0], told
    ours, theirs = RunDir(tmp_path / "pickle"), RunDir(tmp_path / "plain")
    assert load_file(ours.weights).keys() == load_file(theirs.weights).keys()
    assert ours.weights.read_bytes() == theirs.weights.read_bytes()
    log = ours.log.read_text()
    assert log.count(f"pytorch_model.bin converted into safetensors, kept in {cache}") == 1
    assert "pytorch_model.bin" not in theirs.log.read_text()
    record = json.loads(ours.provenance.read_text())["model"]
    sha256 = hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()
    assert record["sha256"] == sha256
    assert record["converted_from"] == {"pytorch_model.bin": sha256}
    assert not list(ours.path.rglob("*.bin"))


@pytest.mark.slow
def test_check_and_predict_read_a_pickle_as_its_safetensors(
    zygote, job, pickled, tiny, tmp_path, cache
):
    folder, _ = pickled(save())
    code, checked = command(zygote, "check", job(folder), "--data")
    assert code == 0, checked
    assert "pytorch_model.bin converted into safetensors" in checked
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny("bert"), tuned)
    torch.save(load_file(tuned / "model.safetensors"), tuned / "pytorch_model.bin")
    (tuned / "model.safetensors").unlink()
    asked = ("--question", "How long?", "--context", "It runs for nine hours.")
    answers = [command(zygote, "predict", place, *asked) for place in (tiny("bert"), tuned)]
    assert answers[0] == answers[1]
    assert answers[0][0] == 0


# ---- what is refused


class Canary:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def hostile(**options):
    def write(folder, weights):
        torch.save(
            weights | {"x": Canary(folder / "canary")}, folder / "pytorch_model.bin", **options
        )

    return write


def hostile_shard(folder, weights):
    shards(folder, weights)
    torch.save({"x": Canary(folder / "canary")}, folder / "pytorch_model-00002-of-00002.bin")


def hostile_inside(folder, weights):
    table = {"state_dict": weights, "optimizer": [{"state": Canary(folder / "canary")}]}
    torch.save(table, folder / "pytorch_model.bin")


def plain_pickle(folder, weights):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(folder / "canary")))


def in_a_zip(content, name="archive/data.pkl", compression=zipfile.ZIP_STORED):
    """A zip as torch writes it, whose pickle is `content(folder)`."""

    def write(folder, weights):
        torch.save(weights, folder / "good")
        with (
            zipfile.ZipFile(folder / "good") as good,
            zipfile.ZipFile(folder / "pytorch_model.bin", "w", compression) as bad,
        ):
            for entry in good.infolist():
                ours = entry.filename.endswith("data.pkl")
                bad.writestr(entry.filename, content(folder) if ours else good.read(entry))
        (folder / "good").unlink()

    return write


def shell(folder):
    return f"cposix\nsystem\n(S'mkdir {folder}/canary'\ntR.".encode()


def built_in(folder):
    return f'c__builtin__\neval\n(S\'__import__("os").mkdir("{folder}/canary")\'\ntR.'.encode()


HOSTILE = {
    "zip": (hostile(), "asks for posix.mkdir, which is no part of a tensor; a pickle can run"),
    "before torch 1.6": (hostile(_use_new_zipfile_serialization=False), "asks for posix.mkdir"),
    "a shard": (hostile_shard, "00002-of-00002.bin: asks for posix.mkdir"),
    "beside the weights": (hostile_inside, "asks for posix.mkdir"),
    "no file of torch": (plain_pickle, "asks for posix.mkdir|cannot be read as pickled weights: "),
    "a shell": (in_a_zip(shell), "asks for posix.system"),
    "eval": (in_a_zip(built_in), r"asks for (builtins\.|__builtin__\.)?eval"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_runs_nothing(pickled, case, cache, monkeypatch):
    # A variable by which torch.load is told to trust all files.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write, told = HOSTILE[case]
    folder, _ = pickled(write)
    for read in (
        lambda files: load_pretrained(files, 0),
        load_outline,
        lambda files: load_finetuned(files, CPU, "x"),
    ):
        with pytest.raises(DataError, match=told) as refused:
            read(files_of(folder))
        assert refused.value.exit_code == 65
        assert str(refused.value).startswith(str(folder))
        assert "\n" not in str(refused.value)
        assert "weights_only" not in str(refused.value)  # nobody is led to switch it off
        assert not (folder / "canary").exists()
    assert not cache.exists()


def itself(weights):
    table: dict = {}
    table["model"] = table
    return table


def bytes_of(content):
    return lambda folder, weights: (folder / "pytorch_model.bin").write_bytes(content)


def cut(folder, weights):
    save()(folder, weights)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])


def script(folder, weights):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "pytorch_model.bin"))


def without_a_shard(folder, weights):
    shards(folder, weights)
    (folder / "pytorch_model-00001-of-00002.bin").unlink()


def index_of(text):
    return lambda folder, weights: (folder / "pytorch_model.bin.index.json").write_text(text)


REFUSED = {
    "a list": (save(change=lambda w: [*w.values()]), "holds a list, not a table of tensors by th"),
    "one tensor": (save(change=lambda w: w["qa_outputs.bias"]), "not a table of tensors"),
    "nothing": (save(change=lambda w: {}), "holds a dict, not a table"),
    "itself": (save(change=itself), "'model' is a dict, not a dense tensor"),
    "a number": (save(change=lambda w: w | {"epoch": 3}), "'epoch' is an int, not a dense tensor"),
    "numbers for names": (save(change=lambda w: {3: torch.zeros(1)}), "bin: 3 is a sparse|3 is"),
    "sparse": (
        save(change=lambda w: w | {"s": torch.eye(3).to_sparse()}),
        "'s' is a sparse or quantised tensor, not a dense tensor",
    ),
    "drawn out": (
        save(change=lambda w: w | {"s": torch.zeros(1).expand(10**9)}),
        r"would take 4,000,\d+,\d+ bytes, its file\(s\) have",
    ),
    "empty": (bytes_of(b""), "cannot be read as pickled weights: "),
    "text": (
        bytes_of(b"version https://git-lfs.github.com/spec/v1\n"),
        "cannot be read as pickled",
    ),
    "cut": (cut, "cannot be read as pickled weights: "),
    "a program": (script, "cannot be read as pickled weights: .* TorchScript"),
    "compressed": (
        in_a_zip(lambda _: b"\0" * 2**20, compression=zipfile.ZIP_DEFLATED),
        "pickled weights: is compressed, as torch.save never does",
    ),
    "a shard missing": (
        without_a_shard,
        r"index.json: 1 of its 2 files are missing, such as pytorch_model-00001-of-00002.bin",
    ),
    "an index of nothing": (index_of('{"weight_map": {}}'), "index.json: names no file"),
    "no index": (index_of("[]"), "index.json: is no index of weights: "),
    "an index of numbers": (index_of('{"weight_map": {"a": 1}}'), "is no index of weights: "),
    "an index that leads elsewhere": (
        index_of('{"weight_map": {"a": "../../evil.bin"}}'),
        "1 of its 1 files are missing, such as evil.bin",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_pickle_of_weights_is_refused(pickled, case, cache):
    write, told = REFUSED[case]
    folder, _ = pickled(write)
    with pytest.raises(DataError, match=told) as refused:
        load_pretrained(files_of(folder), 0)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not cache.exists()


@pytest.mark.parametrize(
    "name", ["training_args.bin", "pytorch_model.generator.bin", "tf_model.h5", "model.gguf"]
)
def test_other_files_are_no_weights(pickled, name):
    folder, _ = pickled(save(name))
    told = f"has its weights as {name} only; model.safetensors and pytorch_model.bin .* are read"
    with pytest.raises(DataError, match=told):
        files_of(folder).check_weights()
    with pytest.raises(DataError, match=told):
        load_outline(files_of(folder))


# ---- what `check --data` sees of them


def test_the_outline_of_a_model_takes_no_memory(tiny, tmp_path):
    """A model of 5 GB that is not there but for its header."""
    folder = tmp_path / "large"
    shutil.copytree(tiny("bert"), folder)
    config = json.loads((folder / "config.json").read_text())
    wide = config | {"intermediate_size": 10**7}
    (folder / "config.json").write_text(json.dumps(wide))
    shapes = {n: [*t.shape] for n, t in load_file(folder / "model.safetensors").items()}
    for name, shape in shapes.items():
        if ".intermediate." in name:
            shape[0] = 10**7
        elif re.search(r"layer\.\d\.output\.dense\.weight", name):
            shape[1] = 10**7
    save_hollow(folder / "model.safetensors", shapes)
    model = load_outline(files_of(folder))
    assert sum(p.numel() for p in model.parameters()) > 10**9
    assert max(p.untyped_storage().nbytes() for p in model.parameters()) < 10**6


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra", "albert"])
def test_the_outline_reads_a_window(tiny, family):
    files = files_of(tiny(family))
    model = load_outline(files)
    check_forward(model, load_tokenizer(files), family, training=True)
    whole = load_pretrained(files, 0)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in whole.named_parameters()
    }
    assert {n: b.shape for n, b in model.named_buffers()} == {
        n: b.shape for n, b in whole.named_buffers()
    }


def test_weights_by_another_name_are_none(pickled):
    folder, weights = pickled()
    save_file(weights, folder / "weights.safetensors", {"format": "pt"})
    for read in (load_outline, lambda files: load_pretrained(files, 0)):
        with pytest.raises(DataError, match=r"cannot be read: .*no file .*model\.safetensors"):
            read(files_of(folder))


def other_names(weights):
    return {name.replace("bert.", "other."): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_names, "37 tensors are absent or of another shape, such as bert.embeddings.Layer"),
        (lambda w: w | {"qa_outputs.bias": torch.zeros(3)}, "1 tensors are .* such as qa_outputs"),
    ],
)
@pytest.mark.parametrize("form", ["pickle", "safetensors"])
def test_the_outline_refuses_what_the_run_would(pickled, change, told, form):
    folder, weights = pickled()
    if form == "pickle":
        torch.save(change(weights), folder / "pytorch_model.bin")
    else:
        save_file(change(weights), folder / "model.safetensors", {"format": "pt"})
    said = []
    for read in (load_outline, lambda files: load_pretrained(files, 0)):
        with pytest.raises(DataError, match=told) as refused:
            read(files_of(folder))
        said.append(str(refused.value))
    assert said[0] == said[1]
