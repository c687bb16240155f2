"""What a recipe may say: frozen, strict pydantic models with every default in one place. Torch-free.

The learning contract is `model`, `tokenizer`, `data`, `train`, `optimizer`, `schedule` and `anomalies`: what is
learned. The rest is the execution plan: where and how it runs. The plan may change at every restart; the contract may
not, but for `anomalies`, which says what is done from now on.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    WithJsonSchema,
    model_validator,
)

from turbolm import units
from turbolm.recipe.fields import (
    UNIT_TEXT,
    Beta,
    Number,
    Positive,
    PositiveNumber,
    Section,
    StagedTokens,
    StagedWeight,
    TrainingSpan,
    list_is_tuple,
    positive_span,
)
from turbolm.recipe.optimizers import AdamW, Optimizer
from turbolm.redaction import is_secret_name
from turbolm.units import Span

CONTRACT_SECTIONS = ("model", "tokenizer", "data", "train", "optimizer", "schedule", "anomalies")


def _off_is_none(value: object) -> object:
    return None if value == "off" else value


def _text_is_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else list_is_tuple(value)


def _whole(value: object) -> object:
    """A Literal of integers takes `true` for 1 and `2.0` for 2."""
    if isinstance(value, (bool, float)):
        raise ValueError(f"expected a whole number, got {value!r}")
    return value


Bytes = Annotated[int, BeforeValidator(units.parse_bytes), WithJsonSchema(UNIT_TEXT)]
Share = Annotated[float, BeforeValidator(units.parse_share), WithJsonSchema(UNIT_TEXT)]
Seconds = Annotated[int, BeforeValidator(units.parse_duration), WithJsonSchema(UNIT_TEXT)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
_PATHS = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
Paths = Annotated[tuple[Text, ...], BeforeValidator(_text_is_tuple), Field(min_length=1), WithJsonSchema(_PATHS)]
_LIMIT = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "off"}, {"type": "null"}]}
Limit = Annotated[PositiveNumber | None, BeforeValidator(_off_is_none), WithJsonSchema(_LIMIT)]
_TIME_LIMIT = {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "null"}]}
TimeLimit = Annotated[
    Annotated[Seconds, Field(gt=0)] | None, BeforeValidator(_off_is_none), WithJsonSchema(_TIME_LIMIT)
]


def _slurm_value(value: str) -> str:
    """Slurm's own grammar for lists and expressions needs no blank, quote or backslash: none of it means a shell."""
    if not re.fullmatch(r"[\w\[(~!@%/][\w.,:+*%@=/\[\]()|&!~^?{}-]*", value, re.ASCII):
        raise ValueError(
            "expected letters, digits and any of _.,:+*%@=/[]()|&!~^?{}- without blanks and quotes, "
            f"not starting with '-', got {value!r}"
        )
    return value


def _slurm_memory(value: str) -> str:
    if not re.fullmatch(r"[0-9]+[KMGT]?", value, re.ASCII):
        raise ValueError(f"expected a size as Slurm writes it, such as 64G, got {value!r}")
    return value


def _argument(value: str) -> str:
    """What becomes an argument of a program must not look like one of its options."""
    if value.startswith("-"):
        raise ValueError(f"expected text that does not start with '-', got {value!r}")
    return value


def _mount(value: str) -> str:
    if "," in value:
        raise ValueError(f"expected one mount such as /data:/data, without commas, got {value!r}")
    return value


RECIPES_ARE_COPIED = (
    "a recipe is copied to the run directory, the job's script and the model card; set it in the environment, which "
    "`turbolm train` and sbatch pass on, or read it from a file"
)


def _environment_name(value: str) -> str:
    if is_secret_name(value):
        raise ValueError(f"{value} looks like a secret, but {RECIPES_ARE_COPIED}")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise ValueError(f"expected the name of an environment variable, got {value!r}")
    if value.startswith(("SLURM_", "BASH_FUNC_")) or value in ("BASH_ENV", "ENV", "SHELLOPTS", "BASHOPTS"):
        raise ValueError(f"expected a variable that neither Slurm nor the shell sets itself, got {value!r}")
    return value


SlurmValue = Annotated[Text, AfterValidator(_slurm_value)]
SlurmMemory = Annotated[Text, AfterValidator(_slurm_memory)]
Argument = Annotated[Text, AfterValidator(_argument)]
Mount = Annotated[Argument, AfterValidator(_mount)]
EnvironmentName = Annotated[Text, AfterValidator(_environment_name)]


GpuName = Literal[
    "A10-24GB", "A10G-24GB", "A100-40GB", "A100-80GB", "B200-180GB", "H100-80GB", "H200-141GB", "L4-24GB", "L40S-48GB",
    "RTX4090-24GB", "V100-16GB", "V100-32GB",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- learning contract


class Model(Section):
    """Which model, from a Hugging Face configuration or from a local folder of weights."""

    config: dict[str, Any] | None = Field(None, description="Hugging Face configuration with its `model_type`")
    pretrained: Text | None = Field(None, description="local folder in the Hugging Face layout to start from")
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0, description="every dropout of the model, unless `config` names one itself"
    )
    init: Literal["default", "depth_scaled"] = Field(
        "default",
        description="initial weights: as the model type draws them, or those that are added to the residual stream "
        "smaller by sqrt(2 x layers), as in GPT-2",
    )
    pad_vocab_to_multiple: Annotated[int, Field(ge=1)] = Field(
        1,
        description="rows of embedding and head, such as 64 or 128: whole tiles of a GPU; the added tokens never occur",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if (self.config is None) == (self.pretrained is None):
            raise ValueError("expected exactly one of `config` (a mapping with model_type) and `pretrained` (a path)")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("expected `config` to name its Hugging Face `model_type`, such as llama or gpt2")
        if self.pretrained is not None and (self.init, self.pad_vocab_to_multiple) != ("default", 1):
            raise ValueError(
                "expected neither `init` nor `pad_vocab_to_multiple` beside `pretrained`: its weights are given"
            )
        return self


class TrainTokenizer(Section):
    """A byte-level BPE tokenizer trained on the recipe's own training documents."""

    vocab_size: Annotated[Positive, Field(ge=257)] = Field(4096, description="tokens it ends up with, bytes included")
    sample_bytes: Bytes = Field(64 * 10**6, description="how much text of the sources it is trained on")


class Tokenizer(Section):
    """Trained here, or loaded from a folder (Hugging Face layout) or a tokenizer.json."""

    train: TrainTokenizer | None = Field(None, description="settings of a tokenizer to train")
    path: Text | None = Field(None, description="a local folder in the Hugging Face layout, or a tokenizer.json")

    @model_validator(mode="after")
    def _one_origin(self) -> Tokenizer:
        if (self.train is None) == (self.path is None):
            raise ValueError("expected exactly one of `train` (settings) and `path` (a folder or tokenizer.json)")
        return self


class Weighted(Section):
    """What a mixture needs to know of a source."""

    label: Name | None = Field(None, description="what reports call this source; default: its type and number")
    weight: StagedWeight | None = Field(
        None,
        description="share of the tokens, relative to the other sources; a mapping such as {0%: 3, 80%: 1} changes it "
        "as the budget is used; without weights every document is read once an epoch",
    )


class StdlibSource(Weighted):
    """The source files of the running Python's standard library: always there, real, long-tailed."""

    type: Literal["stdlib"] = Field(description="which kind of source this is")


class TextSource(Weighted):
    """Plain UTF-8 text files; each file is one document."""

    type: Literal["text"] = Field(description="which kind of source this is")
    path: Paths = Field(description="a path, a glob (`**` allowed) or a list of them")


class JsonlSource(Weighted):
    """JSON lines (.jsonl, .jsonl.gz, .jsonl.zst); each line is one document."""

    type: Literal["jsonl"] = Field(description="which kind of source this is")
    path: Paths = Field(description="a path, a glob (`**` allowed) or a list of them")
    field: Text = Field("text", description="the key or column that holds the document's text")


class ParquetSource(Weighted):
    """Parquet files; each row is one document."""

    type: Literal["parquet"] = Field(description="which kind of source this is")
    path: Paths = Field(description="a path, a glob (`**` allowed) or a list of them")
    field: Text = Field("text", description="the key or column that holds the document's text")


class DatasetsSource(Weighted):
    """A data set of the `datasets` library, by hub name or local path."""

    type: Literal["datasets"] = Field(description="which kind of source this is")
    path: Text = Field(description="name on the hub, or a local path")
    name: Text | None = Field(None, description="configuration of the data set, where it has several")
    split: Text = Field("train", description="which split is read")
    revision: Text | None = Field(None, description="branch, tag or commit on the hub")
    streaming: bool = Field(False, description="read while downloading, without a local copy")
    field: Text = Field("text", description="the key or column that holds the document's text")


Source = Annotated[
    StdlibSource | TextSource | JsonlSource | ParquetSource | DatasetsSource, Field(discriminator="type")
]


class LengthStages(Section):
    """Row lengths by hand."""

    name: Literal["stages"] = Field(description="which schedule this is")
    at: StagedTokens = Field(description="row length from each place on, such as {0%: 128, 30%: 512, 60%: 2048}")


class LengthGrowth(Section):
    """Rows that grow from `start` to data.seq_len; batches keep their number of tokens (arXiv 2108.06084)."""

    name: Literal["growth"] = Field(description="which schedule this is")
    start: Annotated[Positive, Field(ge=8)] = Field(128, description="the first row length")
    over: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.5, "share"), description="where data.seq_len is reached"
    )
    shape: Literal["linear", "exponential"] = Field(
        "exponential", description="linear: short rows are left early; exponential: as long at each length"
    )
    num_lengths: Annotated[int, Field(ge=2, le=100)] = Field(5, description="different lengths, at most")
    remix: Annotated[Share, Field(lt=1)] = Field(
        0.0, description="share of the tokens after the growth that use the shorter lengths again, now and then"
    )
    remix_every: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.05, "share"), description="how often short rows come back, with `remix`"
    )


class LengthBuckets(Section):
    """Documents are split into powers of two and trained each at its own length, without packing (arXiv 2405.13226)."""

    name: Literal["buckets"] = Field(description="which schedule this is")
    smallest: Annotated[Positive, Field(ge=8)] = Field(64, description="shorter pieces are packed into rows of this")
    order: Literal["grow", "shuffled"] = Field(
        "grow", description="grow: each cycle over the lengths begins with mostly short rows; shuffled: no order"
    )
    cycles: Annotated[int, Field(ge=1, le=1000)] = Field(
        8, description="cycles over the lengths in the budget, with `grow`"
    )


LengthSchedule = Annotated[LengthStages | LengthGrowth | LengthBuckets, Field(discriminator="name")]


class Data(Section):
    """What is read and how documents become sequences."""

    sources: Annotated[tuple[Source, ...], BeforeValidator(list_is_tuple), Field(min_length=1)] = Field(
        (StdlibSource(type="stdlib"),), description="where the documents come from, read in this order"
    )
    seq_len: Annotated[Positive, Field(ge=8, le=2**24)] = Field(
        description="tokens of one sequence, the model's context"
    )
    packing: Literal["best_fit", "concat", "single"] = Field(
        "best_fit",
        description="best_fit: several documents a row, kept apart; concat: the same, cut wherever a row is full; "
        "single: one document a row, padded",
    )
    grouping: Literal["batch", "window"] = Field(
        "batch",
        description="window: rows of similar attention cost share a batch, for few rows a process; batch: they do not",
    )
    length_schedule: LengthSchedule | None = Field(None, description="none: every row has seq_len tokens")
    validation: Annotated[Share, Field(lt=1)] = Field(
        0.01, description="share of documents held out by content hash, so that no text is on both sides"
    )
    deduplicate: Literal["none", "exact"] = Field(
        "none", description="exact: of documents with the same text only the first is kept"
    )

    @model_validator(mode="after")
    def _coherent(self) -> Data:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("expected a `weight` for every one of `sources`, or for none")
        labels = [source.label for source in self.sources if source.label is not None]
        if len(set(labels)) < len(labels):
            raise ValueError("expected another `label` for each of `sources`")
        return self


class BatchRamp(Section):
    """A batch that grows to train.global_batch: by hand with `at`, or in even steps from `start`."""

    at: StagedTokens | None = Field(None, description="tokens of a step from each place on, such as {0%: 64k, 10%: 1M}")
    start: Positive | None = Field(None, description="tokens of the first steps")
    over: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.1, "share"), description="where train.global_batch is reached, with `start`"
    )
    num_levels: Annotated[int, Field(ge=2, le=1000)] = Field(4, description="different batches, with `start`")
    lr_scaling: Literal["none", "sqrt", "linear"] = Field(
        "sqrt", description="the learning rate is scaled by this power of the batch's share of train.global_batch"
    )

    @model_validator(mode="after")
    def _one_form(self) -> BatchRamp:
        if (self.at is None) == (self.start is None):
            raise ValueError("expected exactly one of `at` (a mapping) and `start` (tokens)")
        return self


class Restarts(Section):
    """Several initial weights are trained for a few steps, and the best is trained on (arXiv 2002.06305)."""

    seeds: Annotated[int, Field(ge=2, le=1000)] = Field(4, description="different initial weights that are tried")
    over: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.02, "share"),
        description="tokens, steps or a share of the budget that each is tried for; judged by the training loss of its "
        "last quarter",
    )


class Train(Section):
    """How long, how much at once, and the numerics that change the result."""

    budget: Positive = Field(description="tokens to train on (bins x seq_len of all steps)")
    global_batch: Positive = Field(description="tokens of one optimizer step over all processes")
    batch_ramp: BatchRamp | None = Field(None, description="smaller batches at the start of the run")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of initial weights, data order and dropout")
    restarts: Restarts | None = Field(
        None, description="choose among several initial weights first; those not chosen cost tokens beside the budget"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the processor computes in it, else fp32; settled at the first start"
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
    max_grad_norm: Limit = Field(1.0, description="gradients are scaled down to this global norm; `off` for no limit")
    max_grad_value: Limit = Field(
        None, description="each gradient element is clamped to this size; not together with max_grad_norm"
    )

    @model_validator(mode="after")
    def _one_clip(self) -> Train:
        if self.max_grad_norm is not None and self.max_grad_value is not None:
            raise ValueError("expected at most one of max_grad_norm and max_grad_value; set the other to `off`")
        return self


class Ramp(Section):
    """A value that goes from `start` to `end` and stays there."""

    start: Annotated[Number, Field(ge=0)] = Field(description="at the start of the run")
    end: Annotated[Number, Field(ge=0)] = Field(description="at the end of `over`, and from there on")
    over: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(1.0, "share"), description="tokens, steps or a share of the budget that it takes"
    )
    shape: Literal["linear", "cosine"] = Field("linear", description="cosine: slow at both ends")


class MomentumRamp(Ramp):
    """A momentum that goes from `start` to `end` and stays there."""

    start: Beta = Field(description="at the start of the run")
    end: Beta = Field(description="at the end of `over`, and from there on")


class Schedule(Section):
    """The learning rate, and on demand weight decay and momentum, over the tokens seen."""

    name: Literal["constant", "linear", "cosine", "sqrt", "inverse_sqrt", "wsd", "restarts"] = Field(
        "cosine",
        description="shape after the warmup; wsd: warmup, stable, decay; inverse_sqrt: falls with the root of the "
        "tokens; restarts: a cosine again and again",
    )
    warmup: TrainingSpan = Field(Span(0.02, "share"), description="rise from 0 to the peak")
    decay: TrainingSpan = Field(Span(0.2, "share"), description="wsd only: the last part of the budget")
    decay_shape: Literal["linear", "cosine", "sqrt"] = Field("linear", description="wsd only")
    min_lr_ratio: Annotated[Number, Field(ge=0, le=1)] = Field(0.1, description="where it ends, as a share of the peak")
    cycle: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.25, "share"), description="restarts only: length of the first cosine after the warmup"
    )
    cycle_growth: Annotated[Number, Field(ge=1, le=100)] = Field(
        1.0, description="restarts only: each cosine is this much longer than the one before"
    )
    weight_decay: Ramp | None = Field(None, description="factor on optimizer.weight_decay; none: 1 throughout")
    momentum: MomentumRamp | None = Field(
        None,
        description="replaces optimizer.momentum, or the first of optimizer.betas where there is no momentum; none: "
        "constant",
    )
    on_extend: Literal["rewarm", "stretch", "refuse"] = Field(
        "rewarm",
        description="when a finished run gets a larger budget: warm up again and run the same shape over the added "
        "tokens; follow the larger budget's curve from here; or refuse",
    )


class Anomalies(Section):
    """What a step does whose loss or gradient is not finite, or far above what it was: it never updates the weights."""

    non_finite: Literal["skip", "rollback", "stop"] = Field(
        "skip",
        description="a NaN or infinite loss or gradient: skip the update; or go back to the last good checkpoint and "
        "leave out the batches since; or stop",
    )
    spikes: Literal["off", "skip", "rollback"] = Field(
        "off", description="a loss or gradient norm far above the recent ones: train on it, skip the update, or go back"
    )
    threshold: PositiveNumber = Field(
        6.0, description="a spike is so many standard deviations (from the median deviation) above the median"
    )
    window: Annotated[int, Field(ge=8)] = Field(
        128, description="steps that spikes are measured against; until there are so many, nothing is a spike"
    )
    max_in_a_row: Annotated[int, Field(ge=0)] = Field(
        3, description="updates skipped in a row; with one more the run goes back to the last good checkpoint"
    )
    max_rollbacks: Annotated[int, Field(ge=0)] = Field(
        2, description="times the run goes back by itself; where it would once more, it stops"
    )


# ------------------------------------------------------------------------------------------------- execution plan


class Container(Section):
    """The container that Python runs in on every node; turbolm is installed in its image."""

    runtime: Literal["pyxis", "apptainer"] = Field(description="pyxis: a plugin of srun; apptainer: apptainer exec")
    image: Argument = Field(description="as `srun --container-image` or `apptainer exec` takes it")
    mounts: Annotated[tuple[Mount, ...], BeforeValidator(list_is_tuple)] = Field(
        (), description="SOURCE:TARGET; the folders of the run, the cache and the working directory belong here"
    )
    python: Argument = Field("python3", description="the Python of the image")


class Slurm(Section):
    """What `turbolm submit` asks Slurm for."""

    partition: SlurmValue | None = Field(None, description="where the job queues")
    account: SlurmValue | None = Field(None, description="who is charged")
    qos: SlurmValue | None = Field(None, description="quality of service")
    time: Annotated[Seconds, Field(gt=0)] | None = Field(None, description="limit of one start; a requeue gets it anew")
    mem: SlurmMemory | None = Field(None, description="memory of each node, such as 64G; 0: all of it")
    cpus_per_task: Annotated[int, Field(ge=1)] | None = Field(
        None, description="CPUs of each node: there is one task a node"
    )
    gpu_request: Literal["gres", "gpus_per_node"] = Field(
        "gres", description="how cluster.gpus_per_node is asked for: --gres=gpu:N or --gpus-per-node=N"
    )
    gpu_type: SlurmValue | None = Field(None, description="Slurm's name of the GPU, such as h100")
    constraint: SlurmValue | None = Field(None, description="features the nodes need, such as ib&ssd")
    exclude: SlurmValue | None = Field(None, description="nodes to avoid, such as node[03,07-09]")
    nodelist: SlurmValue | None = Field(None, description="nodes that must be among those given")
    reservation: SlurmValue | None = Field(None, description="a reservation to run in")
    dependency: SlurmValue | None = Field(None, description="jobs to wait for, such as afterok:1234")
    exclusive: bool = Field(False, description="share the nodes with no other job")
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], BeforeValidator(list_is_tuple)] = Field(
        (), description="a job array: one run for each, named NAME-seedN, with train.seed N"
    )
    container: Container | None = Field(None, description="none: the Python that runs `turbolm submit`")
    modules: Annotated[tuple[SlurmValue, ...], BeforeValidator(list_is_tuple)] = Field(
        (), description="environment modules to load, such as cuda/12.8"
    )
    setup: Annotated[tuple[Text, ...], BeforeValidator(list_is_tuple)] = Field(
        (), description="lines of bash, run on the first node before anything else; the one place for shell code"
    )
    environment: dict[EnvironmentName, Text] = Field({}, description="variables exported to every process")
    requeue: bool = Field(True, description="start again after a time limit, a preemption or a lost node")
    stop_grace: Annotated[Seconds, Field(gt=0, le=65535)] = Field(
        300, description="how long before the time limit the run is asked to save and stop"
    )
    max_attempts_without_progress: Annotated[int, Field(ge=1)] = Field(
        3, description="starts that end without a new checkpoint before the job gives up"
    )

    @model_validator(mode="after")
    def _coherent(self) -> Slurm:
        if self.time is not None and self.time <= self.stop_grace:
            raise ValueError(f"expected `time` ({self.time} s) to be longer than `stop_grace` ({self.stop_grace} s)")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("expected every seed once in `seeds`")
        return self


class Cluster(Section):
    """Which machines. With `gpu` and `gpus_per_node` a recipe is planned for them anywhere."""

    num_nodes: Annotated[int, Field(ge=1)] = Field(1, description="machines that train together")
    gpus_per_node: Annotated[int, Field(ge=1)] | None = Field(
        None, description="GPUs of each node; training stops with a message on a node with another number"
    )
    gpu: GpuName | None = Field(None, description="the GPU of each node, for its memory, peak FLOP/s and precisions")
    processes_per_node: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="auto: one for each GPU; without a GPU two, or one on a single core"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a GPU")
    slurm: Slurm | None = Field(None, description="how `turbolm submit` asks for the nodes")

    @model_validator(mode="after")
    def _whole_description(self) -> Cluster:
        if (self.gpu is None) != (self.gpus_per_node is None):
            raise ValueError("expected `gpu` and `gpus_per_node` together, such as gpu: H100-80GB, gpus_per_node: 8")
        return self


class Execution(Section):
    """How the contract is carried out. Nothing here changes what is learned, but that quantized traffic rounds."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_whole)] = Field(
        2, description="what each process holds only a part of: 1 optimizer state, 2 gradients too, 3 weights too"
    )
    offload_optimizer: bool = Field(False, description="optimizer state in the host's memory (zero_stage 1 to 3)")
    offload_parameters: bool = Field(False, description="weights in the host's memory (zero_stage 3)")
    hierarchical_partition: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="processes that hold a second whole copy of the weights, best those of one node, so that the "
        "backward pass gathers within the node (zero_stage 3; hpZ of ZeRO++)",
    )
    quantized_weights: bool = Field(
        False, description="gather weights in 8 bits (zero_stage 3, CUDA; qwZ of ZeRO++); changes the result"
    )
    quantized_gradients: bool = Field(
        False, description="reduce gradients in 4 and 8 bits (zero_stage 3, CUDA; qgZ of ZeRO++); changes the result"
    )
    micro_batch: Positive | Literal["auto"] = Field(
        "auto", description="tokens of one forward on one process; auto: a process's share, 16k tokens at most"
    )
    activation_checkpointing: Literal["none", "full", "selective", "offloaded"] | Annotated[int, Field(ge=1)] = Field(
        "none",
        description="what is recomputed in the backward pass: full: every layer; n: every n-th; selective: all but "
        "matrix products and attention; offloaded: every layer, from inputs kept in the host's memory",
    )
    overlap_communication: bool | Literal["auto"] = Field(
        "auto", description="reduce gradients while the backward pass goes on (zero_stage 1 to 3); auto: on a GPU"
    )
    communication_bucket: Positive | Literal["auto"] = Field(
        "auto", description="elements sent at once (zero_stage 1 to 3); auto: 100M on a GPU, 25M on a CPU"
    )
    loss: Literal["auto", "full", "chunked", "liger"] = Field(
        "auto",
        description="chunked: logits are never held all at once; liger: the same in one GPU kernel (package "
        "liger-kernel); auto: chunked where the model allows it, but full in fp32 where logits are few",
    )
    compile: Literal["none", "model", "layers"] = Field(
        "none",
        description="torch.compile of the whole model, or of each layer: quicker to compile, and at zero_stage 3 too; "
        "one compilation for each row length, another where it evaluates",
    )
    attention: Literal["auto", "eager", "sdpa", "flex", "flash", "varlen"] = Field(
        "auto", description="auto: the fastest kernel here that keeps packed documents apart"
    )
    adam_kernel: Literal["auto", "torch", "deepspeed"] = Field(
        "auto", description="auto: DeepSpeed's CPUAdam when offloaded, else torch's fused kernel"
    )
    process_group_timeout: Annotated[Seconds, Field(gt=0, le=365 * 86400)] = Field(
        1800, description="a collective operation that takes longer ends the run"
    )
    hang_timeout: TimeLimit = Field(
        600,
        description="a rank that goes no further for that long, in a step, an evaluation or a save, is named and the "
        "run ended; `off`: nobody watches",
    )
    startup_timeout: TimeLimit = Field(
        3600, description="the same until the first step is done, while compiling and while exporting; `off`: no limit"
    )
    replica_check: Annotated[int, Field(ge=1)] | Literal["checkpoint", "off"] = Field(
        "checkpoint",
        description="compare the weights that every process holds a copy of, by checksum: before each checkpoint, or "
        "after every so many steps as well; a difference stops the run",
    )
    threads_per_process: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="CPU threads; auto: the node's cores shared by its processes"
    )
    prepare_workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="processes that tokenize; auto: one for each core"
    )
    tokenizer_engine: Literal["auto", "tokenizers", "gigatoken"] = Field(
        "auto", description="auto: gigatoken where it is installed and gives the same ids as tokenizers"
    )
    cache_dir: Text = Field(".cache/turbolm", description="folder of prepared data, which runs share")
    runs_dir: Text = Field("runs", description="folder of run directories")


class Evaluation(Section):
    """Loss and bits per byte on the held-out documents."""

    every: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.1, "share"), description="tokens, steps or a share of the budget between evaluations"
    )
    tokens: Positive = Field(1_000_000, description="at most this many held-out tokens")


class Checkpoint(Section):
    """When the state is saved. A stopping run and a finished one always save."""

    every: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.25, "share"), description="tokens, steps or a share of the budget between checkpoints"
    )
    asynchronous: bool = Field(
        True, description="write beside the training, from a copy in the host's memory; false: training waits"
    )
    on_failure: Literal["stop", "continue"] = Field(
        "stop",
        description="when one cannot be written (a full disk): stop, which tries once more, or train on to the next; "
        "earlier ones are kept either way",
    )
    keep_last: Annotated[int, Field(ge=1)] = Field(3, description="older ones are deleted, but for those below")
    keep_every: Annotated[TrainingSpan, AfterValidator(positive_span)] | None = Field(
        None, description="tokens, steps or a share of the budget: the first checkpoint of each such span is kept"
    )
    keep_best: bool = Field(
        False, description="save after an evaluation with the lowest loss so far, and keep that checkpoint"
    )


class Logging(Section):
    """What is shown while it runs; metrics.jsonl always has every step."""

    every_steps: Annotated[int, Field(ge=1)] = Field(10, description="steps between lines on the terminal")
    sample_tokens: Annotated[int, Field(ge=0)] = Field(64, description="length of the sample generated at the end")


class Recipe(Section):
    """A whole recipe."""

    name: Name = Field(description="of the run and its directory")
    model: Model
    tokenizer: Tokenizer
    data: Data
    train: Train
    optimizer: Optimizer = Field(AdamW(), description="how gradients become updates; AdamW when it does not say")
    schedule: Schedule = Schedule()
    anomalies: Anomalies = Anomalies()
    cluster: Cluster = Cluster()
    execution: Execution = Execution()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
