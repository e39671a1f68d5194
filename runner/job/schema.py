"""The one page of schema: everything that a job file may say, with units and ranges.

The models are frozen and refuse unknown keys; `jobs/job.schema.json` is exported from them. No
default stands anywhere else. Reading a file and its overrides is in `load`, what
is said of a wrong one in `messages`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import to_json

from runner.errors import JobError
from runner.job import slurm_values as allowed
from runner.job.sources import describe_sample, parse_data, parse_share, set_name
from runner.utils.text import divisors, one_of

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]

Count = Annotated[int, Field(ge=1, le=1_000_000_000)]

Share = Annotated[float, Field(ge=0, lt=1)]

Percent = Annotated[float, Field(ge=0, le=100)]

WindowTokens = Annotated[int, Field(ge=16, le=8192)]

Stride = Annotated[int, Field(ge=0)]

SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,39}$")]

# Where the schema takes a name, a table or a list, pydantic puts these into the path of an error.
FORMS = ("<name>", "<table>", "<list>")

# Languages whose answers are compared by rules of their own (metrics/normalise).
Language = Literal[
    "ar", "bg", "bn", "ca", "cs", "da", "de", "el", "en", "es", "et", "eu", "fa", "fi", "fr", "he",
    "hi", "hr", "hu", "id", "is", "it", "ja", "ka", "km", "ko", "lo", "lt", "lv", "mr", "ms", "my",
    "nl", "no", "pl", "pt", "ro", "ru", "sk", "sl", "sr", "sv", "sw", "ta", "te", "th", "tr", "uk",
    "ur", "vi", "zh",
]  # fmt: skip

OnBadRow = Literal["fail", "drop", "repair"]

METRICS = ("f1", "exact_match", "span_accuracy", "start_accuracy", "end_accuracy", "loss")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Columns(Section):
    """Names of the columns in a flat JSON, JSONL, CSV or Parquet file."""

    id: Text | None = Field(default=None, description="question id; unset: the row number")
    question: Text = Field(default="question", description="the question")
    context: Text = Field(default="context", description="the text that holds the answer")
    answer: Text | None = Field(
        default=None,
        description=(
            "one answer text per row; unset: `answers` in SQuAD's form, or a column called answer"
        ),
    )
    answer_start: Text | None = Field(
        default=None,
        description=(
            "character offset of `answer` in the context; unset: the answer's only occurrence"
        ),
    )


AnySet = TypeVar("AnySet", bound="QuestionSet")


def _readable(text: str) -> str:
    if parse_share(text) is None:
        parse_data(text)
    return text


DataName = Annotated[Text, AfterValidator(_readable)]


class QuestionSet(Section):
    """One of several sets of questions."""

    source: DataName = Field(description="a file or hub name with split and slice")
    name: SetName | None = Field(
        default=None,
        description=(
            "what it is called in the log and in names of files: letters, digits, dash; unset:"
            " after its file or repository"
        ),
    )
    sample: Count | None = Field(
        default=None, description="this many questions drawn with the seed; unset: all"
    )
    columns: Columns | None = Field(default=None, description="of this set; unset: data.columns")


class TrainSet(QuestionSet):
    """One of several sets of training questions."""

    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description=(
            "how often its questions are seen in an epoch; 0.5: half of them, and the others in the"
            " next"
        ),
    )


def _form(value: Any) -> str:
    return "<list>" if isinstance(value, list | tuple) else _item_form(value)


def _item_form(value: Any) -> str:
    return "<table>" if isinstance(value, Mapping | QuestionSet) else "<name>"


_Name = Annotated[DataName, Tag("<name>")]
_Trained = Annotated[TrainSet, Tag("<table>")]
_Scored = Annotated[QuestionSet, Tag("<table>")]
_TrainedList = Annotated[
    tuple[Annotated[_Name | _Trained, Discriminator(_item_form)], ...],
    Field(strict=False),
    Tag("<list>"),
]
_ScoredList = Annotated[
    tuple[Annotated[_Name | _Scored, Discriminator(_item_form)], ...],
    Field(strict=False),
    Tag("<list>"),
]


class Data(Section):
    """Which questions are trained on and scored, and how contexts become windows."""

    train: Annotated[_Name | _Trained | _TrainedList, Discriminator(_form)] = Field(
        description=(
            "training questions: a file or hub name with split and slice,"
            " rajpurkar/squad:train[:1000] (slices count questions); or several, in a list of names"
            " and of tables { source, name, weight, sample, columns }"
        )
    )
    validation: Annotated[_Name | _Scored | _ScoredList, Discriminator(_form)] = Field(
        description=(
            "questions scored after each epoch, in the same form as train (without weight), of"
            ' several the first decides; "10%": so many of the training questions, whole contexts,'
            " drawn with the seed and not trained on"
        )
    )
    sample: Count | None = Field(
        default=None,
        description="train on this many questions drawn from `train` with the seed; unset: all",
    )
    validation_sample: Count | None = Field(default=None, description="the same for `validation`")
    tuning: DataName | None = Field(
        default=None,
        description=(
            "SQuAD v2: questions on which the null threshold is tuned after each epoch, in the same"
            " form; none of them may be in `validation`; unset: score.null_threshold as it is"
        ),
    )
    max_length: WindowTokens = Field(
        default=384, description="tokens in a window, question and special tokens included"
    )
    stride: Stride = Field(
        default=128, description="tokens shared by neighbouring windows of one context"
    )
    unanswerable: bool = Field(
        default=False,
        description=(
            "SQuAD v2: a question without an answer is data, not an error; is_impossible = true,"
            " an empty text, answer_start -1 say so"
        ),
    )
    no_answer: Text | None = Field(
        default=None,
        description=(
            "SQuAD v2: an answer text that means that there is none, such as ANSWERNOTFOUND; one"
            " that ends a context is cut off"
        ),
    )
    on_bad_row: OnBadRow = Field(
        default="fail",
        description=(
            "what to do with rows whose answer is not in the text, empty texts, repeated ids,"
            " questions too long for a window; repair: answers a few characters off, counted in"
            " bytes, or in other case or blanks are mended and listed in repairs.jsonl, other rows"
            " refused"
        ),
    )
    columns: Columns = Field(default_factory=Columns, description="column names of flat files")

    @field_validator("train", "validation", "tuning")
    @classmethod
    def _sets_differ(cls, value: Any, info: ValidationInfo) -> Any:
        sets = () if value is None else _as_sets(value, None, Columns(), QuestionSet)
        if value == ():
            raise ValueError("is empty; name a file or a hub data set")
        shares = [one for one in sets if parse_share(one.source) is not None]
        if shares and info.field_name != "validation":
            raise ValueError(f"{shares[0].source!r} names no data; a share is for validation")
        if any(one.sample for one in shares):
            raise ValueError(f"sample beside {shares[0].source!r}: write a smaller share")
        names = [str(one.name) for one in sets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f'{names.count(name)} sets are called {name}; call one {{ source = "...",'
                    ' name = "..." }'
                )
        return value

    @field_validator("sample", "validation_sample")
    @classmethod
    def _sample_of_one(cls, sample: int | None, info: ValidationInfo) -> int | None:
        key = "train" if info.field_name == "sample" else "validation"
        value = info.data.get(key, "")
        if sample is not None and (not isinstance(value, str) or parse_share(value) is not None):
            raise ValueError(
                f"is for a single {key} set; write"
                f' {key} = [{{ source = "...", sample = {sample} }}, ...], or a smaller share'
            )
        return sample

    @property
    def trained(self) -> tuple[TrainSet, ...]:
        """The training sets, with their names and columns."""
        return _as_sets(self.train, self.sample, self.columns, TrainSet)

    @property
    def scored(self) -> tuple[QuestionSet, ...]:
        """The validation sets, with their names and columns; the first decides."""
        return _as_sets(self.validation, self.validation_sample, self.columns, QuestionSet)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all data that is read."""
        tuning = () if self.tuning is None else (self.tuning,)
        texts = (*(one.source for one in (*self.trained, *self.scored)), *tuning)
        return tuple(text for text in texts if parse_share(text) is None)

    def described(
        self, sets: Sequence[QuestionSet], spell: Callable[[str], str] = lambda name: name
    ) -> str:
        """Some of `trained` or of `scored` in words; `spell` makes a name fit to be shown."""

        def words(one: QuestionSet) -> str:
            if parse_share(one.source) is not None:
                return f"{one.source} of {self.described(self.trained, spell)}"
            weight = one.weight if isinstance(one, TrainSet) else 1
            weighted = "" if weight == 1 else f" ({weight:g} times an epoch)"
            return f"{spell(one.source)}{describe_sample(one.sample)}{weighted}"

        return " + ".join(map(words, sets))

    @model_validator(mode="after")
    def _tuning_has_a_use(self) -> Data:
        if self.tuning is not None and not self.unanswerable:
            raise ValueError(
                "tuning is for SQuAD v2; set unanswerable = true, or remove it: without it every"
                " question is answered and there is no null threshold"
            )
        return self

    @model_validator(mode="after")
    def _no_answer_has_a_use(self) -> Data:
        if self.no_answer is not None and not self.unanswerable:
            raise ValueError(
                f"no_answer {self.no_answer!r} marks questions without an answer, which are"
                " refused unless unanswerable = true"
            )
        return self

    @model_validator(mode="after")
    def _stride_fits(self) -> Data:
        if self.stride >= self.max_length:
            unset = "" if "stride" in self.model_fields_set else " (which is unset)"
            raise ValueError(
                f"stride {self.stride}{unset} must be smaller than max_length {self.max_length}, or"
                " windows would never move on; a third of max_length is usual:"
                f" stride = {self.max_length // 3}"
            )
        return self


def _as_sets(
    value: Any, sample: int | None, columns: Columns, kind: type[AnySet]
) -> tuple[AnySet, ...]:
    """What stands at data.train or data.validation as tables that leave nothing open."""
    tables = (
        kind(source=one, sample=sample) if isinstance(one, str) else one
        for one in (value if isinstance(value, tuple) else (value,))
    )
    return tuple(
        one.model_copy(
            update={"name": one.name or set_name(one.source), "columns": one.columns or columns}
        )
        for one in tables
    )


class Model(Section):
    """The pretrained encoder, what of it is frozen and how it is computed."""

    name: Text = Field(
        description=(
            "hub id, folder, or package:NAME/SUBFOLDER for weights inside an installed package"
        )
    )
    revision: Text | None = Field(default=None, description="hub revision (branch, tag or commit)")
    sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="expected sha256 of the one file of weights, as published; others are refused",
    )
    freeze: tuple[Text, ...] = Field(
        default=(),
        strict=False,
        description=(
            'parts not trained: "embeddings", "encoder.layer.0-5", or a glob over parameters'
        ),
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto",
        description=(
            "arithmetic of the model; auto: bf16 on a GPU or CPU that multiplies in it, else fp32;"
            " fp16: on a GPU only"
        ),
    )
    span_loss: Literal["auto", "fused", "reference"] = Field(
        default="auto",
        description="how the loss is computed; auto: fused kernels on a GPU, else plain PyTorch",
    )
    dropout: Share | None = Field(
        default=None, description="dropout of hidden states; unset: the model's own"
    )
    attention_dropout: Share | None = Field(
        default=None, description="dropout of attention weights; unset: the model's own"
    )
    cache_frozen: bool = Field(
        default=False,
        description=(
            "compute the frozen embeddings and first layers once and keep their outputs; their"
            " dropout is off then, which changes training"
        ),
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description=(
            "compile the encoder's layers with torch.compile for training; auto: on a GPU, in jobs"
            " longer than about a minute"
        ),
    )
    packing: Literal["auto", "on", "off"] = Field(
        default="auto",
        description=(
            "compute a batch's windows end to end instead of padding them; auto: where the model"
            " and the device can"
        ),
    )
    fused_qkv: Literal["auto", "on", "off"] = Field(
        default="auto",
        description=(
            "compute an attention's query, key and value by one product; auto: on a GPU, where"
            " batches are packed"
        ),
    )


class Train(Section):
    """The optimisation."""

    epochs: Count = Field(description="passes over the training windows")
    batch_size: Count = Field(description="windows per optimiser step over all ranks together")
    micro_batch_size: Count | None = Field(
        default=None,
        description=(
            "windows per forward pass on one rank; unset: batch_size / ranks, no accumulation"
        ),
    )
    learning_rate: float = Field(gt=0, le=1, description="peak learning rate of AdamW")
    weight_decay: float = Field(
        default=0.0, ge=0, le=1, description="decoupled weight decay; never on biases and norms"
    )
    warmup: Share = Field(
        default=0.0, description="share of all steps in which the learning rate rises from 0"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear",
        description="how the learning rate goes on after warm-up (linear and cosine end at 0)",
    )
    adam_betas: tuple[Share, Share] = Field(
        default=(0.9, 0.999), strict=False, description="AdamW's moment decay rates"
    )
    adam_epsilon: float = Field(default=1e-8, gt=0, le=1e-2, description="AdamW's epsilon")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="gradients are scaled down to this norm; 0: never"
    )
    eval_every: Count = Field(
        default=1, description="epochs between evaluations; the last epoch is always evaluated"
    )
    log_every: Count = Field(default=10, description="optimiser steps between rows of train.csv")
    checkpoint_minutes: float = Field(
        default=10.0,
        gt=0,
        le=1440,
        description="minutes between checkpoints at most; each evaluation is followed by one too",
    )
    keep_checkpoints: Literal["none", "best", "all"] = Field(
        default="none",
        description=(
            "checkpoints that stay once the run has finished: none (model/ has the weights), best"
            " (of the best evaluation, whole) or all (the newest two and the best)"
        ),
    )
    timeout_minutes: float = Field(
        default=10.0,
        gt=0,
        le=1440,
        description="minutes without progress after which a rank counts as dead or stuck",
    )
    length_buckets: bool = Field(
        default=True, description="windows of similar length share a batch; false: plain shuffling"
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description=(
            "keep only each layer's input while training and compute the rest again in the backward"
            " pass: less memory, about a third more time, the same numbers"
        ),
    )
    deterministic: bool = Field(
        default=False,
        description="only algorithms that repeat their bits on the same hardware (slower on a GPU)",
    )

    @model_validator(mode="after")
    def _batch_divides(self) -> Train:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {micro};"
                f" micro_batch_size may be {one_of(divisors(self.batch_size))}"
            )
        return self


class Stop(Section):
    """Early stopping: end when a validation metric stops improving, and export the best epoch's
    weights."""

    metric: Literal[
        "f1", "exact_match", "span_accuracy", "start_accuracy", "end_accuracy", "loss"
    ] = Field(
        default="f1", description="the metric of eval.csv that decides; loss counts downwards"
    )
    on: SetName | None = Field(
        default=None, description="the validation set that decides; unset: the first"
    )
    patience: int = Field(
        default=2, ge=0, description="evaluations without improvement that are still tolerated"
    )
    min_delta: float = Field(
        default=0.0,
        ge=0,
        description="how much better counts as better (percent, or nats for loss)",
    )


class Zero(Section):
    """DeepSpeed ZeRO."""

    stage: int = Field(
        default=2,
        ge=0,
        le=3,
        description="what ranks share out: 0 nothing, 1 optimiser, 2 + gradients, 3 + weights",
    )
    optimizer: Literal["auto", "flat", "deepspeed"] = Field(
        default="auto",
        description=(
            "who takes the step in stages 1 and 2; flat: one flat gradient, no host sync;"
            " deepspeed: its own; auto: flat, unless [zero.deepspeed] asks for what it has not"
        ),
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "further keys of DeepSpeed's configuration: those that have an effect here, write no"
            " file and send nothing"
        ),
    )

    @field_validator("deepspeed")
    @classmethod
    def _is_json(cls, table: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(table, allow_nan=False)
            to_json(table)  # refuses what is nested too deep to be written into the run's job.toml
        except (TypeError, ValueError, RecursionError):
            raise ValueError(
                "DeepSpeed reads JSON, which has no dates, no inf or nan, and no such depth"
            ) from None
        return table


class Score(Section):
    """How logits become answers."""

    n_best: int = Field(default=20, ge=1, le=1000, description="candidate spans kept per question")
    max_answer_length: Count = Field(default=30, description="longest answer, in tokens")
    mode: Literal["exact", "run_qa"] = Field(
        default="exact",
        description=(
            "exact: best over all valid spans; run_qa: candidates as in Hugging Face's example"
            " script"
        ),
    )
    null_threshold: float = Field(
        default=0.0,
        description=(
            "SQuAD v2: answer nothing where the null score exceeds the best span's by more than"
            " this (logits)"
        ),
    )
    tune_for: Literal["f1", "exact_match"] = Field(
        default="f1", description="what the threshold tuned on data.tuning is to make best there"
    )
    batch_size: Count = Field(
        default=32, description="windows per forward pass on one rank during evaluation"
    )
    language: Language = Field(
        default="en",
        description=(
            "whose articles, punctuation and words decide whether an answer is right; en: as in"
            " SQuAD's script, else after MLQA's rules"
        ),
    )


class Probe(Section):
    """A question that the model answers before training and after every epoch."""

    question: Text = Field(description="the question")
    context: Text = Field(description="the text it is asked about")
    answer: Text | None = Field(
        default=None, description="the right answer, shown beside the model's"
    )


class Expect(Section):
    """What the finished run must reach; outside of it the command ends with exit code 78."""

    exact_match: Percent | None = Field(
        default=None, description="percent of questions answered exactly"
    )
    f1: Percent | None = Field(default=None, description="mean overlap with the answers, percent")
    span_accuracy: Percent | None = Field(
        default=None, description="percent of windows with start and end right"
    )
    loss: float | None = Field(default=None, ge=0, description="validation loss in nats")
    on: SetName | None = Field(
        default=None, description="the validation set that is meant; unset: the first"
    )
    tolerance: float = Field(
        default=0.5, ge=0, description="how far a metric may lie from its declared value"
    )

    @model_validator(mode="after")
    def _names_something(self) -> Expect:
        if self.exact_match is self.f1 is self.span_accuracy is self.loss is None:
            raise ValueError(
                "expects nothing; name at least one of exact_match, f1, span_accuracy, loss"
            )
        return self


class Track(Section):
    """Trackers that are told of a run beside its own tables. Keys and addresses of accounts come
    from the environment (WANDB_API_KEY, MLFLOW_TRACKING_TOKEN ...), never from a job."""

    tools: tuple[Literal["wandb", "tensorboard", "mlflow"], ...] = Field(
        default=(), strict=False, description="who is told of the run; empty: nobody"
    )
    mode: Literal["auto", "online", "offline"] = Field(
        default="auto",
        description=(
            "offline: into the run folder, nothing is sent; auto: offline in a SLURM job, else"
            " online"
        ),
    )
    project: Text = Field(
        default="spantune",
        description="project of W&B (which takes none of / \\ # ? % :), experiment of MLflow",
    )
    entity: Text | None = Field(
        default=None, description="W&B's team or user; unset: the account's own"
    )
    mlflow_uri: Text | None = Field(
        default=None,
        description=(
            "address of the MLflow server; unset: MLFLOW_TRACKING_URI, without it the run folder"
        ),
    )
    wait: float = Field(
        default=20.0,
        ge=0,
        le=3600,
        description="seconds that the end of a run waits for trackers, all together, at most",
    )


class Card(Section):
    """What only a person can say about the tuned model, for the model card."""

    license: Text | None = Field(
        default=None, description="licence of the tuned weights by the hub's name, such as mit"
    )
    language: Text | None = Field(
        default=None, description="language of the questions, such as en", max_length=12
    )


class Slurm(Section):
    """What `submit` asks SLURM for; keys that are unset come from the cluster's own defaults
    (~/.config/spantune/slurm.toml), which has the same keys."""

    partition: Annotated[str, allowed.SLURM_NAME] | None = Field(
        default=None, description="partition, or several separated by commas"
    )
    account: Annotated[str, allowed.SLURM_NAME] | None = Field(
        default=None, description="account that pays"
    )
    qos: Annotated[str, allowed.SLURM_NAME] | None = Field(
        default=None, description="quality of service"
    )
    nodes: Count = Field(default=1, description="nodes of a run")
    gpus_per_node: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="GPUs on each node, one rank each; 0 or unset: CPU ranks",
    )
    gpu_type: Annotated[str, allowed.MODULE] | None = Field(
        default=None, description="type of the GPUs as the cluster names it, e.g. a100"
    )
    ranks_per_node: Count | None = Field(
        default=None, description="ranks on each node; unset: gpus_per_node, or 1 without GPUs"
    )
    cpus_per_task: Count | None = Field(
        default=None, description="CPU cores of each rank, also its number of threads"
    )
    mem: Annotated[str, allowed.MEMORY] | None = Field(
        default=None, description="memory of each node, e.g. 64G; 0 is all of it"
    )
    time: Annotated[str, allowed.TIME] | None = Field(
        default=None, description="time limit, e.g. 4:00:00; a longer run goes on by requeue"
    )
    constraint: Annotated[str, allowed.FEATURES] | None = Field(
        default=None, description="features that the nodes must have, e.g. a100|h100"
    )
    exclude: Annotated[str, allowed.HOSTS] | None = Field(
        default=None, description="nodes not to use, e.g. gpu[01-04]"
    )
    mail_user: Annotated[str, allowed.MAIL] | None = Field(
        default=None, description="who gets mail about the job"
    )
    mail_type: tuple[
        Literal[
            "BEGIN", "END", "FAIL", "REQUEUE", "TIME_LIMIT", "TIME_LIMIT_90", "ARRAY_TASKS", "ALL"
        ],
        ...,
    ] = Field(
        default=("END", "FAIL"), strict=False, description="events to mail about, to mail_user"
    )  # fmt: skip
    signal_seconds: int = Field(
        default=180,
        ge=10,
        le=65_535,
        description=(
            "seconds before the time limit at which the run is told to save and end (SLURM may"
            " be up to 60 s early)"
        ),
    )
    requeue: bool = Field(
        default=True,
        description="go on by itself after an interruption, as long as it makes progress",
    )
    modules: tuple[Annotated[str, allowed.MODULE], ...] = Field(
        default=(), strict=False, description="environment modules to load, e.g. cuda/12.4"
    )
    venv: Annotated[str, allowed.FOLDER] | None = Field(
        default=None,
        description="virtual or conda environment; unset: that of the submitting command",
    )
    container: tuple[Annotated[str, allowed.WORD], ...] = Field(
        default=(),
        strict=False,
        description=(
            'what starts python in a container, e.g. ["apptainer", "exec", "--nv", "/x/qa.sif"]'
        ),
    )
    environment: dict[str, Annotated[str, allowed.WORD]] = Field(
        default_factory=dict,
        description="environment variables of the run; ~ and $NAME are those of the submitter",
    )
    sbatch: dict[str, Any] = Field(
        default_factory=dict,
        description="further options of sbatch without their dashes, from an allow-list",
    )

    @field_validator("environment")
    @classmethod
    def _environment_is_safe(cls, table: dict[str, str]) -> dict[str, str]:
        allowed.check_variables(table)
        return table

    @field_validator("sbatch")
    @classmethod
    def _options_are_allowed(cls, table: dict[str, Any]) -> dict[str, Any]:
        allowed.check_options(table)
        return table

    @model_validator(mode="after")
    def _fits_together(self) -> Slurm:
        allowed.check_exclusive(self.model_dump())
        gpus, ranks = self.gpus_per_node, self.ranks_per_node
        if gpus and ranks is not None and ranks != gpus:
            raise ValueError(
                f"ranks_per_node {ranks} on {gpus} GPUs a node: each GPU has one rank; leave"
                " ranks_per_node out"
            )
        if not gpus and self.gpu_type is not None:
            raise ValueError("gpu_type says which GPUs, gpus_per_node must say how many")
        limit = 0 if self.time is None else allowed.time_limit_seconds(self.time)
        if limit and self.signal_seconds >= limit:
            raise ValueError(
                f"signal_seconds {self.signal_seconds} must be less than the time limit of"
                f" {limit} s, or the run is told to end as soon as it starts"
            )
        return self

    @property
    def tasks_per_node(self) -> int:
        """Ranks that SLURM starts on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1


class Sweep(Section):
    """Several runs of one job, a trial for each combination of values; `run` works through them,
    `submit` makes them an array job."""

    over: dict[str, Any] = Field(
        default_factory=dict,
        description="a list of values for each key, e.g. train.learning_rate = [1e-5, 3e-5]",
    )
    mode: Literal["grid", "zip"] = Field(
        default="grid",
        description="grid: every combination; zip: first values together, second ones, ...",
    )
    seeds: tuple[int, ...] = Field(
        default=(),
        strict=False,
        description="each combination is run once with each seed; unset: with the job's seed",
    )
    max_parallel: Count | None = Field(
        default=None, description="trials that SLURM runs at the same time; unset: all it can"
    )

    @model_validator(mode="after")
    def _names_something(self) -> Sweep:
        if not self.over and not self.seeds:
            raise ValueError("varies nothing; give lists of values under [sweep.over], or seeds")
        return self


class Job(Section):
    """A fine-tuning job of spantune."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="names the folder of the job's runs: letters, digits, dot, dash, underscore",
    )
    seed: int = Field(
        default=42,
        ge=0,
        lt=2**32,
        description="decides sampling, shuffling, new weights and dropout",
    )
    data: Data
    model: Model
    train: Train
    stop: Stop | None = None
    zero: Zero = Field(default_factory=Zero)
    score: Score = Field(default_factory=Score)
    probe: tuple[Probe, ...] = Field(
        default=(), strict=False, description="questions answered as training goes on"
    )
    expect: Expect | None = None
    track: Track = Field(default_factory=Track)
    card: Card = Field(default_factory=Card)
    slurm: Slurm | None = None
    sweep: Sweep | None = None


@dataclass(frozen=True)
class BatchLayout:
    """How one optimiser step's windows are spread: batch_size = world * micro_batch_size *
    micro_batches."""

    world: int
    micro_batch_size: int
    micro_batches: int


def batch_layout(train: Train, world: int) -> BatchLayout:
    """Divide the global batch over the ranks.

    Raises:
        JobError: if it does not divide, listing what would.
    """
    if train.batch_size % world:
        fitting = [n for n in divisors(train.batch_size) if n <= max(world, 8)]
        below, above = train.batch_size // world * world, (train.batch_size // world + 1) * world
        sizes = one_of([size for size in (below, above) if size])
        raise JobError(
            [
                f"train.batch_size: {train.batch_size} windows per step do not divide over {world}"
                f" ranks; use {one_of(fitting)} ranks, or a batch_size of {sizes}"
            ]
        )
    per_rank = train.batch_size // world
    micro = train.micro_batch_size if train.micro_batch_size is not None else per_rank
    if per_rank % micro:
        raise JobError(
            [
                f"train.micro_batch_size: each of {world} ranks has {per_rank} windows per step,"
                f" not a multiple of {micro}; micro_batch_size may be {one_of(divisors(per_rank))}"
            ]
        )
    return BatchLayout(world, micro, per_rank // micro)


def missed_expectation(expect: Expect | None, result: Mapping[str, Any]) -> str | None:
    """Say by how much a run missed its [expect]; None where it is met or nothing is expected.

    Args:
        expect: the job's section.
        result: the run's `result.json`: "metrics", and under "sets" those of further sets.
    """
    if expect is None:
        return None
    further = result.get("sets", {})  # a run with one set has none
    metrics = further[expect.on]["metrics"] if expect.on in further else result["metrics"]
    missed = []
    for name in ("exact_match", "f1", "span_accuracy", "loss"):
        wanted = getattr(expect, name)
        if wanted is None:
            continue
        found = metrics[name]
        if not abs(found - wanted) <= expect.tolerance:
            missed.append(
                f"{name} is {found:.2f}, {abs(found - wanted):.2f} from the expected {wanted:.2f} "
                f"(tolerance {expect.tolerance:g})"
            )
    return "; ".join(missed) or None
