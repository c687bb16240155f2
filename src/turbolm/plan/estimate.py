"""The time and the bill of a plan: the work of its steps, from the profile, at a machine's rates. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from turbolm.plan.deepspeed import ELEMENT_BYTES
from turbolm.plan.exchange import COPIES, exchanges
from turbolm.plan.flops import span_of_documents, training_flops_per_token
from turbolm.plan.footprint import used_kernel, used_loss
from turbolm.plan.machine import Machine
from turbolm.plan.machine_rates import OFFLOADED_SEC, Rates, assumed_rates, kind_of, read_rates
from turbolm.plan.parameters import head_dim_of
from turbolm.plan.plan import Plan
from turbolm.plan.profile import ModelProfile, Recomputation
from turbolm.plan.time import Bill, Exchange, StepWork, Window, bill, step_time, time_lines
from turbolm.plan.traffic import Collective, collectives
from turbolm.plan.weight_bytes import gradient_bytes, update_bytes
from turbolm.plan.work import Amounts, Shape, Unit, add, micro_batch_amounts, scale
from turbolm.recipe.gpus import find_gpu, peak_flops

COMPILED = 0.4  # of the bytes and of the starts of eager operators, once torch.compile has fused them: assumed
_RECOMPUTATION: dict[str, Recomputation] = {
    "none": "none",
    "selective": "selective",
    "full": "full",
    "offloaded": "full",
}


@dataclass(frozen=True)
class Estimate:
    """The bill of a run, and the rates that it was computed with."""

    bill: Bill
    rates: Rates

    def lines(self) -> Iterator[str]:
        """Yield what `turbolm plan --verbose` shows."""
        return time_lines(self.bill, self.rates)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        found = asdict(self.bill)
        return {**found, "step": {**found["step"], "total": self.bill.step.total}, "rates": asdict(self.rates)}


def estimate_run(
    plan: Plan,
    machine: Machine,
    profile: ModelProfile | None,
    config: Mapping[str, Any] | None,
    lengths: Sequence[int] = (),
) -> Estimate | None:
    """Return the estimate where everything it needs is known. `lengths`: of a sample of the store's documents."""
    if profile is None:
        return None
    try:
        return estimate(plan, profile, machine, head_dim=head_dim_of(config or {}), documents=cut(lengths, plan))
    except KeyError:
        return None


def cut(lengths: Sequence[int], plan: Plan) -> list[int]:
    """Return documents as they are cut into sequences."""
    seq_len, found = plan.batch.seq_len, []
    for length in lengths:
        found += [seq_len] * (length // seq_len) + [length % seq_len] * (length % seq_len > 0)
    return found


def estimate(
    plan: Plan,
    profile: ModelProfile,
    machine: Machine,
    *,
    head_dim: int = 128,
    documents: Sequence[int] = (),
) -> Estimate | None:
    """Return the estimate of a plan on a machine like `machine`; None for a machine without rates.

    `head_dim` matters to kernels of a CPU. `documents` are the lengths of a sample; without, each fills its sequence.
    The time is that of the longest sequences. Raises KeyError for a way to run that was not traced.
    """
    rates = rates_for(plan, machine)
    if rates is None:
        return None
    documents = documents or (plan.batch.seq_len,)
    cluster, on_gpus = plan.recipe.cluster, plan.device == "cuda"
    gpu = find_gpu(machine.gpu_name) if on_gpus else None
    work = step_work(plan, profile, head_dim=head_dim, documents=documents)
    made = bill(
        step_time(work, rates),
        global_batch_tokens=plan.batch.global_batch_tokens,
        run_tokens=plan.curriculum.own_tokens + plan.random_restart_tokens,
        training_flops_per_token=training_flops_per_token(profile, span_of_documents(documents)),
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
    if kept is not None:
        return replace(kept, sec_per={"offloaded_bytes": OFFLOADED_SEC, **kept.sec_per})
    if plan.device != "cuda":
        return None
    return assumed_rates(machine.gpu_name, plan.precision, plan.processes_per_node)


def step_work(plan: Plan, profile: ModelProfile, *, head_dim: int, documents: Sequence[int]) -> StepWork:
    """Return what each process does in a step of the longest sequences. Raises KeyError as `estimate`."""
    execution, batch = plan.recipe.execution, plan.batch
    asked = execution.activation_checkpointing

    def amounts(recomputation: Recomputation) -> Amounts:
        shape = Shape(
            tokens=batch.process_tokens,
            seq_len=batch.seq_len,
            kernel=used_kernel(plan, profile),
            element_bytes=ELEMENT_BYTES[plan.precision],
            head_dim=head_dim,
            documents=tuple(documents),
            recomputation=recomputation,
            recomputed_share=1 / asked if isinstance(asked, int) else 1.0,
            loss=used_loss(plan, profile),
            device=plan.device,
            shared_by=batch.sequence_parallel,
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
    plain, again = (add(one, two) for one, two in zip((plain, again), _copies(plan, profile), strict=True))
    return StepWork(
        device=plan.device,
        micro_batches=batch.gradient_accumulation_steps,
        micro_batch=plain,
        recomputed=again,
        update=_update(plan, profile),
        exchanges=tuple(_exchange(plan, one) for one in collectives(profile.tensors, plan, profile.heads)),
    )


def _copies(plan: Plan, profile: ModelProfile) -> tuple[Amounts, Amounts]:
    """Return what a micro-batch copies around the exchange of processes that share sequences, and copies again."""
    batch, asked = plan.batch, plan.recipe.execution.activation_checkpointing
    if profile.heads is None or batch.sequence_parallel == 1:
        return {}, {}
    moved = 2 * COPIES * ELEMENT_BYTES[plan.precision] / batch.gradient_accumulation_steps  # read and written
    plain, all_of_it = (
        moved * sum(elements * calls for elements, calls in exchanges(profile.heads, batch, again))
        for again in ("none", asked)
    )
    return {"memory_bytes": plain}, {"memory_bytes": all_of_it - plain}


def _update(plan: Plan, profile: ModelProfile) -> Amounts:
    """Return what DeepSpeed does with gradients and weights in a step, beside the passes of the model."""
    execution, times = plan.recipe.execution, plan.batch.gradient_accumulation_steps
    stage, size, weights = execution.zero_stage, ELEMENT_BYTES[plan.precision], profile.num_parameters
    updated: Unit = "offloaded_bytes" if execution.offload_optimizer else "optimizer_bytes"
    return {
        "gradient_bytes": weights * gradient_bytes(stage, size, times, plan.world_size),
        "gradients": float(len(profile.tensors) * (times + 1)),
        updated: weights * update_bytes(stage, size, plan.world_size),
    }


def _exchange(plan: Plan, one: Collective) -> Exchange:
    """Return a collective with what it may hide behind. Through gloo (`host`) it takes the same time here.

    An all-to-all sends to its own node and to others at once, so that the network's part is what takes its time.

    What ZeRO-3 gathers in a pass is taken to come in messages as large as DeepSpeed prefetches at once.
    """
    nodes = math.ceil(one.ranks / plan.processes_per_node) if one.sent_between else 1
    prefetched = plan.ds_config["zero_optimization"].get("stage3_prefetch_bucket_size", 0)
    between_alone = one.kind == "all_to_all" and nodes > 1
    at_once = prefetched * ELEMENT_BYTES[plan.precision] if one.what == "weights" else 0
    return Exchange(
        what=one.what,
        sent_bytes=one.sent_between if between_alone else one.sent_inside + one.sent_between,
        calls=one.calls,
        ranks=one.ranks,
        nodes=nodes,
        window=_window(plan, one),
        is_ring=one.kind != "all_reduce",
        messages=max(1.0, one.bytes / at_once) if at_once else 1.0,
    )


def _window(plan: Plan, one: Collective) -> Window:
    """Return what a message may hide behind."""
    stage, overlaps = plan.recipe.execution.zero_stage, plan.ds_config["zero_optimization"].get("overlap_comm")
    if plan.device == "cpu" or not overlaps:
        return "none"
    if one.what == "gradients" and stage >= 2:
        return "backward"
    if one.what == "gradients" and stage == 1 and one.kind == "all_reduce":
        return "last backward" if plan.precision != "bf16" else "none"  # BF16_Optimizer reduces after it
    return "both" if one.what == "weights" and stage == 3 else "none"
