"""What DeepSpeed 0.19.8 holds of a model's state on each rank, tensor by tensor, at five moments of a step. Torch-free.

Read from runtime/engine.py, bf16_optimizer.py, zero/stage_1_and_2.py and zero/stage3.py; benchmarks/planner.py compares
it with the tensors of real steps. `plan/memory.py` estimates the same from the number of parameters alone.

What differs from the arithmetic of arXiv 1910.02054: stages 1 and 2 in fp32 keep the whole gradient of every tensor of
which a rank owns a part, and copy them into one flat tensor before each group's update; stage 1 in bf16 keeps all fp32
gradients from step to step, stage 3 its part of them and a whole bucket.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turbolm.plan.deepspeed import ELEMENT_BYTES
from turbolm.plan.layout import (
    ALIGNMENT,
    FLATTENED_ELEMENTS,
    is_assembled,
    matrix_moves,
    numels,
    optimizer_groups,
    padded,
    parts_by_rank,
    sub_groups,
    until_above,
)
from turbolm.plan.plan import Plan
from turbolm.plan.profile import Tensor
from turbolm.recipe.optimizers import Muon

_FP32_BYTES = 4


@dataclass(frozen=True)
class Held:
    """Bytes on one rank beside weights, master weights and moments."""

    gradients: int = 0
    buckets: int = 0  # buffers to reduce gradients
    copies: int = 0  # of gradients for the update, and the optimizer's own temporaries


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes of the model state on the rank that holds most."""

    weights: int
    master: int  # fp32 copy of the weights
    optimizer: int  # the moments
    small_weights: int  # stage 3: those that every rank keeps, but for the update
    gathered: int  # stage 3: weights of other ranks during a pass, at most; the small ones are among them
    host_bytes: int  # in host memory because of offloading
    resting: Held  # during a forward pass and when the backward pass begins, after other micro-batches of the step
    started: Held  # when the gradients of the last layer arrive
    passed: Held  # when those of the first layer do, at the step's last micro-batch
    reduced: Held  # after the pass, while gradients are reduced that wait for its end
    updating: Held  # while the optimizer steps


def estimate_zero_memory(tensors: Sequence[Tensor], plan: Plan) -> ZeroMemory:
    """Return the model state of `plan` for a model with these parameters, in the order of `named_parameters`."""
    facts = _Facts(tensors, plan)
    weights, master = facts.weight_bytes * facts.flat_elements, _FP32_BYTES * facts.owned if facts.has_master else 0
    optimizer = facts.own_bytes(facts.state_bytes)
    held = (_whole, _flattened, _flattened, _sharded)[facts.stage](facts)
    host = 0
    if facts.offloads:  # but for what the owners of whole matrices keep
        on_gpu = facts.own_bytes(facts.owner_bytes)
        host = _host_bytes(facts, master + optimizer - on_gpu)
        master, optimizer = 0, on_gpu
    if facts.execution.offload_parameters:
        host, weights = host + weights, 0
    if facts.execution.hierarchical_partition:
        weights += -(-facts.weight_bytes * facts.total // facts.execution.hierarchical_partition)
    small = gathered = 0
    if facts.stage == 3 and facts.world_size > 1:
        threshold = int(facts.zero["stage3_param_persistence_threshold"])
        kept = sum(padded(number, facts.world_size) for number in numels(tensors) if number <= threshold)
        small = facts.weight_bytes * kept
        gathered = facts.weight_bytes * min(facts.total, int(facts.zero["stage3_max_live_parameters"]))
    return ZeroMemory(weights, master, optimizer, small, gathered, host, *held)


class _Facts:
    """What the bytes depend on."""

    def __init__(self, tensors: Sequence[Tensor], plan: Plan):
        self.plan, self.execution, self.world_size = plan, plan.recipe.execution, plan.world_size
        self.stage, self.offloads = self.execution.zero_stage, self.execution.offload_optimizer
        self.is_fp32, self.weight_bytes = plan.precision == "fp32", ELEMENT_BYTES[plan.precision]
        self.sent_bytes = ELEMENT_BYTES[plan.ds_config["communication_data_type"]]
        self.zero: Mapping[str, Any] = plan.ds_config["zero_optimization"]
        self.accumulates = plan.batch.gradient_accumulation_steps > 1
        optimizer = plan.recipe.optimizer
        self.groups = optimizer_groups(tensors, plan.recipe)
        if self.stage == 3:
            limit = int(self.zero["sub_group_size"])
            self.groups = [flat for group in self.groups for flat in sub_groups(group, self.world_size, limit)]
        self.total = sum(numels(tensors))
        self.largest = max(numels(tensors))
        self.head = max((t.num_parameters for t in tensors if t.kind in ("head", "embedding")), default=0)
        self.flats = [self._flat_elements(group) for group in self.groups]
        self.parts = [flat // self.world_size if self.stage else flat for flat in self.flats]
        self.owned = sum(self.parts)
        self.flat_elements = self.owned if self.stage == 3 else sum(self.flats)
        # At stage 3 in fp32, too: it compares a tensor's device with a name, and clones where it means to share.
        self.has_master = self.stage > 0
        # Muon keeps one moment of matrices; state_bytes is for all other optimizers a mean over all elements.
        of_adamw = 4.0 - optimizer.owner_bytes if isinstance(optimizer, Muon) else 0.0
        self.state_bytes = [
            plan.recipe.kept_bytes + (0.0 if _is_orthogonal(group) else of_adamw) for group in self.groups
        ]
        self.owner_bytes = [optimizer.owner_bytes * is_assembled(group[0], optimizer) for group in self.groups]

    def _flat_elements(self, group: Sequence[Tensor]) -> int:
        if self.stage == 0:
            return sum(numels(group))
        if self.stage == 3:
            return sum(padded(number, self.world_size) for number in numels(group))
        return padded(sum(numels(group)), ALIGNMENT * self.world_size)

    def own_bytes(self, per_element: Sequence[float]) -> int:
        """Return the bytes of this rank's parts, with so many for each element of a group."""
        return round(sum(bytes_ * part for bytes_, part in zip(per_element, self.parts, strict=True)))

    @property
    def bucket(self) -> int:
        """Return the elements of a bucket. On a CPU what nobody fills is no resident memory."""
        size = int(self.zero.get("reduce_bucket_size", 0))
        return size if self.plan.device == "cuda" else min(size, self.total)

    @property
    def filled(self) -> int:
        """Return the elements of the largest message; a gradient larger than the bucket goes alone."""
        return min(self.total, max(self.bucket, self.largest))

    @property
    def beyond_bucket(self) -> int:
        """Return the elements of a gradient that does not fit the bucket, while it is reduced."""
        return self.largest if self.largest > self.bucket else 0


def _is_orthogonal(group: Sequence[Tensor]) -> bool:
    return group[0].kind in ("matrix", "expert")


def _whole(facts: _Facts) -> tuple[Held, ...]:
    """Stage 0, in fp32: gradients are flattened 5e8 elements at a time when they are reduced."""
    all_of_them = _FP32_BYTES * facts.total
    tensors = numels(tensor for group in facts.groups for tensor in group)
    flattened = max(until_above(tensors, FLATTENED_ELEMENTS)) if facts.world_size > 1 else 0
    kept = all_of_them if facts.accumulates else 0
    return (
        Held(kept),
        Held(max(kept, _FP32_BYTES * facts.head)),
        Held(all_of_them),
        Held(all_of_them, _FP32_BYTES * flattened),
        Held(all_of_them, copies=_temporaries(facts)),
    )


def _flattened(facts: _Facts) -> tuple[Held, ...]:
    """Stages 1 and 2."""
    if facts.stage == 1 and facts.plan.precision == "bf16" and not facts.offloads:
        return _bf16(facts)
    updating = _own_gradients(facts), _flat_copy(facts) + _temporaries(facts)
    if facts.stage == 2 or facts.zero["overlap_comm"]:
        passed = _reduced_in_pass(facts)
        resting = _kept_at_1_and_2(facts)
        started = Held(max(resting.gradients, passed.gradients), passed.buckets)
        return resting, started, passed, passed, Held(updating[0], _offload_buffer(facts), updating[1])
    # Stage 1 without overlap. The sums are moved to the bucket, and from there to their owner's place.
    filled, own = min(facts.bucket, facts.total), _own_gradients(facts)
    sums, resting = _FP32_BYTES * facts.total, _kept_at_1_and_2(facts)
    bucket = _FP32_BYTES * facts.bucket + _offload_buffer(facts)
    started = Held(max(resting.gradients, facts.weight_bytes * facts.head), bucket)
    moved = Held(sums - _FP32_BYTES * filled, bucket + max(_FP32_BYTES * filled, own))
    return resting, started, Held(sums, bucket), moved, Held(updating[0], _offload_buffer(facts), updating[1])


def _bf16(facts: _Facts) -> tuple[Held, ...]:
    """Stage 1 in bf16 (BF16_Optimizer): all fp32 gradients, from the start on, beside those of the pass."""
    sums, of_pass = _FP32_BYTES * sum(facts.flats), facts.weight_bytes * facts.total
    buffers = 0
    if facts.world_size > 1:
        converted = facts.sent_bytes if facts.sent_bytes != _FP32_BYTES else 0
        for together in _cut_above(facts.flats, FLATTENED_ELEMENTS):
            copied = _FP32_BYTES if len(together) > 1 else 0  # a single tensor is flat as it is
            buffers = max(buffers, sum(together) * (copied + converted))
    added = _FP32_BYTES * facts.largest  # each gradient is converted to be added
    return (
        Held(sums + (of_pass if facts.accumulates else 0)),
        Held(sums + (of_pass if facts.accumulates else facts.weight_bytes * facts.head)),
        Held(sums + of_pass),
        Held(sums + of_pass, max(buffers, added)),
        Held(sums + of_pass, copies=_temporaries(facts)),
    )


def _reduced_in_pass(facts: _Facts) -> Held:
    """Return what a pass ends with where hooks reduce its gradients: at stage 2, and at stage 1 with overlap."""
    holds_fp32 = facts.is_fp32 or facts.stage == 1  # what waits in the buckets
    element = _FP32_BYTES if holds_fp32 else facts.weight_bytes
    buffers = 2 if facts.zero["overlap_comm"] else 1
    buckets = facts.bucket * buffers * element + facts.beyond_bucket * element
    buckets += facts.filled * (element + (facts.sent_bytes if facts.sent_bytes != element else 0))
    own = _own_gradients(facts)
    # Whole gradients of earlier micro-batches stay apart from those of this one at stage 2 in fp32.
    twice = facts.accumulates and facts.stage == 2 and facts.is_fp32
    return Held(2 * own if twice else own, buckets + _offload_buffer(facts))


def _kept_at_1_and_2(facts: _Facts) -> Held:
    """Return what stays between micro-batches. Stage 1 keeps its buffers until the last one has been reduced."""
    buffer = _offload_buffer(facts)
    if not facts.accumulates:
        return Held(0, buffer)
    if facts.stage == 2:
        return Held(_own_gradients(facts), buffer)
    buffers = 2 if facts.zero["overlap_comm"] else 1
    return Held(_FP32_BYTES * facts.total, buffers * _FP32_BYTES * facts.bucket + buffer)


def _own_gradients(facts: _Facts) -> int:
    """Return the bytes of reduced gradients on the GPU until the update.

    In half precision those of the rank's own part, in fp32; they stay on the GPU with offloading, too. In fp32 the
    whole gradient of every tensor that has an element in it; with offloading they are sent to the host at once.
    """
    if not facts.is_fp32:
        return _FP32_BYTES * facts.owned
    if facts.offloads:
        return 0
    on_rank: dict[int, int] = defaultdict(int)
    for group in facts.groups:
        for tensor, parts in zip(group, parts_by_rank(group, facts.stage, facts.world_size), strict=True):
            for rank in parts:
                on_rank[rank] += tensor.num_parameters
    return _FP32_BYTES * max(on_rank.values())


def _flat_copy(facts: _Facts) -> int:
    """Return the bytes of the flat copy of a group's gradients for its update; half precision has them flat."""
    return _FP32_BYTES * max(facts.parts) if facts.is_fp32 and not facts.offloads else 0


def _offload_buffer(facts: _Facts) -> int:
    """Return the bytes of `temp_grad_buffer_for_gpu_offload`: the largest gradient."""
    return facts.weight_bytes * facts.largest if facts.offloads else 0


def _sharded(facts: _Facts) -> tuple[Held, ...]:
    """Stage 3: a flat tensor of the rank's gradients and a bucket in the type that is sent, from the start on."""
    own = 0 if facts.offloads else _FP32_BYTES * facts.owned
    bucket = facts.sent_bytes * facts.bucket
    prefetched = facts.weight_bytes * min(int(facts.zero["stage3_prefetch_bucket_size"]), facts.total)
    converted = facts.sent_bytes if facts.sent_bytes != facts.weight_bytes else 0
    reducing = facts.sent_bytes * facts.filled + facts.beyond_bucket * (facts.weight_bytes + converted)
    passed = Held(own, bucket + max(prefetched, reducing))
    flat = 0 if facts.offloads else _FP32_BYTES * max(facts.parts)
    return Held(own, bucket), passed, passed, passed, Held(own, bucket, flat + _temporaries(facts))


def _temporaries(facts: _Facts) -> int:
    """Return the bytes on the GPU that the optimizer allocates and frees again in an update."""
    optimizer = facts.plan.recipe.optimizer
    if optimizer.assembled:
        groups = zip(facts.groups, facts.parts, strict=True)
        return max((_whole_bytes(facts, *one) for one in groups if is_assembled(one[0][0], optimizer)), default=0)
    if facts.offloads:
        return 0
    if facts.stage:
        return round(max(optimizer.temporary_bytes((part,)) for part in facts.parts))
    add_up = sum if optimizer.steps_together else max
    return round(max(add_up(optimizer.temporary_bytes(t.shape) for t in group) for group in facts.groups))


def _whole_bytes(facts: _Facts, group: Sequence[Tensor], part: int) -> int:
    """Return the temporaries of an optimizer that needs whole matrices, for one flat tensor, or at stage 0 for the
    largest matrix.

    With an exchange (`optim.exchange`): an update in fp32, on the host with offloading, and in the type that is sent
    the rank's matrices as they arrive and assembled, those that are done, and what is sent back and received.
    """
    optimizer = facts.plan.recipe.optimizer
    if facts.stage == 0:
        copied = _FP32_BYTES if isinstance(optimizer, Muon) else 0
        return round(max(copied * tensor.num_parameters + _work_bytes(facts, tensor) for tensor in group))
    number = optimizer.num_exchanged
    size = _FP32_BYTES if facts.is_fp32 or optimizer.exchanges_fp32 else 2
    held: dict[int, int] = defaultdict(int)
    owned: dict[int, int] = defaultdict(int)
    work = 0.0
    for tensor, (owner, parts) in zip(group, matrix_moves(group, facts.stage, facts.world_size), strict=True):
        work = max(work, size * owned[owner] + _work_bytes(facts, tensor))
        owned[owner] += sum(parts.values())
        for rank, elements in parts.items():
            held[rank] += elements
    here, mine = max(held.values()), max(owned.values())
    sent = size * max(2 * mine + here, 2 * here)
    update = 0 if facts.offloads else _FP32_BYTES * part
    return round(update + size * number * mine + max(work, sent))


def _work_bytes(facts: _Facts, tensor: Tensor) -> float:
    """Return the temporaries of the update of one whole matrix."""
    optimizer, numel = facts.plan.recipe.optimizer, tensor.num_parameters
    if not isinstance(optimizer, Muon):
        stepped = _FP32_BYTES * numel if facts.stage else 0  # the weight of zeros that SOAP steps
        return stepped + optimizer.temporary_bytes(tensor.shape)
    size = _FP32_BYTES if facts.is_fp32 else 2
    copied = size * numel if not facts.is_fp32 and optimizer.exchanges_fp32 else 0
    most = copied + size * _iteration_elements(tensor)
    if optimizer.row_beta2 is not None and not facts.is_fp32:
        most = max(most, copied + 12 * numel)  # its rows in fp32
    if optimizer.hyperball:
        most = max(most, 4 * _FP32_BYTES * numel + copied)
    if optimizer.soap is not None:
        most = max(most + _FP32_BYTES * numel, _FP32_BYTES * _eigenbasis_elements(tensor, optimizer.soap.max_dim))
    return most


def _eigenbasis_elements(tensor: Tensor, max_dim: int) -> int:
    """Return the elements of what `optim.eigenbasis` takes when it turns its bases: one side after the other."""
    numel, most, kept = tensor.num_parameters, 4 * tensor.num_parameters, 0
    for side in tensor.shape[-2:]:
        if side <= max_dim:
            square = numel // math.prod(tensor.shape[-2:]) * side**2
            most = max(most, kept + 4 * numel + 5 * square, kept + 6 * numel + 2 * square)
            kept += numel  # the mean square in the turned basis
    return most


def _iteration_elements(tensor: Tensor) -> int:
    """Return the elements of a Newton-Schulz iteration's temporaries."""
    numel, gram = tensor.num_parameters, math.prod(tensor.shape[:-2]) * min(tensor.shape[-2:]) ** 2
    return max(4 * numel + gram, 2 * numel + 4 * gram)


def _host_bytes(facts: _Facts, state: int) -> int:
    """Return the bytes that offloading the optimizer takes of the host: its state, gradients and buffers."""
    own = _FP32_BYTES * facts.owned
    if facts.stage == 3:
        return state + 2 * own  # a flat tensor of all gradients, and that of each sub-group
    sums = facts.weight_bytes * facts.owned if facts.is_fp32 and facts.accumulates else 0
    return state + own + facts.weight_bytes * (facts.owned + facts.largest) + sums


def _cut_above(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut sizes where their sum exceeds `limit`."""
    found: list[list[int]] = [[]]
    for size in sizes:
        if sum(found[-1]) > limit:
            found.append([])
        found[-1].append(size)
    return found
