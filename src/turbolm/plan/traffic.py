"""The collectives of one training step, and the bytes that each process sends for them. Torch-free.

As DeepSpeed 0.19.8 issues them with the bases of ds_configs/ (read from runtime/engine.py, bf16_optimizer.py,
zero/stage_1_and_2.py, zero/stage3.py and zero/partitioned_param_coordinator.py), with this project's own beside them.
tests/plan/test_traffic.py and tests/plan/traffic_grid.py compare this with the operators of real steps.

Bytes sent follow the ring algorithms (NCCL's for large messages; Thakur, Rabenseifner and Gropp 2005): of a message of
B bytes each of n ranks sends 2 (n-1)/n B in an all-reduce, and (n-1)/n B in a reduce-scatter or all-gather. The ring
passes through the ranks in order, so that it enters and leaves each node once; a mean over ranks is given, of which the
part between nodes leaves a node through its ranks together. Trees and in-network reduction send less between nodes.

Not counted: evaluations, checkpoints, comparisons of replicas, and the first steps, in which ZeRO-3 compares the order
of its modules over the ranks.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, Literal

from turbolm.plan.exchange import exchanges
from turbolm.plan.layout import (
    ALIGNMENT,
    FLATTENED_ELEMENTS,
    is_assembled,
    matrix_moves,
    numels,
    optimizer_groups,
    padded,
    sub_groups,
    until_above,
)
from turbolm.plan.plan import Plan
from turbolm.plan.profile import Heads, Tensor
from turbolm.units import format_bytes

Kind = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int8": 1, "uint8": 1}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Collective:
    """A message that all ranks of a group exchange.

    `bytes` is the larger side of the operator, on the rank where it is largest: what is reduced or gathered in full.
    `calls` is a mean over steps. ZeRO-3 cuts what it gathers as its prefetcher sees fit, so that there a call is a pass
    through the model, and not a message.
    """

    kind: Kind
    bytes: int
    dtype: str
    calls: float  # a step
    # partition: that of hpZ, of consecutive ranks; sequence: those that share sequences; host: through gloo
    group: Literal["world", "partition", "sequence", "host"]
    ranks: int  # in the group
    what: str
    sent_inside: float  # bytes to ranks of the same node, in one call, mean over ranks
    sent_between: float  # bytes to other nodes


@dataclass(frozen=True)
class Traffic:
    """All collectives of a step, and their sums: bytes that a rank sends in a step, mean over ranks."""

    collectives: tuple[Collective, ...]
    inside_bytes: float
    between_bytes: float
    node_bytes: float  # sent by all ranks of a node together to other nodes

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def step_traffic(tensors: Sequence[Tensor], plan: Plan, heads: Heads | None = None) -> Traffic:
    """Return the collectives of a step of `plan` and the bytes sent.

    `tensors` are the parameters in the order of `named_parameters`. Convolutions count as matrices, which matters to
    Muon alone. Without `heads` the exchange of processes that share sequences is left out.
    """
    found = collectives(tensors, plan, heads)
    inside = sum(one.calls * one.sent_inside for one in found)
    between = sum(one.calls * one.sent_between for one in found)
    return Traffic(found, inside, between, between * plan.processes_per_node)


def collectives(tensors: Sequence[Tensor], plan: Plan, heads: Heads | None = None) -> tuple[Collective, ...]:
    """Return the collectives of a step as `step_traffic` does, largest first; none for a single process."""
    if plan.world_size == 1:
        return ()
    step = _Step(tensors, plan)
    stage = plan.recipe.execution.zero_stage
    of_stage = (_whole, _flattened, _flattened, _sharded)[stage]
    found = [*of_stage(step), *_of_optimizer(step), *_own(step), *_shared_sequences(step, heads)]
    calls: dict[Collective, float] = defaultdict(float)
    for one in found:
        calls[replace(one, calls=0.0)] += one.calls
    summed = [replace(one, calls=number) for one, number in calls.items() if one.bytes]
    return tuple(sorted(summed, key=lambda one: -one.bytes * one.calls))


class _Step:
    """What the collectives depend on, and how one is written down."""

    def __init__(self, tensors: Sequence[Tensor], plan: Plan):
        self.tensors, self.plan, self.recipe = tensors, plan, plan.recipe
        self.world_size, self.per_node = plan.world_size, min(plan.processes_per_node, plan.world_size)
        self.zero: Mapping[str, Any] = plan.ds_config["zero_optimization"]
        self.groups = optimizer_groups(tensors, plan.recipe)
        self.weights_in = _DTYPES[plan.precision]
        self.reduced_in = _DTYPES[plan.ds_config["communication_data_type"]]
        self.micro_batches = plan.batch.gradient_accumulation_steps
        self._shares: dict[int, float] = {}

    def ring(
        self, kind: Kind, elements: int, dtype: str, what: str, calls: float = 1, ranks: int | None = None
    ) -> Collective:
        """Return a collective of all ranks, or of every `ranks` consecutive ones."""
        size, num_bytes = ranks or self.world_size, elements * _BYTES[dtype]
        sent = (2 if kind == "all_reduce" else 1) * (size - 1) / size * num_bytes
        between = sent * self._leaving_share(size)
        group: Literal["world", "partition"] = "world" if ranks is None else "partition"
        return Collective(kind, num_bytes, dtype, calls, group, size, what, sent - between, between)

    def flats(self, group: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the flat tensors of a group at stage 3."""
        return sub_groups(group, self.world_size, int(self.zero["sub_group_size"]))

    def host(self, elements: int, dtype: str, what: str, calls: float = 1) -> Collective:
        """Return an all-reduce of all ranks through gloo, over the hosts' network."""
        return replace(self.ring("all_reduce", elements, dtype, what, calls), group="host")

    def in_groups(self, elements: int, what: str, calls: float) -> Collective:
        """Return an all-to-all of every group that shares sequences: each rank sends one part to each of the others."""
        size, per_node, num_bytes = self.plan.batch.sequence_parallel, self.per_node, elements * _BYTES[self.weights_in]
        period = math.lcm(size, per_node)
        ranks = range(self.world_size if self.world_size % period else period)
        peers = ((rank, rank - rank % size + place) for rank in ranks for place in range(size))
        apart = sum(one // per_node != other // per_node for one, other in peers) / len(ranks)  # of each rank
        between = num_bytes / size * apart
        inside = num_bytes * (size - 1) / size - between
        return Collective("all_to_all", num_bytes, self.weights_in, calls, "sequence", size, what, inside, between)

    def _leaving_share(self, size: int) -> float:
        """Return the share of links of rings of `size` consecutive ranks that leave a node."""
        if size not in self._shares:
            node = [rank // self.per_node for rank in range(self.world_size)]
            following = (rank + 1 if (rank + 1) % size else rank + 1 - size for rank in range(self.world_size))
            leaving = sum(node[rank] != node[other] for rank, other in enumerate(following))
            self._shares[size] = leaving / self.world_size
        return self._shares[size]


def _whole(step: _Step) -> Iterator[Collective]:
    """Stage 0: gradients are all-reduced where they are, at the update."""
    for elements in until_above(numels(step.tensors), FLATTENED_ELEMENTS):
        yield step.ring("all_reduce", elements, step.reduced_in, "gradients")
    if step.recipe.train.max_grad_norm:
        yield step.ring("all_reduce", 1, "float32", "gradient norm")  # of a mean: every rank has it already


def _flattened(step: _Step) -> Iterator[Collective]:
    """Stages 1 and 2: each group of the optimizer is one flat tensor, of which each rank owns a part."""
    execution, precision = step.recipe.execution, step.plan.precision
    flats = [padded(sum(numels(group)), ALIGNMENT * step.world_size) for group in step.groups]
    for elements in flats:
        yield step.ring("all_gather", elements, step.weights_in, "weights")
    if execution.zero_stage == 1 and precision == "bf16" and not execution.offload_optimizer:  # BF16_Optimizer
        for elements in until_above(flats, FLATTENED_ELEMENTS):
            yield step.ring("all_reduce", elements, step.reduced_in, "gradients")
        return  # every rank has all gradients, so their norm takes no message
    # Stage 2 reduces every micro-batch, stage 1 the accumulated gradients.
    passes = step.micro_batches if execution.zero_stage == 2 else 1
    for elements in _bucket_messages(step, flats):
        yield step.ring("all_reduce", elements, step.reduced_in, "gradients", passes)
    yield step.ring("all_reduce", 1, "float32", "gradient norm", len(step.groups))
    if precision != "fp32":
        yield step.ring("all_reduce", 1, "uint8", "overflow flag")


def _bucket_messages(step: _Step, flats: Sequence[int]) -> Iterator[int]:
    """Return the elements of each all-reduce of one pass at stages 1 and 2.

    A gradient larger than the bucket goes alone, in the parts that its owners get, as many as exceed the bucket.
    """
    limit = int(step.zero["reduce_bucket_size"])
    starts: dict[str, tuple[int, int]] = {}  # offset in the flat group, and elements of each rank's part of it
    for group, total in zip(step.groups, flats, strict=True):
        offset = 0
        for tensor in group:
            starts[tensor.name] = offset, total // step.world_size
            offset += tensor.num_parameters
    arrives_late = step.recipe.execution.zero_stage == 1 and not step.zero["overlap_comm"]
    order = [tensor for group in step.groups for tensor in group] if arrives_late else backward_order(step.tensors)
    for bucket in _buckets(order, limit):
        if len(bucket) > 1 or bucket[0].num_parameters <= limit:
            yield sum(numels(bucket))
            continue
        start, part = starts[bucket[0].name]
        end = start + bucket[0].num_parameters
        cuts = [start, *range(part * (start // part + 1), end, part), end]
        yield from until_above([b - a for a, b in zip(cuts, cuts[1:], strict=False)], limit)


def _sharded(step: _Step) -> Iterator[Collective]:
    """Stage 3: each rank holds a part of every parameter; large ones are gathered to be used.

    Once in each forward and each backward pass: DeepSpeed would keep a parameter that is used again within
    `stage3_max_reuse_distance`, but it remembers what it released in the forward passes that check the isolation of
    documents, where no backward pass follows. Recomputation gathers nothing more.
    """
    execution, world_size = step.recipe.execution, step.world_size
    threshold = int(step.zero["stage3_param_persistence_threshold"])
    cut = [tensor for tensor in step.tensors if tensor.num_parameters > threshold]
    gathered = sum(padded(tensor.num_parameters, world_size) for tensor in cut)
    dtype = "int8" if execution.quantized_weights else step.weights_in  # qwZ: with scales, which are left out here
    within = execution.hierarchical_partition
    passes = 2 * step.micro_batches
    # hpZ: the first pass after an update makes the second copy, from which all others gather.
    yield step.ring("all_gather", gathered, dtype, "weights", 1 if within else passes)
    if within:
        yield step.ring("all_gather", gathered, dtype, "weights", passes - 1, ranks=within)
    again = _gathered_twice(step, cut)
    yield step.ring("all_gather", again, dtype, "weights", step.micro_batches, ranks=within)
    for tensor in step.tensors:
        if tensor.num_parameters <= threshold:
            yield step.ring("all_gather", padded(tensor.num_parameters, world_size), step.weights_in, "small weights")
    for bucket in _buckets(backward_order(step.tensors), int(step.zero["reduce_bucket_size"])):
        yield from _reduced(step, bucket)
    num_norms = sum(len(step.flats(group)) for group in step.groups)
    norm_in = "float32" if execution.offload_optimizer else "float64"
    yield step.ring("all_reduce", 1, norm_in, "gradient norm", num_norms)
    if step.plan.precision == "fp16":
        yield step.ring("all_reduce", 1, "uint8", "overflow flag")


def _reduced(step: _Step, bucket: Sequence[Tensor]) -> Iterator[Collective]:
    """Return how stage 3 reduces a bucket of gradients. qgZ (not run by any test) does so in 4 bits between nodes."""
    quantized: list[Tensor] = []
    if step.recipe.execution.quantized_gradients and step.per_node < step.world_size:
        quantized = [t for t in bucket if len(t.shape) > 1 and t.num_parameters % (2 * step.world_size) == 0]
    for tensor in quantized:  # all-to-all of 4-bit values inside the node, then of the sums between nodes; no scales
        half, calls = tensor.num_parameters // 2, step.micro_batches
        inside = half * (step.per_node - 1) / step.per_node
        nodes = step.world_size // step.per_node
        yield Collective("all_to_all", half, "int8", calls, "partition", step.per_node, "gradients", inside, 0.0)
        sums = half // step.per_node
        yield Collective(
            "all_to_all", sums, "int8", calls, "world", nodes, "gradients", 0.0, sums * (nodes - 1) / nodes
        )
    elements = sum(padded(tensor.num_parameters, step.world_size) for tensor in bucket if tensor not in quantized)
    yield step.ring("reduce_scatter", elements, step.reduced_in, "gradients", step.micro_batches)


def _gathered_twice(step: _Step, cut: Sequence[Tensor]) -> int:
    """Return the elements that a forward pass gathers again: a tied head, where the layers exceed what is kept."""
    tied = [] if any(tensor.kind == "head" for tensor in step.tensors) else [t for t in cut if t.kind == "embedding"]
    layers = sum(numels(step.tensors)) - sum(tensor.num_parameters for tensor in tied)
    if not tied or layers < int(step.zero["stage3_max_reuse_distance"]):
        return 0
    return padded(tied[0].num_parameters, step.world_size)


def _of_optimizer(step: _Step) -> Iterator[Collective]:
    """Messages of our optimizers that need to know whole matrices, at stages 1 to 3."""
    stage, optimizer = step.recipe.execution.zero_stage, step.recipe.optimizer
    if stage == 0:
        return
    for group in step.groups:
        for flat in step.flats(group) if stage == 3 else [group]:
            if optimizer.name == "cautious_adamw":  # kept elements and all, of every tensor of the group
                yield step.ring("all_reduce", 2 * len(group), "float64", "optimizer")
            elif is_assembled(group[0], optimizer):
                yield from _matrix_exchange(step, flat)


def _matrix_exchange(step: _Step, flat: Sequence[Tensor]) -> Iterator[Collective]:
    """Return the exchanges of `optim.exchange`: parts of each matrix to its owner, and back."""
    held, owned = [0] * step.world_size, [0] * step.world_size
    inside = between = 0
    for owner, parts in matrix_moves(flat, step.recipe.execution.zero_stage, step.world_size):
        owned[owner] += sum(parts.values())
        for rank, elements in parts.items():
            held[rank] += elements
            if rank // step.per_node != owner // step.per_node:
                between += elements
            elif rank != owner:
                inside += elements
    optimizer = step.recipe.optimizer
    dtype = "float32" if step.plan.precision == "fp32" or optimizer.exchanges_fp32 else "bfloat16"
    size = _BYTES[dtype]
    for largest in (max(held),) * optimizer.num_exchanged + (max(owned),):
        sent = (size * inside / step.world_size, size * between / step.world_size)
        yield Collective("all_to_all", size * largest, dtype, 1, "world", step.world_size, "optimizer", *sent)


def _own(step: _Step) -> Iterator[Collective]:
    """This project's own messages, all tiny: they cost their latency."""
    recipe, every = step.recipe, step.recipe.logging.every_steps
    yield step.host(2, "int64", "agreement on targets and stops")
    if recipe.execution.zero_stage == 0 or recipe.anomalies.spikes != "off":
        yield step.ring("all_reduce", 2, "float64", "watch for anomalies")
    # Losses of the steps; times of the ranks, which take at least 10 steps; peak memory. Routers add theirs.
    yield step.host(every + (2 * step.world_size if every >= 10 else 0), "float64", "metrics", 1 / every)
    yield step.host(1, "int64", "metrics", 1 / every)


def _shared_sequences(step: _Step, heads: Heads | None) -> Iterator[Collective]:
    """Return the messages of `models.parallel_attention` and `models.router` inside groups that share sequences.

    The shares of routers are all-reduced for every type with experts; some have no router loss to need them.
    """
    batch = step.plan.batch
    size, bins, passes = batch.sequence_parallel, batch.micro_batch_bins, batch.gradient_accumulation_steps
    if size == 1:
        return
    if heads is not None:
        again = step.recipe.execution.activation_checkpointing
        for elements, calls in exchanges(heads, batch, again):
            yield step.in_groups(elements, "sequences", calls)
    num_experts = next((tensor.shape[0] for tensor in step.tensors if tensor.kind == "expert"), 0)
    for elements in (bins, bins * (2 * num_experts + 1)) if num_experts else ():  # tokens; choices, probabilities, rows
        reduced = step.ring("all_reduce", elements, "float32", "router shares", passes, ranks=size)
        yield replace(reduced, group="sequence")


def backward_order(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters as their gradients arrive: in reverse order of use.

    The order of use is that of `named_parameters`, but in layers whose parameters all have the names that most models
    give them, where norms are defined last.
    """
    used: list[Tensor] = []
    for layer, members in groupby(tensors, key=lambda tensor: _layer(tensor.name)):
        known = list(members)
        places = [_place(tensor.name.removeprefix(layer)) for tensor in known]
        if None not in places:
            known = [tensor for _, tensor in sorted(zip(places, known, strict=True), key=lambda pair: pair[0] or 0)]
        used += known
    return used[::-1]


def _layer(name: str) -> str:
    found = _LAYER.match(name)
    return found.group() if found else ""


def _place(name: str) -> int | None:
    return next((place for place, start in enumerate(_USED_IN_ORDER) if name.startswith(start)), None)


_LAYER = re.compile(r".*?\.\d+\.")
_USED_IN_ORDER = (
    "input_layernorm",
    *(f"self_attn.{part}" for part in ("q_proj", "q_norm", "k_proj", "k_norm", "v_proj", "o_proj")),
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    *(f"mlp.{part}" for part in ("gate.", "experts.", "gate_proj", "up_proj", "down_proj")),
    "post_feedforward_layernorm",
)


def _buckets(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Cut gradients into buckets as they arrive: one that would exceed `limit` elements starts the next bucket."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and filled + tensor.num_parameters > limit:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.num_parameters
    if bucket:
        yield bucket


def traffic_lines(traffic: Traffic) -> Iterator[str]:
    """Return the lines of `turbolm plan --verbose`: what is sent for what, and the sums."""
    if not traffic.collectives:
        return
    sent: dict[tuple[str, str], float] = defaultdict(float)
    for one in traffic.collectives:
        sent[one.what, one.kind] += one.calls * (one.sent_inside + one.sent_between)
    small = 0.0
    for (what, kind), num_bytes in sent.items():
        if num_bytes < 2**20:
            small += num_bytes
            continue
        yield f"{f'{what} ({kind})':<26}{format_bytes(round(num_bytes)):>10}"
    if small:
        yield f"{'small messages':<26}{format_bytes(round(small)):>10}"
    inside, between, node = (
        format_bytes(round(number)) for number in (traffic.inside_bytes, traffic.between_bytes, traffic.node_bytes)
    )
    leaves = f", {between} to other nodes ({node} out of each node)" if traffic.between_bytes else ""
    yield f"{'together':<26}{inside:>10} inside the node{leaves}"
