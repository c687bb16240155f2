"""What a recipe may say: frozen, strict pydantic models with every default in one place. Torch-free.

The learning contract is `model`, `tokenizer`, `data`, `train`, `optimizer` and `schedule`: what is learned. The rest is
the execution plan: where and how it runs. The plan may change at every restart; the contract may not.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)

from turbolm import units
from turbolm.units import Span

CONTRACT_SECTIONS = ("model", "tokenizer", "data", "train", "optimizer", "schedule")


def _number(value: object) -> object:
    """YAML 1.1 reads `3e-4` as text; a recipe means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"expected a number such as 3e-4, got {value!r}") from None
    return value


def _off_is_none(value: object) -> object:
    return None if value == "off" else value


def _list_is_tuple(value: object) -> object:
    """YAML writes a list; the frozen recipe holds a tuple."""
    return tuple(value) if isinstance(value, list) else value


def _text_is_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else _list_is_tuple(value)


def _whole(value: object) -> object:
    """A Literal of integers takes `true` for 1 and `2.0` for 2."""
    if isinstance(value, (bool, float)):
        raise ValueError(f"expected a whole number, got {value!r}")
    return value


_UNIT_TEXT = {"anyOf": [{"type": "number"}, {"type": "string"}]}

Count = Annotated[int, BeforeValidator(units.parse_count), WithJsonSchema(_UNIT_TEXT)]
Positive = Annotated[Count, Field(gt=0)]
Bytes = Annotated[int, BeforeValidator(units.parse_bytes), WithJsonSchema(_UNIT_TEXT)]
Share = Annotated[float, BeforeValidator(units.parse_share), WithJsonSchema(_UNIT_TEXT)]
Seconds = Annotated[int, BeforeValidator(units.parse_duration), WithJsonSchema(_UNIT_TEXT)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PositiveNumber = Annotated[Number, Field(gt=0)]
Beta = Annotated[Number, Field(ge=0, lt=1)]


def _positive_span(value: Span) -> Span:
    if value.amount <= 0:
        raise ValueError("expected more than 0")
    return value


TrainingSpan = Annotated[
    Any, BeforeValidator(Span.parse), PlainSerializer(str, return_type=str), WithJsonSchema(_UNIT_TEXT)
]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Paths = Annotated[tuple[Text, ...], BeforeValidator(_text_is_tuple), Field(min_length=1)]


class Section(BaseModel):
    """Base of every part of a recipe: frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# ---------------------------------------------------------------------------------------------- learning contract


class Model(Section):
    """Which model, from a Hugging Face configuration or from a local folder of weights."""

    config: dict[str, Any] | None = Field(None, description="Hugging Face configuration with its `model_type`")
    pretrained: Text | None = Field(None, description="local folder in the Hugging Face layout to start from")
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0, description="every dropout of the model, unless `config` names one itself"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if (self.config is None) == (self.pretrained is None):
            raise ValueError("expected exactly one of `config` (a mapping with model_type) and `pretrained` (a path)")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("expected `config` to name its Hugging Face `model_type`, such as llama or gpt2")
        return self


class TrainTokenizer(Section):
    """A byte-level BPE tokenizer trained on the recipe's own training documents."""

    vocab_size: Annotated[Positive, Field(ge=257)] = 4096
    sample_bytes: Bytes = Field(64 * 10**6, description="how much text of the sources it is trained on")


class Tokenizer(Section):
    """Trained here, or loaded from a folder (Hugging Face layout) or a tokenizer.json."""

    train: TrainTokenizer | None = None
    path: Text | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Tokenizer:
        if (self.train is None) == (self.path is None):
            raise ValueError("expected exactly one of `train` (settings) and `path` (a folder or tokenizer.json)")
        return self


class StdlibSource(Section):
    """The source files of the running Python's standard library: always there, real, long-tailed."""

    type: Literal["stdlib"]


class TextSource(Section):
    """Plain UTF-8 text files; each file is one document."""

    type: Literal["text"]
    path: Paths = Field(description="a path, a glob (`**` allowed) or a list of them")


class JsonlSource(Section):
    """JSON lines (.jsonl, .jsonl.gz, .jsonl.zst); each line is one document."""

    type: Literal["jsonl"]
    path: Paths = Field(description="a path, a glob (`**` allowed) or a list of them")
    field: Text = "text"


class ParquetSource(Section):
    """Parquet files; each row is one document."""

    type: Literal["parquet"]
    path: Paths = Field(description="a path, a glob (`**` allowed) or a list of them")
    field: Text = "text"


class DatasetsSource(Section):
    """A data set of the `datasets` library, by hub name or local path."""

    type: Literal["datasets"]
    path: Text
    name: Text | None = None
    split: Text = "train"
    revision: Text | None = None
    streaming: bool = False
    field: Text = "text"


Source = Annotated[
    StdlibSource | TextSource | JsonlSource | ParquetSource | DatasetsSource, Field(discriminator="type")
]


class Data(Section):
    """What is read and how documents become sequences."""

    sources: Annotated[tuple[Source, ...], BeforeValidator(_list_is_tuple), Field(min_length=1)] = (
        StdlibSource(type="stdlib"),
    )
    seq_len: Annotated[Positive, Field(ge=8)]
    packing: Literal["best_fit", "single"] = Field(
        "best_fit", description="best_fit: several documents a row, kept apart; single: one document a row, padded"
    )
    validation: Annotated[Share, Field(lt=1)] = Field(
        0.01, description="share of documents held out by content hash, so that no text is on both sides"
    )


class Train(Section):
    """How long, how much at once, and the numerics that change the result."""

    budget: Positive = Field(description="tokens to train on (bins x seq_len of all steps)")
    global_batch: Positive = Field(description="tokens of one optimizer step over all processes")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the processor computes in it, else fp32; settled at the first start"
    )
    max_grad_norm: Annotated[PositiveNumber | None, BeforeValidator(_off_is_none)] = 1.0
    max_grad_value: Annotated[PositiveNumber | None, BeforeValidator(_off_is_none)] = None

    @model_validator(mode="after")
    def _one_clip(self) -> Train:
        if self.max_grad_norm is not None and self.max_grad_value is not None:
            raise ValueError("expected at most one of max_grad_norm and max_grad_value; set the other to `off`")
        return self


class Optimizer(Section):
    """AdamW. Weight decay acts on matrices only: not on norms, biases and embeddings."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveNumber = 3e-4
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_list_is_tuple)] = (0.9, 0.95)
    eps: PositiveNumber = 1e-8
    weight_decay: Annotated[Number, Field(ge=0)] = 0.1


class Schedule(Section):
    """The learning rate over the tokens seen."""

    name: Literal["constant", "linear", "cosine", "sqrt", "wsd"] = "cosine"
    warmup: TrainingSpan = Span(0.02, "share")
    decay: TrainingSpan = Field(Span(0.2, "share"), description="wsd only: the last part of the budget")
    decay_shape: Literal["linear", "cosine", "sqrt"] = Field("linear", description="wsd only")
    min_lr_ratio: Annotated[Number, Field(ge=0, le=1)] = 0.1
    on_extend: Literal["rewarm", "stretch", "refuse"] = Field(
        "rewarm",
        description="when a finished run gets a larger budget: warm up again and run the same shape over the added "
        "tokens; follow the larger budget's curve from here; or refuse",
    )


# ------------------------------------------------------------------------------------------------- execution plan


class Cluster(Section):
    """Which machines."""

    num_nodes: Annotated[int, Field(ge=1)] = 1
    processes_per_node: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="auto: one for each GPU; without a GPU two, or one on a single core"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Execution(Section):
    """How the contract is carried out. Nothing here changes what is learned."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_whole)] = 2
    offload_optimizer: bool = False
    micro_batch: Positive | Literal["auto"] = Field(
        "auto", description="tokens of one forward on one process; auto: a process's share, 16k tokens at most"
    )
    activation_checkpointing: Literal["none", "full"] | Annotated[int, Field(ge=1)] = Field(
        "none", description="none, full, or n: every n-th layer is recomputed in the backward pass"
    )
    attention: Literal["auto", "eager", "sdpa", "flex", "flash", "varlen"] = "auto"
    adam_kernel: Literal["auto", "torch", "deepspeed"] = Field(
        "auto", description="auto: DeepSpeed's CPUAdam when offloaded, else torch's fused kernel"
    )
    process_group_timeout: Annotated[Seconds, Field(gt=0)] = 1800
    threads_per_process: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    prepare_workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    cache_dir: Text = ".cache/turbolm"
    runs_dir: Text = "runs"


class Evaluation(Section):
    """Loss and bits per byte on the held-out documents."""

    every: Annotated[TrainingSpan, AfterValidator(_positive_span)] = Span(0.1, "share")
    tokens: Positive = Field(1_000_000, description="at most this many held-out tokens")


class Checkpoint(Section):
    """When the state is saved. A stopping run and a finished one always save."""

    every: Annotated[TrainingSpan, AfterValidator(_positive_span)] = Span(0.25, "share")
    keep_last: Annotated[int, Field(ge=1)] = 3


class Logging(Section):
    """What is shown while it runs; metrics.jsonl always has every step."""

    every_steps: Annotated[int, Field(ge=1)] = 10
    sample_tokens: Annotated[int, Field(ge=0)] = Field(64, description="length of the sample generated at the end")


class Recipe(Section):
    """A whole recipe."""

    name: Name
    model: Model
    tokenizer: Tokenizer
    data: Data
    train: Train
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    cluster: Cluster = Cluster()
    execution: Execution = Execution()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
