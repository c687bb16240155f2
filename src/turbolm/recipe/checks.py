"""Check the parts of a recipe against each other, as far as possible without a machine.

Each rule sees the values that are valid by themselves, so its findings are reported together with all others.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from turbolm.recipe.evaluation import same_names
from turbolm.recipe.execution import RECIPES_ARE_COPIED
from turbolm.recipe.fields import Section
from turbolm.recipe.gpus import GPUS
from turbolm.recipe.kernels import kernel_problems
from turbolm.recipe.lengths import LengthGrowth
from turbolm.recipe.messages import Finding, describe
from turbolm.recipe.model_config import HEADS, lay_over, size_of
from turbolm.recipe.optimizers import OPTIMIZERS
from turbolm.recipe.schedules import SCHEDULES
from turbolm.recipe.schema import Recipe
from turbolm.recipe.sequence_parallel import not_a_divisor, sequence_problems
from turbolm.redaction import holds_secret

Values = Mapping[str, Any]  # by dotted key; a missing or invalid value is None

_GPT2_POSITIONS = 1024  # its default; the only model type here with a table of positions
_MAX_REMIX_PERIODS = 1000
_UNIONS: dict[str, Mapping[str, type[Section]]] = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}


class _Values(dict[str, Any]):
    """Values of a recipe by dotted key, looked up on demand; a missing or invalid value is None."""

    def __init__(self, find: Callable[[str, str], Any]) -> None:
        super().__init__()
        self.find = find

    def __missing__(self, key: str) -> Any:
        section, _, name = key.partition(".")
        value = self[key] = self.find(section, name)
        return value


def check_recipe(recipe: Recipe) -> list[Finding]:
    """Return the findings of every rule on a valid recipe."""
    return _findings(_Values(lambda section, name: getattr(getattr(recipe, section), name)))


def check_values(data: Mapping[str, Any]) -> list[Finding]:
    """Return the findings of every rule on the valid part of `data`, a recipe as plain values."""
    return _findings(_Values(lambda section, name: _valid_value(data, section, name)))


def find_secrets(data: object, path: tuple[str | int, ...] = ()) -> Iterator[Finding]:
    """Find passwords, tokens and keys anywhere in a recipe: it is copied to the run and the model card."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from find_secrets(value, (*path, str(key)))
    elif isinstance(data, (list, tuple)):
        for number, value in enumerate(data):
            yield from find_secrets(value, (*path, number))
    elif isinstance(data, str) and holds_secret(data):
        yield Finding(path, f"contains a password, token or key, but {RECIPES_ARE_COPIED}")


def not_full_sequences(tokens: int, seq_len: int, is_fine: Callable[[int], bool] = lambda tokens: True) -> str:
    """Return the message for a number of tokens that is not a multiple of `seq_len`, with the nearest valid ones."""
    below = tokens // seq_len * seq_len
    nearest = " and ".join(str(near) for near in (below, below + seq_len) if near and is_fine(near))
    return f"must be a multiple of data.seq_len ({seq_len}), got {tokens}" + (
        f"; nearest: {nearest}" if nearest else ""
    )


def too_few_sequences(batch_tokens: int, seq_len: int, world_size: int, shared_by: int = 1) -> str | None:
    """Return the message, with alternatives, for a batch with fewer sequences than processes; None if it has enough.

    Each sequence is shared by `shared_by` processes.
    """
    num_sequences, needed = batch_tokens // seq_len, world_size // shared_by
    if num_sequences >= needed:
        return None
    counts = range(needed, min(batch_tokens // 8, 100 * needed) + 1)  # of sequences; more is no useful suggestion
    longest = next((batch_tokens // count for count in counts if batch_tokens % count == 0), None)
    shorter = f", or a seq_len of at most {longest}" if longest else ""
    return (
        f"{batch_tokens} tokens are {num_sequences} sequences of data.seq_len {seq_len}, too few for {world_size} "
        f"processes{f' in groups of {shared_by}' if shared_by > 1 else ''}; use at most {num_sequences * shared_by} "
        f"processes, a global_batch of at least {needed * seq_len}{shorter}"
    )


def _findings(values: Values) -> list[Finding]:
    return [Finding(tuple(key.split(".")), message) for rule in _RULES for key, message in rule(values)]


def _valid_value(data: Mapping[str, Any], section_name: str, name: str) -> Any:
    given = data.get(section_name, {})
    kinds = _UNIONS.get(section_name)
    if kinds is None:
        section = Recipe.model_fields[section_name].annotation
    else:
        default = Recipe.model_fields[section_name].get_default().name
        chosen = given.get("name", default) if isinstance(given, Mapping) else default
        section = kinds.get(str(chosen))
        if section is None or name == "name":
            return section and chosen
    assert isinstance(section, type) and issubclass(section, Section)
    field = section.model_fields[name]
    if not isinstance(given, Mapping) or name not in given:
        return None if field.is_required() else field.get_default()
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
        return adapter.validate_python(given[name], strict=True)
    except ValidationError:
        return None


def _full_sequences(values: Values) -> Iterator[tuple[str, str]]:
    """Check that a batch and a micro-batch are made of full sequences."""
    seq_len = values["data.seq_len"]
    for key in ("train.global_batch", "execution.micro_batch"):
        tokens = values[key]
        if seq_len and isinstance(tokens, int) and tokens % seq_len:
            yield key, not_full_sequences(tokens, seq_len, partial(_goes_with_the_rest, values, key))


def _goes_with_the_rest(values: Values, key: str, value: int) -> bool:
    """Return whether another value of `key` satisfies all rules that the current one satisfies, and those of `key`."""

    def broken(values: Values) -> set[str]:
        return {key for rule in _RULES if rule is not _full_sequences for key, _ in rule(values)}

    return broken(ChainMap({key: value}, values)) <= broken(values) - {key}  # type: ignore[arg-type]


def _sizes(values: Values) -> Iterator[tuple[str, str]]:
    batch, budget, micro_batch = (values[k] for k in ("train.global_batch", "train.budget", "execution.micro_batch"))
    if batch and budget and budget < batch:
        yield "train.budget", f"must be at least one step, train.global_batch ({batch}), got {budget}"
    if batch and isinstance(micro_batch, int) and micro_batch > batch:
        yield "execution.micro_batch", f"must be at most train.global_batch ({batch}), got {micro_batch}"


def _lengths(values: Values) -> Iterator[tuple[str, str]]:
    """Check that sequences of every length fill each batch, and that data.seq_len is the longest."""
    schedule, seq_len = values["data.length_schedule"], values["data.seq_len"]
    if schedule is None or not seq_len:
        return
    yield from schedule.find_problems(seq_len, values["data.packing"])
    key, ramp = f"data.length_schedule.{schedule.length_key}", values["train.batch_ramp"]
    if ramp is not None and ramp.start:
        for length in schedule.named_lengths:
            if seq_len % length:
                yield key, f"must divide data.seq_len ({seq_len}) with train.batch_ramp.start, got {length}"
    for batch_key, batch in _batches(values):
        for length in schedule.named_lengths:
            if batch % length:
                yield key, f"every sequence length must divide {batch_key} ({batch}), got {length}"


def _remix(values: Values) -> Iterator[tuple[str, str]]:
    """Check that short sequences do not return so often that their plan is longer than the run."""
    schedule, budget, batch = (values[k] for k in ("data.length_schedule", "train.budget", "train.global_batch"))
    if not isinstance(schedule, LengthGrowth) or not schedule.remix or not budget or not batch:
        return
    num_periods = budget / schedule.remix_every.tokens(budget, batch)
    if num_periods > _MAX_REMIX_PERIODS:
        most = f"at most {_MAX_REMIX_PERIODS} times in train.budget, as with {100 / _MAX_REMIX_PERIODS:g}%"
        yield "data.length_schedule.remix_every", f"short sequences may come back {most}, got {num_periods:.4g} times"


def _batch_ramp(values: Values) -> Iterator[tuple[str, str]]:
    ramp, full, seq_len = values["train.batch_ramp"], values["train.global_batch"], values["data.seq_len"]
    if ramp is None or not full:
        return
    if ramp.at and ramp.at[-1][1] != full:
        yield "train.batch_ramp.at", f"must end with train.global_batch ({full}), got {ramp.at[-1][1]}"
    if ramp.start and ramp.start >= full:
        yield "train.batch_ramp.start", f"must be less than train.global_batch ({full}), got {ramp.start}"
    for key, batch in _batches(values):
        if key != "train.global_batch" and seq_len and batch % seq_len:
            yield key, not_full_sequences(batch, seq_len)


def _batches(values: Values) -> Iterator[tuple[str, int]]:
    """Yield the batches that a recipe names, with their keys."""
    ramp, full = values["train.batch_ramp"], values["train.global_batch"]
    if full:
        yield "train.global_batch", full
    if ramp is not None:
        for batch in [batch for _, batch in ramp.at or ()]:
            yield "train.batch_ramp.at", batch
        if ramp.start:
            yield "train.batch_ramp.start", ramp.start


def _random_restarts(values: Values) -> Iterator[tuple[str, str]]:
    restarts, budget, batch = (values[k] for k in ("train.random_restarts", "train.budget", "train.global_batch"))
    if restarts is None:
        return
    if values["model.pretrained"] is not None:
        yield (
            "train.random_restarts",
            "has no initial weights to draw: model.pretrained gives them; remove one of the two",
        )
    if budget and batch and restarts.over.tokens(budget, batch) >= budget:
        yield "train.random_restarts.over", f"must be less than train.budget ({budget}), got {restarts.over}"


def _starts_at(values: Values) -> Iterator[tuple[str, str]]:
    start, budget = values["data.starts_at"], values["train.budget"]
    if start is None:
        return
    if budget and budget <= start.tokens:
        yield "train.budget", f"must be more than data.starts_at.tokens ({start.tokens}), got {budget}"
    for key in ("train.batch_ramp", "train.random_restarts"):
        if values[key] is not None:
            yield key, "belongs to the start of a run, and this one begins at data.starts_at; remove it"


def _zero_stage(values: Values) -> Iterator[tuple[str, str]]:
    stage, precision = values["execution.zero_stage"], values["train.precision"]
    if stage == 0 and precision in ("bf16", "fp16"):
        yield (
            "execution.zero_stage",
            f"must be 1, 2 or 3 with train.precision {precision}, got 0: DeepSpeed's ZeRO stage 0 keeps no fp32 "
            "weights that a checkpoint could read; set zero_stage: 1, or train.precision: fp32",
        )
    if stage == 0 and values["execution.offload_optimizer"]:
        yield "execution.zero_stage", "must be 1, 2 or 3 with execution.offload_optimizer, got 0"


def _optimizer(values: Values) -> Iterator[tuple[str, str]]:
    """Check where each optimizer works (`turbolm.recipe.optimizers`), and suggest the nearest alternative."""
    name, stage = values["optimizer.name"], values["execution.zero_stage"]
    if name is None:
        return
    traits = OPTIMIZERS[name]
    if stage is not None and stage not in traits.zero_stages:
        yield (
            "execution.zero_stage",
            f"must be {traits.zero_stages[0]} with optimizer.name {name}, got {stage}: it works on whole matrices, and "
            "ZeRO 1 to 3 leave each process a flat part of the parameters; set zero_stage: 0 with train.precision: "
            "fp32, or optimizer.name: muon, which works at every stage",
        )
    if values["schedule.momentum"] is not None and not traits.has_momentum:
        yield "schedule.momentum", f"has nothing to act on: optimizer.name {name} keeps no momentum; remove it"
    if name == "muon" and values["optimizer.hyperball"] and values["model.init"] == "zero_outputs":
        yield "optimizer.hyperball", "keeps norms, so what model.init: zero_outputs starts at zero would stay there"
    if values["execution.adam_kernel"] == "deepspeed" and name != "adamw":
        yield (
            "execution.adam_kernel",
            f"deepspeed is a kernel of optimizer.name adamw, got {name}; set adam_kernel: auto",
        )
    elif values["execution.adam_kernel"] == "deepspeed" and values["optimizer.cautious_weight_decay"]:
        yield (
            "execution.adam_kernel",
            "deepspeed decays every element, which optimizer.cautious_weight_decay does not; set adam_kernel: auto",
        )


def _stage_3_only(values: Values) -> Iterator[tuple[str, str]]:
    stage = values["execution.zero_stage"]
    for name in ("offload_parameters", "hierarchical_partition", "quantized_weights", "quantized_gradients"):
        key = f"execution.{name}"
        if values[key] and stage is not None and stage != 3:
            yield key, f"needs execution.zero_stage 3, got {stage}; set zero_stage: 3"
        elif values[key] and name.startswith("quantized") and values["cluster.device"] == "cpu":
            yield key, "needs CUDA, but cluster.device is cpu"
    if values["execution.hierarchical_partition"] and values["execution.offload_parameters"]:
        yield (
            "execution.hierarchical_partition",
            "keeps a copy of the weights on the GPU, which execution.offload_parameters would move away; choose one "
            "of the two",
        )


def _communication(values: Values) -> Iterator[tuple[str, str]]:
    reduced_in, precision = values["execution.reduce_precision"], values["train.precision"]
    if reduced_in == "bf16" and precision in ("fp32", "fp16"):
        yield (
            "execution.reduce_precision",
            f"bf16 would round the {precision} gradients of train.precision {precision}; set reduce_precision: auto",
        )
    elif reduced_in == "fp32" and values["execution.quantized_gradients"]:
        yield (
            "execution.reduce_precision",
            "fp32 does not work with execution.quantized_gradients, whose kernels take half precision; set "
            "reduce_precision: auto",
        )
    if values["execution.zero_stage"] != 0:
        return
    for name in ("overlap_communication", "communication_bucket"):
        if values[f"execution.{name}"] not in ("auto", None, False):
            yield f"execution.{name}", "needs execution.zero_stage 1, 2 or 3, got 0"


def _compile(values: Values) -> Iterator[tuple[str, str]]:
    mode = values["execution.compile"]
    if mode == "model" and values["execution.zero_stage"] == 3:
        yield (
            "execution.compile",
            "model does not work with execution.zero_stage 3: weights are gathered while the model runs, which a "
            "graph of the whole model cannot hold; set compile: layers",
        )
    if mode in ("model", "layers") and values["execution.activation_checkpointing"] == "offloaded":
        yield (
            "execution.compile",
            f"{mode} does not work with execution.activation_checkpointing offloaded, whose copies a graph cannot "
            "hold; set activation_checkpointing: full or selective, or compile: none",
        )
    if mode in ("model", "layers") and values["execution.attention"] == "flex":
        yield (
            "execution.compile",
            f"{mode} does not work with execution.attention flex, which compiles its kernel itself; set attention: "
            "varlen or sdpa, or compile: none",
        )
    if mode == "model" and values["execution.loss"] == "liger":
        yield (
            "execution.loss",
            "liger does not work with execution.compile model: it reads a number back from the device, which a graph "
            "of the whole model cannot hold; set loss: chunked, or compile: layers",
        )


def _described_cluster(values: Values) -> Iterator[tuple[str, str]]:
    """Check against the machines that the recipe describes; the rest is checked on the machine itself."""
    gpu, gpus, processes = (values[f"cluster.{name}"] for name in ("gpu", "gpus_per_node", "processes_per_node"))
    precision, on_cpu = values["train.precision"], values["cluster.device"] == "cpu"
    if on_cpu and precision == "fp16":
        yield "train.precision", "fp16 needs a GPU, but cluster.device is cpu; set bf16 or fp32"
    elif not on_cpu and precision == "bf16" and gpu and not GPUS[gpu].has_bf16:
        yield "train.precision", f"bf16 needs a newer GPU than cluster.gpu {gpu}; set fp16 or fp32"
    if not on_cpu and gpus and isinstance(processes, int) and processes > gpus:
        yield (
            "cluster.processes_per_node",
            f"must be at most cluster.gpus_per_node ({gpus}), got {processes}: each process needs its own GPU",
        )


def _kernels(values: Values) -> Iterator[tuple[str, str]]:
    """Check kernels on a device that the recipe names; other devices are checked at the start (`plan.machine`)."""
    gpu, precision = values["cluster.gpu"], values["train.precision"]
    if precision == "auto" and values["execution.zero_stage"] == 0:
        precision = "fp32"
    chosen = values["execution.attention"], values["execution.loss"]
    if values["cluster.device"] == "cpu":
        yield from kernel_problems(*chosen, device="cpu", precision=precision)
    elif gpu is not None:
        capability = GPUS[gpu].compute_capability
        yield from kernel_problems(*chosen, device="cuda", precision=precision, gpu=gpu, capability=capability)


def _fp8(values: Values) -> Iterator[tuple[str, str]]:
    """Check where 8-bit products work; the GPU of an undescribed machine is checked at the start."""
    fp8, precision, gpu = values["train.fp8"], values["train.precision"], values["cluster.gpu"]
    if fp8 in (None, "off"):
        return
    if precision in ("fp32", "fp16"):
        yield "train.fp8", f"{fp8} needs train.precision bf16, got {precision}; set precision: bf16"
    if values["execution.zero_stage"] in (0, 3):
        yield (
            "train.fp8",
            f"{fp8} works with execution.zero_stage 1 and 2, got {values['execution.zero_stage']}: stage 0 trains in "
            "fp32, and stage 3 takes away the weights that the backward pass scales again; set zero_stage: 2",
        )
    if values["cluster.device"] == "cpu":
        yield "train.fp8", f"{fp8} needs a GPU, but cluster.device is cpu; set fp8: off"
    elif gpu is not None and not GPUS[gpu].has_fp8:
        able = ", ".join(name for name, one in GPUS.items() if one.has_fp8)
        yield (
            "train.fp8",
            f"{fp8} needs one of {able}, but cluster.gpu is {gpu}; set fp8: off, which leaves bf16",
        )


def _world_size(values: Values) -> Iterator[tuple[str, str]]:
    """If the number of processes is known, check that each has a sequence, and that groups divide them."""
    processes = values["cluster.processes_per_node"]
    if processes == "auto":
        processes = None if values["cluster.device"] == "cpu" else values["cluster.gpus_per_node"]
    if not processes or not values["cluster.num_nodes"]:
        return
    world_size = processes * values["cluster.num_nodes"]
    seq_len, group = values["data.seq_len"], values["execution.hierarchical_partition"]
    shared_by = values["execution.sequence_parallel"] or 1
    if world_size % shared_by:
        yield "execution.sequence_parallel", not_a_divisor(shared_by, world_size, "processes")
        return
    for key, tokens in _batches(values):
        too_few = seq_len and not tokens % seq_len and too_few_sequences(tokens, seq_len, world_size, shared_by)
        if too_few:
            yield key, too_few
    if group and world_size % group:
        yield "execution.hierarchical_partition", f"must divide the {world_size} processes, got {group}"


def _sequence_parallel(values: Values) -> Iterator[tuple[str, str]]:
    schedule, seq_len, config = values["data.length_schedule"], values["data.seq_len"], _full_config(values)
    lengths = {seq_len, *(schedule.named_lengths if schedule is not None else ())} - {None}
    shared_by, heads = values["execution.sequence_parallel"] or 1, size_of(config.get, HEADS)
    yield from sequence_problems(shared_by, lengths, heads, values["execution.attention"])


def _evaluation(values: Values) -> Iterator[tuple[str, str]]:
    if values["data.validation"] == 0 and values["checkpoint.keep_best"]:
        yield (
            "checkpoint.keep_best",
            "goes by the held-out loss, but data.validation is 0: no evaluation; set keep_best: false, or raise "
            "data.validation",
        )
    yield from same_names(values["evaluation.sets"] or (), values["data.sources"] or ())
    average, sizes = values["evaluation.weight_average"], (values["train.budget"], values["train.global_batch"])
    if average is not None:
        others = values["evaluation.sets"] or values["evaluation.tasks"]
        yield from average.find_problems(values["data.validation"] != 0 or bool(others), *sizes)


def _positions(values: Values) -> Iterator[tuple[str, str]]:
    """Check that no position is beyond the model's table or rotary range."""
    config, seq_len = _full_config(values), values["data.seq_len"]
    names = ("max_position_embeddings", "n_positions")
    if config.get("model_type") == "gpt2" and not any(name in config for name in names):
        config = config | {"n_positions": _GPT2_POSITIONS}
    for name in names:
        positions = config.get(name)
        key = _key_in_config(values, name)
        if name not in config or (positions is None and key.endswith("_file")):
            continue
        if not _is_count(positions):
            yield key, f"{_in_file(key, name)}expected a whole number, got {describe(positions)}"
        elif seq_len and seq_len > positions:
            of = f"{name} of model.config_file" if key.endswith("_file") else key
            yield "data.seq_len", f"must be at most {of} ({positions}), got {seq_len}"


def _vocabulary(values: Values) -> Iterator[tuple[str, str]]:
    config, tokenizer = _full_config(values), values["tokenizer.train"]
    if values["model.resize_embeddings"] and config:
        yield "model.resize_embeddings", "needs model.pretrained: a new model has a row for every token; remove it"
    if "vocab_size" not in config:
        return
    vocab_size = config["vocab_size"]
    key = _key_in_config(values, "vocab_size")
    if not _is_count(vocab_size):
        yield key, f"{_in_file(key, 'vocab_size')}expected a whole number, got {describe(vocab_size)}"
    elif tokenizer and vocab_size < tokenizer.vocab_size:
        wanted = f"must be at least tokenizer.train.vocab_size ({tokenizer.vocab_size})"
        yield key, f"{_in_file(key, 'vocab_size')}{wanted}, got {vocab_size}"


def _full_config(values: Values) -> dict[str, Any]:
    return lay_over(values["model.config_file"], values["model.config"]) or {}


def _key_in_config(values: Values, name: str) -> str:
    """Return the recipe's key for a setting of the configuration: its own, or the file's, which has no line numbers."""
    is_own = name in (values["model.config"] or {}) or values["model.config_file"] is None
    return f"model.config.{name}" if is_own else "model.config_file"


def _in_file(key: str, name: str) -> str:
    return f"{name}: " if key.endswith("_file") else ""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_RULES: tuple[Callable[[Values], Iterator[tuple[str, str]]], ...] = (
    _full_sequences,
    _sizes,
    _lengths,
    _remix,
    _batch_ramp,
    _random_restarts,
    _starts_at,
    _zero_stage,
    _optimizer,
    _stage_3_only,
    _communication,
    _compile,
    _described_cluster,
    _kernels,
    _fp8,
    _world_size,
    _sequence_parallel,
    _evaluation,
    _positions,
    _vocabulary,
)
