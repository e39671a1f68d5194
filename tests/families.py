"""Tiny random models of all families of which jobs/README.md promises something, each with a
tokenizer of its own kind: word pieces, bytes, or a sentencepiece model and nothing beside it, as
DeBERTa-v3 is published."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.conftest import SENTENCES, byte_pairs

# Accents, ligatures, signs, three scripts; what is in none of these lines is unknown to a model.
LINES = (
    *SENTENCES,
    "Das Café in 東京 öffnete 1912 \u2013 das Schild hängt noch über der Tür.",
    "Ångström wrote: naïve façades, ½ of them finely drawn in “São Paulo”.",
    "The price of AB2 is fine, it\u2019s 1,250.50 € (then: 3 ¥)?",
    "東京の古い灯台は1912年に建てられた。 Москва и Київ.",
)
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
POSITIONS = 160


@dataclass(frozen=True)
class Family:
    """How a tiny model of a family is made.

    Attributes:
        tokenizer: writes the files of its tokenizer into a folder.
        config: keys of its configuration beside the usual ones.
    """

    tokenizer: Callable[[Path], object]
    config: Mapping[str, Any] = field(default_factory=dict)


def save_family(name: str, folder: Path, seed: int = 0) -> None:
    """Write a model of a family into a folder, as somebody publishes one."""
    import torch
    from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer

    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    family.tokenizer(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64, "max_position_embeddings": POSITIONS}
    if name == "xlnet":  # which refuses to be told
        del shape["max_position_embeddings"]
    AutoConfig.for_model(name, **shape | family.config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {
        key: getattr(tokenizer, key)
        for key in ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")
        if getattr(tokenizer, key) is not None
    }
    config = AutoConfig.for_model(
        name, **shape | ids | family.config, vocab_size=len(tokenizer), dtype="float32"
    )
    torch.manual_seed(seed)
    model = AutoModelForQuestionAnswering.from_config(config)
    for key, parameter in model.named_parameters():  # fresh weights make all logits alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "bias" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


# --- tokenizers -------------------------------------------------------------------------------


def word_pieces(*, cased: bool = False, **names: str) -> Callable[[Path], object]:
    """A vocab.txt, as BERT's kin are published."""

    def write(folder: Path) -> None:
        text = " ".join(LINES)
        letters = sorted({letter for letter in text + text.lower() if not letter.isspace()})
        plain = sorted("abcdefghijklmnopqrstuvwxyz")  # what accents are stripped off
        words = sorted({word for word in text.lower().split()[::2] if word.isalpha()})
        specials = [names.get(token, token) for token in SPECIALS]
        found = [*specials, *letters, *plain, *words, *(f"##{x}" for x in [*letters, *plain])]
        (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(found)) + "\n", "utf-8")
        (folder / "tokenizer_config.json").write_text(
            f'{{"do_lower_case": {str(not cased).lower()}}}'
        )

    return write


def roberta_bytes(folder: Path) -> None:
    from transformers import RobertaTokenizer

    vocabulary, merges = byte_pairs()
    RobertaTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)


def modern_bytes(folder: Path) -> None:
    """ModernBERT's: bytes, with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = byte_pairs()
    shift = len(SPECIALS) - 5  # as many special tokens as RoBERTa's
    names = dict(zip(("<pad>", "<unk>", "<s>", "</s>", "<mask>"), SPECIALS, strict=True))
    vocabulary = {names.get(piece, piece): id + shift for piece, id in vocabulary.items()}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    raw.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        **{f"{token[1:-1].lower()}_token": token for token in SPECIALS},
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def pieces(name: str, settings: str = "{}", **layout: Any) -> Callable[[Path], object]:
    """A sentencepiece model alone, trained on LINES, by the name and with the special pieces that
    a family has."""

    def write(folder: Path) -> None:
        (folder / name).write_bytes(trained_pieces(tuple(sorted(layout.items()))))
        (folder / "tokenizer_config.json").write_text(settings)

    return write


def albert_json(folder: Path) -> None:
    """ALBERT's tokenizer, as transformers saves it."""
    from transformers import AlbertTokenizer

    pieces("spiece.model", **_ALBERT)(folder)
    AlbertTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "spiece.model").unlink()


@cache
def trained_pieces(layout: Iterable[tuple[str, Any]], lines: tuple[str, ...] = LINES) -> bytes:
    """A sentencepiece model, by keys of its trainer."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter([*lines, *(line.lower() for line in lines)]),
        model_writer=written,
        vocab_size=260,
        hard_vocab_limit=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        **dict(layout),
    )
    return written.getvalue()


_ALBERT = {
    "pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1,
    "control_symbols": "[CLS],[SEP],[MASK]",
}  # fmt: skip
_DEBERTA = {
    "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3,
    "pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]",
}  # fmt: skip
_REMBERT = {
    "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1,
    "control_symbols": "[CLS],[SEP],[MASK]",
}  # fmt: skip
_BIG_BIRD = {
    "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3,
    "control_symbols": "[CLS],[SEP],[MASK]",
}  # fmt: skip
_XLNET = {
    "unk_id": 0, "bos_id": 1, "eos_id": 2,
    "control_symbols": "<cls>,<sep>,<pad>,<mask>,<eod>,<eop>",
}  # fmt: skip

ROBERTA = {"type_vocab_size": 1}
FAMILIES: dict[str, Family] = {
    "bert": Family(word_pieces()),
    "distilbert": Family(
        word_pieces(cased=True), {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    ),
    "roberta": Family(roberta_bytes, ROBERTA),
    "xlm-roberta": Family(pieces("sentencepiece.bpe.model"), ROBERTA),
    "camembert": Family(pieces("sentencepiece.bpe.model"), ROBERTA),
    "electra": Family(word_pieces(), {"embedding_size": 16}),
    "modernbert": Family(modern_bytes, {"local_attention": 16, "global_attn_every_n_layers": 2}),
    "albert": Family(pieces("spiece.model", **_ALBERT), {"embedding_size": 16}),
    "ernie": Family(word_pieces(), {"use_task_id": True}),
    "deberta-v2": Family(
        pieces("spm.model", '{"do_lower_case": false, "vocab_type": "spm"}', **_DEBERTA),
        {
            "relative_attention": True,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": "p2c|c2p",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "mpnet": Family(
        word_pieces(**{"[PAD]": "<pad>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"})
    ),
    "big_bird": Family(pieces("spiece.model", **_BIG_BIRD), {"block_size": 16}),
    "longformer": Family(roberta_bytes, ROBERTA | {"attention_window": [16, 16]}),
    "rembert": Family(pieces("sentencepiece.model", **_REMBERT), {"input_embedding_size": 16}),
    "squeezebert": Family(word_pieces(), {"embedding_size": 32}),
    "xlnet": Family(
        pieces("spiece.model", **_XLNET), {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}
    ),
    "convbert": Family(word_pieces(), {"embedding_size": 32, "conv_kernel_size": 3}),
    "nystromformer": Family(albert_json),
}
