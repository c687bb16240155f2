"""Whether a run fits its GPUs, and the nearest changes of its execution that do; the contract stays. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turbolm.errors import UserError
from turbolm.plan.exchange import group_sizes
from turbolm.plan.footprint import Footprint, estimate_footprint
from turbolm.plan.machine import Machine
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.profile import ModelProfile
from turbolm.plan.profiles import find_profile
from turbolm.plan.suggestions import is_accepted
from turbolm.recipe.schema import Recipe
from turbolm.units import format_bytes

# How much a change is expected to cost a run in speed, to order proposals; none is measured.
_RECOMPUTATION_COST = {"none": 0.0, "selective": 1.0, "full": 3.0}
_STAGE_COST, _MICRO_BATCH_COST, _GROUP_COST, _OFFLOAD_COST, _NODES_COST = 1.0, 1.0, 2.0, 6.0, 10.0
_NUM_WAYS = 3


@dataclass(frozen=True)
class Fit:
    """What is known about the memory of each GPU; nothing without a profile of the model, or on a CPU."""

    profile: ModelProfile | None = None
    footprint: Footprint | None = None
    ways: tuple[str, ...] = ()  # if it does not fit: a line for each set of overrides that does
    notes: tuple[str, ...] = ()

    def is_refused(self, gpu_bytes: int | None) -> bool:
        """Return whether the tensors alone are more than the GPU's memory.

        Assumptions (CUDA context, fragmentation) and upper bounds (activations of compiled code) refuse nothing.
        """
        found = self.footprint
        if found is None or gpu_bytes is None:
            return False
        return (found.state_bytes if found.is_upper_bound else found.counted_bytes) > gpu_bytes

    def refusal(self, gpu_bytes: int | None) -> str:
        """Return the message for a run that cannot fit."""
        assert self.footprint is not None and gpu_bytes is not None
        found = self.footprint
        return (
            f"execution: the {found.moment} takes {format_bytes(found.counted_bytes)} of each GPU, which has "
            f"{format_bytes(gpu_bytes)} ({format_bytes(found.state_bytes)} of it weights, gradients and optimizer): "
            "DOES NOT FIT"
        )


def examine_fit(
    plan: Plan, machine: Machine, config: Mapping[str, Any], gpu_bytes: int | None, *, may_trace: bool
) -> Fit:
    """Estimate the memory of each GPU, and find what fits if it does not.

    With `may_trace` a model without a profile is traced, which takes seconds the first time.
    """
    if gpu_bytes is None:
        may_trace = False
    execution = plan.recipe.execution
    profile, why = find_profile(config, plan.recipe.model.dropout, execution.cache_dir, may_trace=may_trace)
    if profile is None or gpu_bytes is None:
        notes = (f"activations are not estimated: {why}",) if why and gpu_bytes is not None else ()
        return Fit(profile, notes=notes)
    try:
        footprint = estimate_footprint(plan, profile)
    except KeyError:
        way = f"{execution.attention} attention, {execution.activation_checkpointing} recomputation, {plan.precision}"
        return Fit(profile, notes=(f"activations are not estimated: the model was not traced with {way}",))
    if footprint.verdict(gpu_bytes) != "DOES NOT FIT":
        return Fit(profile, footprint)
    ways = (
        f"fits with {' '.join(overrides)} ({format_bytes(other.total_bytes)} of {format_bytes(gpu_bytes)})"
        for overrides, other in ways_that_fit(
            plan.recipe, machine, profile, gpu_bytes, group_sizes(plan, config, profile)
        )
    )
    return Fit(profile, footprint, tuple(ways) or ("nothing that leaves the contract as it is fits these GPUs",))


def ways_that_fit(
    recipe: Recipe, machine: Machine, profile: ModelProfile, gpu_bytes: int, groups: Sequence[int] = ()
) -> list[tuple[tuple[str, ...], Footprint]]:
    """Return up to three sets of overrides with which the run FITS, cheapest first; none is another one and more.

    `groups`: values of execution.sequence_parallel that go with the model.
    """
    found: list[tuple[dict[str, Any], Footprint]] = []
    for _, changes in sorted(_candidates(recipe, machine, groups), key=lambda one: (one[0], len(one[1]))):
        if any(other.keys() == changes.keys() or other.items() <= changes.items() for other, _ in found):
            continue
        footprint = _try(recipe, machine, profile, changes)
        if footprint is not None and footprint.verdict(gpu_bytes) == "FITS":
            found.append((changes, footprint))
        if len(found) == _NUM_WAYS:
            break
    return [
        (tuple(f"{key}={str(value).lower()}" for key, value in changes.items()), footprint)
        for changes, footprint in found
    ]


def _candidates(recipe: Recipe, machine: Machine, groups: Sequence[int]) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield changes by dotted key, after what they are expected to cost."""
    execution, nodes = recipe.execution, recipe.cluster.num_nodes
    now = execution.activation_checkpointing
    modes = [mode for mode, cost in _RECOMPUTATION_COST.items() if cost > _RECOMPUTATION_COST.get(str(now), 3.0)]
    micro = build_plan(recipe, machine).batch.micro_batch_tokens
    one, now_by = recipe.data.seq_len, execution.sequence_parallel
    sizes = [micro // 2**k for k in range(1, 8) if micro // 2**k >= one]
    larger = [size for size in groups if size > now_by]
    stages = range(execution.zero_stage + 1, 4)
    offloads = () if execution.offload_optimizer else (True,)
    for stage, mode, size, group, offload, factor in itertools.product(
        (None, *stages), (None, *modes), (None, *sizes), (None, *larger), (None, *offloads), (None, 2, 4)
    ):
        if group and (size or micro) != one:  # smaller micro-batches come first
            continue
        if group and execution.micro_batch == "auto":  # which grows with the group
            size = one
        changes: dict[str, Any] = {
            "execution.zero_stage": stage,
            "execution.activation_checkpointing": mode,
            "execution.micro_batch": size,
            "execution.sequence_parallel": group,
            "execution.offload_optimizer": offload,
            "cluster.num_nodes": factor and factor * nodes,
        }
        kept = {key: value for key, value in changes.items() if value is not None}
        if kept:
            halvings = (micro // size).bit_length() - 1 if size else 0
            cost = _STAGE_COST * (stage - execution.zero_stage if stage else 0) + _MICRO_BATCH_COST * halvings
            cost += (_RECOMPUTATION_COST[mode] if mode else 0) + _OFFLOAD_COST * bool(offload)
            cost += _GROUP_COST * (group / now_by - 1) if group else 0
            yield cost + _NODES_COST * (factor or 0), kept


def _try(recipe: Recipe, machine: Machine, profile: ModelProfile, changes: dict[str, Any]) -> Footprint | None:
    sections: dict[str, Any] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    updated = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    if not is_accepted(recipe, machine, **updated):
        return None
    try:
        return estimate_footprint(build_plan(recipe.model_copy(update=updated), machine), profile)
    except (KeyError, UserError):
        return None
