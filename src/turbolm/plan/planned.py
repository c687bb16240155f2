"""What the planner expects of a run as it is started here, to be compared with what happens. Torch-free.

`report/planned.py` compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from turbolm.plan.count import read_model_config
from turbolm.plan.estimate import estimate_run
from turbolm.plan.footprint import COUNTED, estimate_footprint
from turbolm.plan.machine import Machine
from turbolm.plan.plan import Plan
from turbolm.plan.profiles import find_profile
from turbolm.plan.traffic import collectives

_OUTSIDE_STEPS = ("agreement on targets and stops", "metrics")  # messages of the loop around a step
_FIGURES = ("step_sec", "tokens_per_sec", "mfu", "peak_bytes", "collective_bytes")


def planned_figures(
    plan: Plan, machine: Machine, lengths: Sequence[int] = (), vocab_size: int | None = None
) -> dict[str, Any]:
    """Return the expected figures of a step of the longest sequences and the largest batch.

    `lengths` are those of a sample of the documents, `vocab_size` is that of the store. Figures: `step_sec`,
    `tokens_per_sec`, `mfu` (of a GPU's data sheet), `peak_bytes` of a process's tensors, and `collective_bytes`, the
    messages of one rank in a step. None where one is unknown; `notes` say why, and where the others come from. Never
    traces a model: that takes longer than a start may.
    """
    batch = plan.batch
    found: dict[str, Any] = dict.fromkeys(_FIGURES)
    found |= {"device": plan.device, "seq_len": batch.seq_len, "batch_tokens": batch.global_batch_tokens}
    try:
        return {**found, **_figures(plan, machine, lengths, vocab_size)}
    except Exception as error:  # a run must not end because its plan is not known
        return {**found, "notes": [f"nothing is planned: {type(error).__name__}: {' '.join(str(error).split())}"]}


def _figures(plan: Plan, machine: Machine, lengths: Sequence[int], vocab_size: int | None) -> dict[str, Any]:
    recipe = plan.recipe
    config, _ = read_model_config(recipe, "recipe", vocab_size)
    if config is None:
        return {"notes": ["nothing is planned: the model's configuration is not on this machine"]}
    profile, why = find_profile(config, recipe.model.dropout, recipe.execution.cache_dir, may_trace=False)
    if profile is None:
        cure = "`turbolm calibrate RECIPE`, and `turbolm plan RECIPE` with cluster.gpu, trace a model before it runs"
        return {"notes": [f"nothing is planned: {why}; {cure}"]}
    made: dict[str, Any] = {"collective_bytes": _step_bytes(collectives(profile.tensors, plan, profile.heads))}
    notes = []
    try:
        footprint = estimate_footprint(plan, profile)
        made["peak_bytes"] = footprint.counted_bytes
        made["peak_parts"] = footprint.parts(COUNTED)
        if footprint.is_upper_bound:
            notes.append("the planned memory is an upper bound: compiled code keeps fewer activations")
    except KeyError as error:
        notes.append(f"no memory is planned: the model was not traced with {error.args[0]}")
    estimate = estimate_run(plan, machine, profile, config, lengths)
    if estimate is None:
        notes.append("no time is planned: not calibrated; `turbolm calibrate RECIPE` measures this machine")
    else:
        bill = estimate.bill
        made |= {"step_sec": bill.step.total, "tokens_per_sec": bill.tokens_per_sec, "mfu": bill.mfu}
        made["step_parts"] = {part: sec for part, sec in asdict(bill.step).items() if part != "hidden_communication"}
        notes.append(f"planned times: {estimate.rates.source}")
    return {**made, "notes": notes}


def _step_bytes(found: Sequence[Any]) -> int:
    return round(sum(one.bytes * one.calls for one in found if one.what not in _OUTSIDE_STEPS))
