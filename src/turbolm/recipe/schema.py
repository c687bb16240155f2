"""The schema of a recipe: frozen, strict pydantic models with every default. Torch-free.

The learning contract is `model`, `tokenizer`, `data`, `train`, `optimizer`, `schedule` and `anomalies`: what is
learned. The rest is the execution plan: where and how it runs. The plan may change at every start. The contract may
not, except for `anomalies`, which applies from then on.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from turbolm.recipe.data import Data
from turbolm.recipe.evaluation import Evaluation
from turbolm.recipe.execution import Checkpoint, Cluster, Execution, Export, Logging
from turbolm.recipe.fields import (
    Before,
    Bytes,
    Limit,
    Name,
    Number,
    PathText,
    Positive,
    PositiveNumber,
    Section,
    StagedTokens,
    Text,
    TrainingSpan,
    positive_span,
)
from turbolm.recipe.model_config import lay_over, read_config_file
from turbolm.recipe.optimizers import AdamW, AnyOptimizer
from turbolm.recipe.rope import RopeParameters
from turbolm.recipe.schedules import AnySchedule, Cosine
from turbolm.units import Span

RENAMED = {"train.restarts": "random_restarts"}
"""Renamed keys of a section: the dotted old key, and the new name of its last part. Recipes and contracts may use
either; fingerprints use the old one."""
RENAMED_CHOICES = {"schedule.name": {"restarts": "warm_restarts"}}
"""The same for values that choose a class: the dotted key, and the new value of each old one."""
CONTRACT_SECTIONS = ("model", "tokenizer", "data", "train", "optimizer", "schedule", "anomalies")


_CONFIG_FILE = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "object"}, {"type": "null"}]}
ConfigFile = Annotated[dict[str, Any] | None, BeforeValidator(read_config_file), WithJsonSchema(_CONFIG_FILE)]


class Model(Section):
    """Which model, from a Hugging Face configuration or from published weights."""

    config: dict[str, Any] | None = Field(None, description="Hugging Face configuration with its `model_type`")
    config_file: Annotated[ConfigFile, Before(None)] = Field(
        None,
        description="path of a published config.json or its folder, or its content; `config` overrides it, and the "
        "contract holds the result under `config`",
    )
    pretrained: PathText | None = Field(
        None, description="local folder in the Hugging Face layout to start from, or a model's name on the hub"
    )
    revision: Annotated[Text | None, Before(None)] = Field(
        None, description="with a hub name in `pretrained`: its branch, tag or commit; resolved at the first start"
    )
    resize_embeddings: Annotated[bool, Before(False)] = Field(
        False, description="with `pretrained`: add rows (the mean of the others) for a tokenizer with more tokens"
    )
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0, description="every dropout of the model, unless `config` names one, or `config_file` one that is not 0"
    )
    router_noise: Annotated[Annotated[Number, Field(ge=0)] | Literal["config"], Before("config")] = Field(
        0.0, description="noise on the routers of experts in training, unless `config` names one; config: the type's"
    )
    rope_factors: Annotated[Literal["by_length", "short", "long"], Before("by_length")] = Field(
        "by_length",
        description="for rotary positions whose factors depend on the longest sequence of a batch (longrope, dynamic): "
        "short or long fixes them, which packing needs",
    )
    rope_parameters: Annotated[RopeParameters | None, Before(None)] = Field(
        None, description="with `pretrained`: rotary positions for a longer context, which replace the checkpoint's"
    )
    init: Literal["default", "depth_scaled", "zero_outputs"] = Field(
        "default",
        description="initial weights: as the model type draws them, or with those that write to the residual stream "
        "smaller by sqrt(2 x layers), as in GPT-2, or zero, so that every layer begins as the identity",
    )
    pad_vocab_to_multiple: Annotated[int, Field(ge=1)] = Field(
        1,
        description="round up the rows of embedding and head to a GPU's tiles, such as 128; added tokens never occur",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if (self.config is None and self.config_file is None) == (self.pretrained is None):
            raise ValueError(
                "expected either `config` (a mapping with model_type) or `config_file` (a path), or else `pretrained` "
                "(a path)"
            )
        if self.config is not None and self.config_file is None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("expected `config` to name its Hugging Face `model_type`, such as llama or gpt2")
        if self.revision is not None and self.pretrained is None:
            raise ValueError("expected no `revision` without `pretrained`: only a hub name has revisions")
        if self.pretrained is not None and (self.init, self.pad_vocab_to_multiple) != ("default", 1):
            raise ValueError(
                "expected neither `init` nor `pad_vocab_to_multiple` with `pretrained`: its weights are given"
            )
        if self.rope_parameters is not None and self.pretrained is None:
            raise ValueError("expected `rope_parameters` of a new model under `config`")
        return self

    @property
    def full_config(self) -> dict[str, Any] | None:
        """Return the configuration to train: `config` merged over `config_file`; None with `pretrained`."""
        return lay_over(self.config_file, self.config)


class TrainTokenizer(Section):
    """A byte-level BPE tokenizer trained on the recipe's own training documents."""

    vocab_size: Annotated[Positive, Field(ge=257)] = Field(4096, description="vocabulary size, including all bytes")
    sample_bytes: Bytes = Field(64 * 10**6, description="amount of the sources' text that it is trained on")


class Tokenizer(Section):
    """Train a tokenizer, or load it from a folder (Hugging Face layout) or a tokenizer.json."""

    train: TrainTokenizer | None = Field(None, description="settings of a tokenizer to train")
    path: PathText | None = Field(
        None, description="a local folder in the Hugging Face layout, a tokenizer.json, or a name on the hub"
    )
    revision: Annotated[Text | None, Before(None)] = Field(
        None, description="with a hub name in `path`: its branch, tag or commit; resolved at the first start"
    )
    special_tokens_in_text: Annotated[Literal["split", "keep"], Before("split")] = Field(
        "split",
        description="special and added tokens that a document spells out; split: read as ordinary text; keep: as that "
        "token",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Tokenizer:
        if (self.train is None) == (self.path is None):
            raise ValueError("expected exactly one of `train` (settings) and `path` (a folder or tokenizer.json)")
        if self.revision is not None and self.path is None:
            raise ValueError("expected no `revision` without `path`: only a hub name has revisions")
        return self


class BatchRamp(Section):
    """A batch that grows to train.global_batch: by hand with `at`, or in even steps from `start`."""

    at: StagedTokens | None = Field(None, description="tokens per step from each point on, such as {0%: 64k, 10%: 1M}")
    start: Positive | None = Field(None, description="tokens of the first steps")
    over: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.1, "share"), description="where train.global_batch is reached, with `start`"
    )
    num_levels: Annotated[int, Field(ge=2, le=1000)] = Field(4, description="number of batch sizes, with `start`")
    lr_scaling: Literal["none", "sqrt", "linear"] = Field(
        "sqrt", description="the learning rate is scaled by this function of the batch's share of train.global_batch"
    )

    @model_validator(mode="after")
    def _one_form(self) -> BatchRamp:
        if (self.at is None) == (self.start is None):
            raise ValueError("expected exactly one of `at` (a mapping) and `start` (tokens)")
        return self


class RandomRestarts(Section):
    """Train several initial weights for a few steps, and continue with the best (arXiv 2002.06305)."""

    seeds: Annotated[int, Field(ge=2, le=1000)] = Field(4, description="number of initial weights to try")
    over: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.02, "share"),
        description="tokens, steps or a share of the budget to train each; compared by the training loss of its "
        "last quarter",
    )


class Train(Section):
    """Budget, batch, and the numerics that change the result."""

    budget: Positive = Field(description="tokens to train on (sequences x seq_len, over all steps)")
    global_batch: Positive = Field(description="tokens of one optimizer step over all processes")
    batch_ramp: BatchRamp | None = Field(None, description="smaller batches at the start of the run")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="for initial weights, data order and dropout")
    random_restarts: Annotated[RandomRestarts | None, Before(None)] = Field(
        None, description="choose among several initial weights first; the others' tokens come on top of the budget"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 if the hardware supports it, else fp32; resolved at the first start"
    )
    fp8: Literal["off", "tensorwise", "rowwise"] = Field(
        "off",
        description="with bf16, hidden layers' matrix products in 8 bits, scaled by tensor or by row (torchao; Hopper "
        "GPUs and later)",
    )
    z_loss: Annotated[Number, Field(ge=0)] = Field(
        0.0,
        description="weight of the squared log of the softmax's denominator, such as 1e-4 (PaLM); keeps logits small",
    )
    router_aux_loss: Annotated[Annotated[Number, Field(ge=0)] | Literal["config", "off"], Before("off")] = Field(
        "config",
        description="weight of the loss that spreads tokens over a mixture's experts; config: the model's own "
        "coefficient",
    )
    router_bias_update: Annotated[Annotated[Number, Field(ge=0)], Before(0.0)] = Field(
        0.0,
        description="after each step, the bias that chooses an expert moves by this much towards an even load (arXiv "
        "2408.15664), such as 1e-3; for types with such a bias; 0: it stays as it is",
    )
    max_grad_norm: Limit = Field(1.0, description="gradients are scaled down to this global norm; `off` for no limit")
    max_grad_value: Limit = Field(
        None, description="each gradient element is clamped to this size; not together with max_grad_norm"
    )

    @model_validator(mode="after")
    def _one_clip(self) -> Train:
        if self.max_grad_norm is not None and self.max_grad_value is not None:
            raise ValueError("expected at most one of max_grad_norm and max_grad_value; set the other to `off`")
        return self


class Anomalies(Section):
    """What to do when a loss or gradient is not finite, or far above recent ones; such a step updates no weights."""

    non_finite: Literal["skip", "rollback", "stop"] = Field(
        "skip",
        description="a NaN or infinite loss or gradient: skip the update; or roll back to the last good checkpoint and "
        "skip the batches since; or stop",
    )
    spikes: Literal["off", "skip", "rollback"] = Field(
        "off", description="a loss or gradient norm far above recent ones: train on it, skip the update, or roll back"
    )
    threshold: PositiveNumber = Field(
        6.0, description="a spike is this many standard deviations (from the median deviation) above the median"
    )
    window: Annotated[int, Field(ge=8)] = Field(
        128, description="recent steps that spikes are measured against; before that many steps, nothing is a spike"
    )
    max_in_a_row: Annotated[int, Field(ge=0)] = Field(
        3, description="consecutive updates to skip; one more rolls back to the last good checkpoint"
    )
    max_rollbacks: Annotated[int, Field(ge=0)] = Field(2, description="rollbacks before the run stops instead")


class Recipe(Section):
    """A recipe."""

    name: Name = Field(description="name of the run and its directory")
    model: Model
    tokenizer: Tokenizer
    data: Data
    train: Train
    optimizer: AnyOptimizer = Field(AdamW(), description="how gradients become updates; default: AdamW")
    schedule: AnySchedule = Field(Cosine(), description="the learning rate over the tokens seen; default: cosine")
    anomalies: Annotated[Anomalies, Before(Anomalies())] = Anomalies()
    cluster: Cluster = Cluster()
    execution: Execution = Execution()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    export: Export = Export()

    @property
    def is_evaluated(self) -> bool:
        """Return whether there is anything to evaluate the run on."""
        return bool(self.data.validation or self.evaluation.sets or self.evaluation.tasks)

    @property
    def kept_bytes(self) -> float:
        """Return the bytes per parameter kept beside the weights: the optimizer's state, and a mean of the weights."""
        return self.optimizer.kept_bytes + (0 if self.evaluation.weight_average is None else 4)
