"""The cache of windows: stored once, mapped afterwards, never stale, never trusted when damaged."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers.normalizers import NFC
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from runner.data import tokenize
from runner.data import window_cache as feature_cache
from runner.data import windows as features
from runner.data.dataset import Example
from runner.data.tokenize import plain_backend
from runner.data.window_cache import cache_key, cached_windows
from runner.data.windows import Windows, build_windows, window_blocks
from runner.errors import DataError, Interrupted

FIELDS = dataclasses.fields(Windows)
CONTEXT = "The lantern folds flat; its battery lasts nine hours on the bright setting. " * 3


def ask(context, question="When?", answer=None, name="q"):
    """A question whose answer is context[answer[0]:answer[1]]."""
    if answer is None:
        return Example(name, question, context, (), ())
    return Example(name, question, context, (context[slice(*answer)],), (answer[0],))


@pytest.fixture(scope="module")
def tokenizer_of(tiny):
    """`tokenizer_of(kind)`: a tiny tokenizer."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = AutoTokenizer.from_pretrained(tiny(kind))
        return made[kind]

    return make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPANTUNE_CACHE", str(tmp_path))
    return tmp_path / "features"


@pytest.fixture
def load(cache, tokenizer_of):
    asked = [ask(CONTEXT, answer=(4, 11)), ask("The shade is linen.", "What?", (13, 18))]
    return lambda: cached_windows(asked, "content", tokenizer_of("bert"), 48, 8)


def same(one, other):
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in FIELDS
    )


def test_windows_are_built_once_then_mapped(load, monkeypatch):
    built, cached = load()
    assert not cached
    monkeypatch.setattr(feature_cache, "window_blocks", None)
    again, cached = load()
    assert cached
    assert same(built, again)
    for windows in (built, again):
        for field in FIELDS:
            array = getattr(windows, field.name)
            assert isinstance(array.base, np.memmap)
            assert not array.flags.writeable


def test_the_key_names_everything_that_decides_the_windows(tokenizer_of, monkeypatch, tmp_path):
    bert = tokenizer_of("bert")
    keys = {cache_key("content", bert, 48, 8)}

    def tokenizer_with(change):
        backend = plain_backend(bert)
        change(backend)
        return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]")

    wrapped = tokenizer_with(lambda backend: None)
    sep_as_cls = PreTrainedTokenizerFast(tokenizer_object=plain_backend(bert), cls_token="[SEP]")
    assert cache_key("content", wrapped, 48, 8) in keys
    others = [
        ("changed", bert, 48, 8),
        ("content", bert, 49, 8),
        ("content", bert, 48, 9),
        ("content", tokenizer_of("albert"), 48, 8),
        ("content", tokenizer_with(lambda b: b.add_tokens(["lantern folds"])), 48, 8),
        ("content", tokenizer_with(lambda b: setattr(b, "normalizer", NFC())), 48, 8),
        ("content", sep_as_cls, 48, 8),
    ]
    for n, other in enumerate(others, 2):
        keys.add(cache_key(*other))
        assert len(keys) == n, other
    code = tmp_path / "features.py"
    code.write_text("changed")
    for module in (features, tokenize, feature_cache):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(code))
            assert cache_key("content", bert, 48, 8) not in keys


def test_the_key_ignores_padding_and_truncation(tokenizer_of):
    bert, left, set_up = (tokenizer_of(kind) for kind in ("bert", "bert-left", "bert-settings"))
    assert set_up.backend_tokenizer.truncation is not None
    keys = {cache_key("content", tokenizer, 48, 8) for tokenizer in (bert, left, set_up)}
    assert len(keys) == 1


def shorten(path):
    np.save(path, np.load(path)[:-1])


@pytest.mark.parametrize("name", [field.name for field in FIELDS])
@pytest.mark.parametrize(
    "damage",
    [
        os.remove,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:90]),
        lambda path: path.write_bytes(b"PK\3\4" + path.read_bytes()),
        lambda path: path.write_bytes(bytes(200)),
        lambda path: np.save(path, np.load(path).astype(float)),
        lambda path: np.save(path, np.array([{}], dtype=object)),
        shorten,
    ],
    ids=["gone", "empty", "cut", "header cut", "zip", "zeros", "floats", "objects", "shorter"],
)
def test_a_damaged_cache_is_built_again(load, cache, damage, name):
    whole, _ = load()
    expected = {field.name: np.array(getattr(whole, field.name)) for field in FIELDS}
    (folder,) = cache.iterdir()
    damage(folder / f"{name}.npy")
    rebuilt, cached = load()
    assert not cached
    assert same(rebuilt, Windows(**expected))
    assert load()[1]


def entries(cache):
    return {path.name: path for path in cache.iterdir()}


def spoil(folder, name, change):
    """Change an array and let its sum agree, as whoever may write in the cache can."""
    array = np.load(folder / f"{name}.npy")
    change(array)
    (folder / f"{name}.npy").unlink()  # who has mapped it keeps what was there
    np.save(folder / f"{name}.npy", array)
    (folder / "SHA256SUMS").write_text(feature_cache._sums(folder))


def test_the_windows_of_other_questions_are_noticed_under_any_key(cache, tokenizer_of):
    """A folder of another key in its place is whole by its own sums."""
    bert = tokenizer_of("bert")
    asked = [ask(CONTEXT, f"When {n}?", (4, 11), f"q{n}") for n in range(200)]
    right, _ = cached_windows(asked, "content", bert, 48, 8)
    [mine] = entries(cache).values()
    for others, length in (
        (asked[::-1], 48),
        (asked[:-1], 48),
        ([*asked, asked[0]], 48),
        ([ask(e.context.replace("lantern", "battery"), e.question, (4, 11)) for e in asked], 48),
        (asked, 40),
    ):
        cached_windows(others, "other", bert, length, 8)
        [theirs] = [path for name, path in entries(cache).items() if name != mine.name]
        shutil.rmtree(mine)
        theirs.rename(mine)
        found, cached = cached_windows(asked, "content", bert, 48, 8)
        assert not cached
        assert same(found, right)
    assert cached_windows(asked, "content", bert, 48, 8)[1]


def shift(array):
    array += 1


def far(array):
    array[-1] += np.iinfo(array.dtype).max // 2


def before(array):
    array -= 200  # round and round where no number is below 0


@pytest.mark.parametrize("change", [shift, far, before])
@pytest.mark.parametrize("name", [field.name for field in FIELDS])
def test_other_windows_with_sums_that_agree_are_noticed(load, cache, name, change):
    right, _ = load()
    [folder] = entries(cache).values()
    spoil(folder, name, change)
    found, cached = load()
    assert not cached
    assert same(found, right)


def test_ranks_that_store_at_once_agree(load, cache):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: load(), range(8)))
    assert all(same(windows, results[0][0]) for windows, _ in results)
    assert len(list(cache.iterdir())) == 1
    assert load()[1]


def test_a_cache_that_cannot_be_written_costs_time_only(load, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "_header", full)
        windows, cached = load()
        assert list(cache.iterdir()) == []
    assert not cached
    assert same(windows, load()[0])
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    again, cached = load()
    assert same(again, windows)
    assert not cached


def test_a_cache_that_cannot_be_looked_at_costs_time_only(load, cache, monkeypatch, tmp_path):
    windows, _ = load()
    monkeypatch.setenv("SPANTUNE_CACHE", str(tmp_path / ("n" * 300)))
    again, cached = load()
    assert same(again, windows)
    assert not cached


def test_a_full_cache_is_named_when_only_the_closing_of_a_file_finds_it_full(
    cache, tokenizer_of, monkeypatch
):
    opened = Path.open

    class Closing(io.FileIO):
        def close(self):
            super().close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(path, mode="r", *rest, **options):
        return Closing(path, mode) if mode == "wb" else opened(path, mode, *rest, **options)

    told = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        windows, cached = cached_windows(
            [ask(CONTEXT)], "content", tokenizer_of("bert"), 48, 8, warn=told.append
        )
    assert not cached
    assert len(windows) > 0
    (line,) = told
    assert line.startswith(f"windows are not kept for the next run: {cache}/")
    assert "No space left on device; " in line
    assert line.endswith("bytes are free there: free some space or choose another folder;"
                         " SPANTUNE_CACHE names another")  # fmt: skip


def test_blocks_are_written_end_to_end(cache, tokenizer_of, monkeypatch):
    asked = [ask(f"{CONTEXT}{n}", answer=(4, 11), name=str(n)) for n in range(40)]
    bert = tokenizer_of("bert")
    whole = build_windows(asked, bert, 48, 8)
    monkeypatch.setattr(window_blocks, "__defaults__", (3,))
    found, cached = cached_windows(asked, "content", bert, 48, 8)
    assert not cached
    assert same(found, whole)
    assert cached_windows(asked, "content", bert, 48, 8)[1]


def test_a_question_without_room_leaves_no_cache(cache, tokenizer_of, monkeypatch):
    asked = [ask(CONTEXT, name="a"), ask(CONTEXT + "x", "the " * 60, name="b")]
    monkeypatch.setattr(window_blocks, "__defaults__", (1,))
    with pytest.raises(DataError, match="question b"):
        cached_windows(asked, "content", tokenizer_of("bert"), 48, 8)
    assert not [*cache.iterdir()]


def test_a_signal_ends_it_between_two_blocks(cache, tokenizer_of, monkeypatch):
    asked = [ask(f"{CONTEXT}{n}", name=str(n)) for n in range(40)]
    monkeypatch.setattr(window_blocks, "__defaults__", (3,))
    calls = []

    def between() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        cached_windows(asked, "content", tokenizer_of("bert"), 48, 8, between)
    assert not [*cache.iterdir()]
