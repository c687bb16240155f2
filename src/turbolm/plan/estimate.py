"""The time and the bill of a plan: the work of its steps, from the profile, at a machine's rates. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from turbolm.plan.machine import Machine
from turbolm.plan.machine_rates import Rates, assumed_rates, kind_of, read_rates
from turbolm.plan.plan import Plan
from turbolm.plan.profile import Kernel, ModelProfile, Recomputation
from turbolm.plan.time import Bill, Exchange, StepWork, Window, bill, step_time
from turbolm.plan.work import Amounts, Shape, add, micro_batch_amounts, scale
from turbolm.recipe.gpus import find_gpu, peak_flops

# Bytes read and written for a weight. Of each process's share at an update: gradient norm 4, clipping 8, AdamW 28, the
# weight in half precision 6. Of every weight and micro-batch: its gradient, added to what has accumulated in fp32.
_UPDATE_BYTES, _GRADIENT_BYTES = 46, 10
COMPILED = 0.4  # of the bytes and of the starts of eager operators, once torch.compile has fused them: assumed
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_RECOMPUTATION: dict[str, Recomputation] = {
    "none": "none",
    "selective": "selective",
    "full": "full",
    "offloaded": "full",
}


class Message(Protocol):
    """A collective of a step, as `plan.traffic.Collective`."""

    @property
    def kind(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def calls(self) -> float: ...
    @property
    def ranks(self) -> int: ...
    @property
    def what(self) -> str: ...
    @property
    def sent_inside(self) -> float: ...
    @property
    def sent_between(self) -> float: ...


@dataclass(frozen=True)
class Estimate:
    """The bill of a run, and the rates that it was computed with."""

    bill: Bill
    rates: Rates


def estimate(
    plan: Plan,
    profile: ModelProfile,
    machine: Machine,
    messages: Sequence[Message],
    *,
    head_dim: int = 128,
    documents: Sequence[int] = (),
) -> Estimate | None:
    """Return the estimate of a plan on a machine like `machine`; None for a machine without rates.

    `head_dim` matters to kernels of a CPU. `documents` are the lengths of a sample; without, each fills its sequence.
    Raises KeyError if the profile has no entry for the way the plan computes.
    """
    rates = rates_for(plan, machine)
    if rates is None:
        return None
    documents = documents or (plan.batch.seq_len,)
    cluster, on_gpus = plan.recipe.cluster, plan.device == "cuda"
    gpu = find_gpu(machine.gpu_name) if on_gpus else None
    work = step_work(plan, profile, messages, head_dim=head_dim, documents=documents)
    made = bill(
        step_time(work, rates),
        global_batch_tokens=plan.batch.global_batch_tokens,
        run_tokens=plan.curriculum.tokens_seen(plan.num_steps) + plan.random_restart_tokens,
        training_flops_per_token=profile.training_flops_per_token(documents),
        peak_flops=peak_flops(machine.gpu_name, plan.precision) if on_gpus else None,
        num_gpus=plan.world_size if on_gpus else 0,
        price_per_gpu_hour=cluster.price_per_gpu_hour,
        watts=gpu.watts if gpu else None,
    )
    return Estimate(made, rates)


def rates_for(plan: Plan, machine: Machine) -> Rates | None:
    """Return the machine's calibrated rates, or those assumed for its GPU; None for a CPU without a calibration."""
    kind = kind_of(plan.device, machine.gpu_name, plan.precision, plan.threads_per_process)
    kept = read_rates(plan.recipe.execution.cache_dir, kind)
    if kept is not None or plan.device != "cuda":
        return kept
    return assumed_rates(machine.gpu_name, plan.precision, plan.processes_per_node)


def step_work(
    plan: Plan, profile: ModelProfile, messages: Sequence[Message], *, head_dim: int, documents: Sequence[int]
) -> StepWork:
    """Return what each process does in a step of the longest sequences. Raises KeyError as `estimate`."""
    execution, batch = plan.recipe.execution, plan.batch
    asked = execution.activation_checkpointing

    def amounts(recomputation: Recomputation) -> Amounts:
        shape = Shape(
            tokens=batch.micro_batch_tokens,
            seq_len=batch.seq_len,
            kernel=kernel_of(plan, profile),
            element_bytes=_ELEMENT_BYTES[plan.precision],
            head_dim=head_dim,
            documents=tuple(documents),
            recomputation=recomputation,
            recomputed_share=1 / asked if isinstance(asked, int) else 1.0,
        )
        found = micro_batch_amounts(profile, shape)
        if execution.compile != "none":
            found |= {unit: COMPILED * found[unit] for unit in ("memory_bytes", "layers")}
        return found

    plain = amounts("none")
    again: Amounts = {}
    if asked != "none":
        mode = "full" if isinstance(asked, int) else _RECOMPUTATION[asked]
        again = add(amounts(mode), scale(plain, -1))
    share = profile.num_parameters / (plan.world_size if execution.zero_stage else 1)
    accumulated = _GRADIENT_BYTES * profile.num_parameters * batch.gradient_accumulation_steps
    return StepWork(
        device=plan.device,
        micro_batches=batch.gradient_accumulation_steps,
        micro_batch=plain,
        recomputed=again,
        update={"optimizer_bytes": _UPDATE_BYTES * share + accumulated},
        exchanges=tuple(_exchanges(plan, messages)),
    )


def kernel_of(plan: Plan, profile: ModelProfile) -> Kernel:
    """Return how attention is computed, as the profile calls it."""
    asked = plan.recipe.execution.attention
    has = {one.kernel for kind in profile.layers for one in kind.activations}
    is_fast = asked in ("flash", "varlen", "flex") or (
        asked == "auto" and plan.device == "cuda" and plan.precision != "fp32"
    )
    wanted: list[Kernel] = ["flash", "sdpa", "eager"] if is_fast else ["sdpa", "eager", "flash"]
    if asked == "eager":
        wanted = ["eager", "sdpa"]
    return next((kernel for kernel in wanted if kernel in has), wanted[0])


def _exchanges(plan: Plan, messages: Sequence[Message]) -> Iterator[Exchange]:
    for one in messages:
        nodes = max(1, math.ceil(one.ranks / plan.processes_per_node)) if one.sent_between else 1
        sent = one.sent_inside + one.sent_between
        yield Exchange(one.what, sent, one.calls, one.ranks, nodes, _window(plan, one), one.kind != "all_reduce")


def _window(plan: Plan, one: Message) -> Window:
    """Return what a message may hide behind."""
    stage, overlaps = plan.recipe.execution.zero_stage, plan.ds_config["zero_optimization"].get("overlap_comm")
    if plan.device == "cpu" or not overlaps:
        return "none"
    if one.what == "gradients" and stage >= 2:
        return "backward"
    if one.what == "gradients" and stage == 1 and one.kind == "all_reduce":
        return "last backward" if plan.precision != "bf16" else "none"  # BF16_Optimizer reduces after it
    return "both" if one.what == "weights" and stage == 3 else "none"
