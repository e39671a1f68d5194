"""Frozen layers: what counts as the frozen bottom, and that reading above its kept outputs is
reading the whole model."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal

import numpy as np
import pytest
import torch

from runner.data.collate import Packing
from runner.data.loader import WindowLoader
from runner.data.sampler import epoch_batches
from runner.errors import JobError, StorageError
from runner.model.attention import choose_packing
from runner.model.forward import SpanModel, fill_cache
from runner.model.freeze import freeze
from runner.model.frozen import FrozenLayers, allocate, check_cacheable
from runner.utils.ranks import Rank
from tests.small_models import (
    assert_same_gradients,
    gradients_of,
    model_of,
    takes_types,
    windows_of,
)

CPU = torch.device("cpu")
LENGTHS = (7, 1, 23, 12, 40, 9)
LAYERS = {"distilbert": "transformer.layer"}
ALONE = Rank(0, 1, 0, 1)


def bottom(family: str, depth: str = "0") -> list[str]:
    """Patterns that freeze the embeddings and the first layers."""
    extra = ["embeddings_project"] if family == "electra" else []
    return ["embeddings", *extra, f"{LAYERS.get(family, 'encoder.layer')}.{depth}"]


def room(windows, width, folder):
    """Where a process alone keeps outputs of this width."""
    alone = {"broadcast": lambda value: value, "all_gather": lambda value: [value]}
    return allocate(windows, width, torch.float32, CPU, folder, ALONE, **alone)


def frozen_model(family: str, **extra: object):
    model = model_of(family, layers=3, **extra)
    freeze(model, bottom(family))
    return model


@pytest.mark.parametrize(
    ("patterns", "depth"),
    [
        (["embeddings"], 0),
        (["embeddings", "encoder.layer.0"], 1),
        (["embeddings", "encoder.layer.0-1"], 2),
        (["embeddings", "encoder.layer.0", "encoder.layer.2"], 1),
        (["embeddings", "encoder"], 3),
        (["encoder.layer.0-1"], None),
        (["embeddings.word_embeddings", "encoder.layer.0"], None),
        (["embeddings", "encoder.layer.0.attention"], 0),
        ([], None),
    ],
)
def test_the_bottom_reaches_as_far_as_nothing_is_trained(patterns, depth):
    model = model_of("bert", layers=3)
    freeze(model, patterns)
    trunk = FrozenLayers.of(model)
    assert (trunk and trunk.depth) == depth


def test_other_encoders_have_no_bottom():
    model = model_of("albert")
    freeze(model, ["embeddings"])
    assert FrozenLayers.of(model) is None


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra", "ernie"])
def test_reading_above_the_bottom_is_reading_all_of_it(family, layout, tmp_path):
    """Every bit of the logits, where the batch is the one that was kept: nothing is rounded. (In
    another batch the products of matrices are of another size and may add up in another order.)"""
    model = frozen_model(family).eval()
    packing = choose_packing("on", model, CPU, "fp32", 40)[0] if layout == "packed" else None
    whole_model = SpanModel(model, WindowLoader(CPU, 0, packing), takes_types(family))
    windows = windows_of(LENGTHS)
    trunk = FrozenLayers.of(model)
    assert trunk is not None
    assert trunk.depth == 1
    names = list(model.state_dict())
    store = room(windows, 32, tmp_path)
    assert store is not None
    assert store.place == "memory"
    batches = [np.array([4, 0, 2]), np.array([1, 5]), np.array([], dtype=np.int64), np.array([3])]
    upper_model = dataclasses.replace(whole_model, frozen=trunk, hidden_caches=(store,))
    fill_cache(dataclasses.replace(whole_model, frozen=trunk), store, batches)
    for rows in batches:
        whole, upper = (part(part.batch(windows, rows)) for part in (whole_model, upper_model))
        real = torch.cat([torch.arange(a, a + n) for a, n in whole.batch.segments_B2.tolist()])
        if len(rows):
            assert torch.equal(whole.logits_T2[real], upper.logits_T2[real])
        torch.testing.assert_close(whole.logits_T2[real], upper.logits_T2[real])
        gradients = []
        for read in (whole, upper):
            model.zero_grad()
            # A batch without windows reads one token, whose loss never counts.
            (read.logits_T2[real].square().sum() * bool(len(rows))).backward()
            gradients.append(gradients_of(model))
        assert_same_gradients(*gradients)
    assert list(model.state_dict()) == names
    other = windows_of(LENGTHS, seed=1)
    found = [part(part.batch(other, batches[0])) for part in (whole_model, upper_model)]
    assert torch.equal(found[0].logits_T2, found[1].logits_T2)


def test_the_bottom_is_computed_without_dropout_and_left_in_training(tmp_path):
    model = frozen_model("bert", hidden_dropout_prob=0.5).train()
    packing, _ = choose_packing("on", model, CPU, "fp32", 40)
    trunk = FrozenLayers.of(model)
    windows = windows_of(LENGTHS)
    stores = []
    for seed in range(2):
        torch.manual_seed(seed)
        store = room(windows, 32, tmp_path)
        assert store is not None
        fed = SpanModel(model, WindowLoader(CPU, 0, packing), True, trunk)
        fill_cache(fed, store, [np.arange(6)])
        stores.append(store.hidden_TD)
    assert torch.equal(*stores)
    assert all(module.training for module in model.modules())


def test_frozen_layers_record_nothing_for_the_backward_pass():
    model = frozen_model("bert").train()
    trunk = FrozenLayers.of(model)
    assert trunk is not None
    seen = []
    trunk.stack.layer[0].register_forward_hook(lambda *args: seen.append(args[-1].requires_grad))
    trunk.stack.layer[1].register_forward_hook(lambda *args: seen.append(args[-1].requires_grad))
    fed = SpanModel(model, WindowLoader(CPU, 0), True)
    fed(fed.batch(windows_of(LENGTHS), np.arange(3)))
    assert seen == [False, True]


def test_ranks_of_one_machine_share_a_copy(tmp_path):
    """Both map one file, which never has a name in the folder."""
    windows = windows_of(LENGTHS)
    waits = []
    rank = Rank(0, 2, 0, 2)
    store = allocate(
        windows,
        4,
        torch.bfloat16,
        CPU,
        tmp_path,
        rank,
        broadcast=lambda _: "disk",
        all_gather=lambda value: waits.append([*tmp_path.iterdir()]) or [value],
    )
    assert store is not None
    assert store.place == "disk"
    assert waits == [[], [], []]
    store.write(np.array([2, 0]), torch.ones(30, 4))
    assert torch.equal(store.get(np.array([0]), CPU), torch.ones(7, 4, dtype=torch.bfloat16))
    assert not store.get(np.array([1, 3]), CPU).any()


def test_without_room_there_is_no_store(tmp_path):
    assert room(windows_of(LENGTHS), 10**12, tmp_path) is None


@pytest.mark.parametrize("here", [True, False])
def test_room_that_is_gone_is_a_sentence_on_every_rank(tmp_path, monkeypatch, here):
    """On this machine or on another one: nothing is written into a hole."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if here:
        monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        allocate(
            windows_of(LENGTHS),
            4,
            torch.float32,
            CPU,
            tmp_path,
            Rank(0, 4, 0, 2),
            broadcast=lambda _: "disk",
            all_gather=lambda text: [text, None] if here else [None, "there: No space left"],
        )
    assert caught.value.exit_code == 74
    assert not [*tmp_path.iterdir()]


def test_the_room_is_taken_at_once(tmp_path):
    blocks = []
    allocate(
        windows_of(LENGTHS),
        1024,
        torch.float32,
        CPU,
        tmp_path,
        Rank(0, 2, 0, 2),
        broadcast=lambda _: "disk",
        all_gather=lambda value: (
            (blocks.append(os.stat(value.split()[-1]).st_blocks) if value else None) or [value]
        ),
    )
    assert blocks[0] * 512 >= sum(LENGTHS) * 1024 * 4


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_process_killed_while_it_takes_room_leaves_nothing(tmp_path, monkeypatch, place):
    before = set(os.listdir("/dev/shm"))
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if child == 0:
        ranks = {"broadcast": lambda _: place, "all_gather": lambda value: [value]}
        two = Rank(0, 2, 0, 2)
        allocate(windows_of(LENGTHS), 4, torch.float32, CPU, tmp_path, two, **ranks)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert set(os.listdir("/dev/shm")) <= before
    assert not [*tmp_path.iterdir()]


def test_memory_is_shared_by_processes(tmp_path):
    ranks = {"broadcast": lambda _: "memory", "all_gather": lambda value: [value]}
    two = Rank(0, 2, 0, 2)
    store = allocate(windows_of(LENGTHS), 4, torch.float32, CPU, tmp_path, two, **ranks)
    assert store is not None
    child = os.fork()
    if child == 0:
        store.hidden_TD[0, 0] = 17
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert store.hidden_TD[0, 0] == 17


def test_what_cannot_be_cached_is_refused():
    model = model_of("bert")
    with pytest.raises(JobError, match="needs frozen embeddings and frozen first layers"):
        check_cacheable(FrozenLayers.of(model), 2)
    freeze(model, ["embeddings"])
    with pytest.raises(JobError, match="needs frozen embeddings and frozen first layers"):
        check_cacheable(FrozenLayers.of(model), 2)
    freeze(model, ["encoder.layer.0"])
    assert check_cacheable(FrozenLayers.of(model), 2).depth == 1
    with pytest.raises(JobError, match="stage"):
        check_cacheable(FrozenLayers.of(model), 3)


def test_a_batch_is_what_the_packing_says_whether_or_not_its_bottom_is_kept():
    """A filled-up batch gets zeros where no token is."""
    from runner.data.collate import collate
    from runner.data.loader import pack
    from runner.model.forward import placed

    windows = windows_of(LENGTHS)
    packed = pack(collate(windows, np.array([0, 3])), 0, Packing(multiple=16))
    hidden = placed(torch.ones(19, 4), packed)
    assert hidden.shape == (1, 32, 4)
    assert hidden.sum() == 19 * 4


def test_epochs_meet_every_window_whatever_the_rank():
    """Why ranks share a copy: an epoch deals windows to other ranks than the one before."""
    lengths_N = np.random.default_rng(0).integers(5, 40, 64)
    mine = [
        {int(n) for rows in epoch_batches(lengths_N, 8, 1, epoch) for n in rows[::2]}
        for epoch in range(2)
    ]
    assert mine[0] != mine[1]
