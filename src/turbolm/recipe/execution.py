"""The execution plan's sections: where and how a recipe runs. They may change at every start. Torch-free."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from turbolm.recipe.fields import (
    PathText,
    Positive,
    RepositoryName,
    Seconds,
    Section,
    Text,
    TimeLimit,
    TrainingSpan,
    list_is_tuple,
    positive_span,
    text_is_tuple,
    whole,
)
from turbolm.recipe.gpus import GPUS
from turbolm.recipe.paths import PATH_RULE
from turbolm.recipe.slurm_values import Constraint, Dependency, Hosts, SlurmMemory, SlurmTime, SlurmValue
from turbolm.redaction import is_secret_name
from turbolm.storage import check_url
from turbolm.units import Span


def _argument(value: str) -> str:
    """What becomes an argument of a program must not look like one of its options."""
    if value.startswith("-"):
        raise ValueError(f"expected text that does not start with '-', got {value!r}")
    return value


def _written_out(value: str) -> str:
    """The job's script quotes it, and the container's own file system is another one: nothing would be replaced."""
    if value.startswith("~") or "$" in value or ":~" in value:
        raise ValueError(f"expected a path written out, without ~ and $NAME, got {value!r}")
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


def _plain_url(value: str) -> str:
    check_url(value)
    if any(sign in value for sign in "?#*[]{}$~"):
        raise ValueError(f"expected a URL of plain names, written out, got {value!r}")
    return value


def writable_url(value: str) -> str:
    """Return a URL of a folder that can be written to. Raises ValueError."""
    if value.startswith(("http://", "https://")):
        raise ValueError(f"expected a URL that can be written to and stays, such as s3://bucket/folder, got {value!r}")
    return _plain_url(value)


Argument = Annotated[Text, AfterValidator(_argument)]
WritableUrl = Annotated[Text, AfterValidator(writable_url)]
PlainUrl = Annotated[Text, AfterValidator(_plain_url)]
ContainerPath = Annotated[Argument, AfterValidator(_written_out)]
Mount = Annotated[ContainerPath, AfterValidator(_mount)]
EnvironmentName = Annotated[Text, AfterValidator(_environment_name)]


if TYPE_CHECKING:
    GpuName = str
else:
    GpuName = Literal[tuple(GPUS)]


class Container(Section):
    """The container that Python runs in on every node; turbolm is installed in its image."""

    runtime: Literal["pyxis", "apptainer"] = Field(description="pyxis: a plugin of srun; apptainer: apptainer exec")
    image: ContainerPath = Field(description="as `srun --container-image` or `apptainer exec` takes it")
    mounts: Annotated[tuple[Mount, ...], BeforeValidator(list_is_tuple)] = Field(
        (), description="SOURCE:TARGET; the folders of the run, the cache and the working directory belong here"
    )
    python: ContainerPath = Field("python3", description="the Python of the image")


class PrepareJob(Section):
    """The job of one node without GPUs that prepares the data before the training job starts.

    What is not set here is as for the training job, without its GPUs and its `nodelist`; in another partition also
    without its `constraint` and `reservation`.
    """

    separate: bool = Field(
        True,
        description="prepare in a job of its own unless store and order of batches are there already; it is for jobs "
        "of several nodes or with GPUs. false: the training job prepares on its first node, and the others wait",
    )
    partition: SlurmValue | None = Field(None, description="where it queues, such as a partition without GPUs")
    account: SlurmValue | None = Field(None, description="who is charged")
    qos: SlurmValue | None = Field(None, description="quality of service")
    time: SlurmTime | None = Field(None, description="limit of one start; a requeue goes on from there")
    mem: SlurmMemory | None = Field(None, description="memory, such as 64G")
    cpus_per_task: Annotated[int, Field(ge=1)] | None = Field(
        None, description="CPUs; with it the node is shared even where `exclusive` is set for training"
    )


class Slurm(Section):
    """What `turbolm submit` asks Slurm for."""

    partition: SlurmValue | None = Field(None, description="where the job queues")
    account: SlurmValue | None = Field(None, description="who is charged")
    qos: SlurmValue | None = Field(None, description="quality of service")
    time: SlurmTime | None = Field(
        None, description="limit of one start, such as 1h30m, 1-12:00:00 or UNLIMITED; a requeue gets it again"
    )
    mem: SlurmMemory | None = Field(
        None,
        description="memory of each node, such as 64G; a bare number is in MB; 0: all of it, as with `exclusive` alone",
    )
    cpus_per_task: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="CPUs of each node: there is one task a node. Without it Slurm gives one CPU, unless the cluster "
        "says otherwise or the job is exclusive",
    )
    gpu_request: Literal["gres", "gpus_per_node"] = Field(
        "gres", description="how cluster.gpus_per_node is asked for: --gres=gpu:N or --gpus-per-node=N"
    )
    gpu_type: SlurmValue | None = Field(None, description="Slurm's name of the GPU, such as h100")
    constraint: Constraint | None = Field(None, description="features the nodes need, such as ib&ssd")
    exclude: Hosts | None = Field(None, description="nodes to avoid, such as node[03,07-09]")
    nodelist: Hosts | None = Field(None, description="nodes that must be among those given")
    reservation: SlurmValue | None = Field(None, description="a reservation to run in")
    dependency: Dependency | None = Field(None, description="jobs to wait for, such as afterok:1234")
    exclusive: bool = Field(False, description="share the nodes with no other job")
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], BeforeValidator(list_is_tuple)] = Field(
        (), description="a job array: one run for each, named NAME-seedN, with train.seed N"
    )
    container: Container | None = Field(None, description="none: the Python that runs `turbolm submit`")
    modules: Annotated[tuple[SlurmValue, ...], BeforeValidator(list_is_tuple)] = Field(
        (), description="environment modules to load, such as cuda/12.8"
    )
    setup: Annotated[tuple[Text, ...], BeforeValidator(list_is_tuple)] = Field(
        (), description="lines of bash, run on the first node before anything else; shell code goes only here"
    )
    environment: dict[EnvironmentName, Text] = Field({}, description="variables exported to every process")
    prepare: PrepareJob = Field(PrepareJob(), description="the job that prepares the data before")
    preflight: bool = Field(
        True,
        description="with several nodes, run `turbolm doctor` before training, and end the job if a node fails",
    )
    requeue: bool = Field(True, description="start again after a time limit, a preemption or a lost node")
    stop_grace: Annotated[Seconds, Field(gt=0, le=65535)] = Field(
        300, description="how long before the time limit the run is asked to save and stop"
    )
    max_attempts_without_progress: Annotated[int, Field(ge=1)] = Field(
        3, description="starts that end without a new checkpoint before the job gives up"
    )

    @model_validator(mode="after")
    def _coherent(self) -> Slurm:
        if isinstance(self.time, int) and self.time <= self.stop_grace:
            raise ValueError(f"expected `time` ({self.time} s) to be longer than `stop_grace` ({self.stop_grace} s)")
        limit = self.prepare.time
        if isinstance(limit, int) and limit <= self.stop_grace:
            raise ValueError(
                f"expected `prepare.time` ({limit} s) to be longer than `stop_grace` ({self.stop_grace} s)"
            )
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
    price_per_gpu_hour: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="in USD, for the price that `turbolm plan` shows; none: it shows none"
    )
    slurm: Slurm | None = Field(None, description="how `turbolm submit` asks for the nodes")

    @model_validator(mode="after")
    def _whole_description(self) -> Cluster:
        if (self.gpu is None) != (self.gpus_per_node is None):
            raise ValueError("expected `gpu` and `gpus_per_node` together, such as gpu: H100-80GB, gpus_per_node: 8")
        return self


class Execution(Section):
    """How the contract is carried out. Nothing here changes what is learned, but that quantized traffic rounds."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(whole)] = Field(
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
        False,
        description="gather weights in 8 bits (zero_stage 3, CUDA; qwZ of ZeRO++; not tested); changes the result",
    )
    quantized_gradients: bool = Field(
        False,
        description="reduce gradients in 4 and 8 bits (zero_stage 3, CUDA; qgZ of ZeRO++; not tested); changes the "
        "result",
    )
    micro_batch: Positive | Literal["auto"] = Field(
        "auto",
        description="tokens of one forward on one process (or one group of `sequence_parallel`); auto: a process's "
        "share, 16k tokens at most",
    )
    sequence_parallel: Annotated[int, Field(ge=1)] = Field(
        1,
        description="processes that share each sequence, best those of one node: each computes a slice of its tokens, "
        "and attention a share of its heads over the whole sequence (Ulysses); for sequences whose activations one "
        "GPU does not hold",
    )
    activation_checkpointing: Literal["none", "full", "selective", "offloaded"] | Annotated[int, Field(ge=1)] = Field(
        "none",
        description="what is recomputed in the backward pass: full: every layer; n: every n-th; selective: all but "
        "matrix products and attention; offloaded: every layer, from inputs kept in the host's memory",
    )
    overlap_communication: bool | Literal["auto"] = Field(
        "auto",
        description="reduce gradients during the backward pass (zero_stage 1 to 3); auto: on several GPUs",
    )
    reduce_precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="what bf16 and fp16 gradients are summed in over the processes (zero_stage 1 to 3); auto: fp32, "
        "but as they are with quantized_gradients; bf16: half the traffic, rounded at every addition; fp32 gradients "
        "always in fp32",
    )
    communication_bucket: Positive | Literal["auto"] = Field(
        "auto",
        description="elements sent at once (zero_stage 1 to 3); auto: as many as make 200 MB on a GPU, 100 MB on a CPU",
    )
    loss: Literal["auto", "full", "chunked", "liger"] = Field(
        "auto",
        description="chunked: logits are never held all at once; liger: the same in one GPU kernel (package "
        "liger-kernel; not with `compile: model`); auto: chunked where the model allows it, but full in fp32 where "
        "logits are few",
    )
    compile: Literal["none", "model", "layers"] = Field(
        "none",
        description="torch.compile of the whole model, or of each layer: quicker to compile, and at zero_stage 3 too; "
        "one compilation per sequence length, another one for evaluation",
    )
    attention: Literal["auto", "eager", "sdpa", "flex", "flash", "varlen"] = Field(
        "auto",
        description="auto: the fastest kernel here that keeps packed documents apart; varlen runs FlashAttention 3 on "
        "Hopper and 4 on Blackwell where flash_attn_interface or flash_attn.cute is installed",
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
    stop_after: Annotated[TrainingSpan, AfterValidator(positive_span)] | None = Field(
        None,
        description="tokens, steps or a share of the budget after which a start saves and stops, with exit code 0; the "
        "schedules stay those of the whole budget, and a start without this key, or a larger one, goes on from there",
    )
    cache_dir: PathText = Field(".cache/turbolm", description=f"folder of prepared data, which runs share; {PATH_RULE}")
    store: PlainUrl | None = Field(
        None,
        description="URL of a token store of this recipe, as `turbolm prepare --to URL` leaves it: it is fetched into "
        "cache_dir, and the sources are not looked at; none: built here",
    )
    runs_dir: PathText = Field("runs", description=f"folder of run directories; {PATH_RULE}")


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
    mirror: WritableUrl | None = Field(
        None,
        description="a URL such as s3://bucket/folder or file:///folder: checkpoints are copied to URL/NAME beside the "
        "training, and a start with an empty run folder resumes from there; credentials come from the environment "
        "(packages: `turbolm[storage]`)",
    )
    mirror_keep_last: Annotated[int, Field(ge=1)] = Field(
        2, description="older copies are deleted, but for those below and, with `keep_best`, the best one"
    )
    mirror_keep_every: Annotated[TrainingSpan, AfterValidator(positive_span)] | None = Field(
        None, description="tokens, steps or a share of the budget: the first copy of each such span is kept"
    )
    mirror_wait: Annotated[Seconds, Field(ge=0, le=86400)] = Field(
        600, description="how long the end of a run, or half a Slurm job's `stop_grace`, waits for the last copy"
    )


Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class Profile(Section):
    """A trace of a few steps of each attempt, per rank, in the attempt's folder; on GPUs a memory snapshot too."""

    at: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(20, "steps"),
        description="tokens, steps or a share of the budget before it; an attempt that resumes later profiles from its "
        "second step on",
    )
    steps: Annotated[int, Field(ge=1, le=100)] = Field(3, description="steps to profile, which take longer")


class Export(Section):
    """What happens to the export of a finished run."""

    push_to: RepositoryName | None = Field(
        None,
        description="name or owner/name on the Hugging Face hub: upload the export there; the token is HF_TOKEN or "
        "that of `hf auth login`",
    )
    private: bool = Field(True, description="make that repository private, and refuse a public one")


class Logging(Section):
    """What is shown while it runs; metrics.jsonl always has every step."""

    every_steps: Annotated[int, Field(ge=1)] = Field(10, description="steps between lines on the terminal")
    sample_tokens: Annotated[int, Field(ge=0)] = Field(
        64, description="length of the sample generated at the end, at most the model's positions"
    )
    trackers: Annotated[tuple[Tracker, ...], BeforeValidator(text_is_tuple)] = Field(
        (), description="services that show the metrics as well, each through its own package"
    )
    project: Text = Field("turbolm", description="what the trackers file the run under")
    profile: Profile | None = Field(None, description="where a step's time goes; none: not measured")
