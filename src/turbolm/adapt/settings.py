"""Choose the numbers of an adapted recipe: lengths, batch, budget, learning rate, and a ZeRO stage that fits."""

from __future__ import annotations

import math
from typing import Any

from turbolm.adapt.subject import Task
from turbolm.adapt.target import Target, machine_of, memory_bytes
from turbolm.errors import UserError
from turbolm.plan.count import ModelSize
from turbolm.plan.machine import resolve_device
from turbolm.plan.memory import ModelState, estimate_model_state
from turbolm.plan.plan import build_plan
from turbolm.plan.suggestions import STEP_LAW, suggest
from turbolm.recipe.schema import Recipe
from turbolm.units import format_bytes, format_count

TOKENS_PER_PARAMETER = {"pretrain": 20, "continue": 2}
BUDGET_SOURCES = {
    "pretrain": "20 tokens for each parameter (Chinchilla, arXiv 2203.15556)",
    "continue": "2 tokens for each parameter: our choice",
}
MAX_SEQ_LEN = {"cpu": 512, "cuda": 2048}
_MIN_STEPS = 50
_MAX_LR = 6e-3  # what the quickstart trains with, which is smaller than anything the Step Law was fitted on
_CONTINUE_LR = 1e-4
_STATE_SHARE = 0.6  # of a process's memory that the model state may take: the rest is for activations
_MAX_NODES = 1024
_RECOMPUTED_FROM = 1.5e9  # parameters: activations of so large a model are recomputed


def choose_seq_len(given: int | None, num_positions: int | None, device: str) -> tuple[int, str]:
    """Return the tokens of a sequence, and why. Raises UserError for more than the model has positions."""
    if given is not None:
        if num_positions is not None and given > num_positions:
            raise UserError(f"--seq-len: the model has positions for {num_positions} tokens, fewer than {given}")
        return given, "as asked for"
    most = MAX_SEQ_LEN[device]
    if num_positions is not None and num_positions <= most:
        return num_positions, "all positions that the model has"
    there_are = f"of the model's {num_positions} positions" if num_positions else "the model has no limit"
    return most, f"{there_are}; a longer one takes more memory"


def choose_budget(given: int | None, task: Task, num_parameters: int) -> tuple[int, str]:
    """Return the tokens to train on, and why."""
    if given is not None:
        return given, "as asked for"
    return _round(TOKENS_PER_PARAMETER[task] * num_parameters), BUDGET_SOURCES[task]


def choose_batch(size: ModelSize, budget: int, seq_len: int, world_size: int) -> tuple[int, str]:
    """Return the tokens of a step, and why: 2^n sequences near the Step Law, at least one per process."""
    least = world_size * seq_len
    if budget < least:
        raise UserError(
            f"--budget: {budget} tokens are less than one step of {world_size} processes with --seq-len {seq_len}, "
            f"which takes {least}"
        )
    wanted = min(suggest(_inner(size), budget).global_batch_tokens, budget / _MIN_STEPS)
    num_sequences = 2 ** max(0, round(math.log2(max(1.0, wanted / seq_len))))
    tokens = max(num_sequences, 2 ** math.ceil(math.log2(world_size))) * seq_len
    why = f"near what the {STEP_LAW} gives, a multiple of one sequence per process"
    return (tokens if tokens <= budget else least), why


def choose_lr(task: Task, size: ModelSize, budget: int) -> tuple[float, str]:
    """Return the peak learning rate, and why."""
    if task == "continue":
        return _CONTINUE_LR, "our choice; arXiv 2403.08763 uses 3e-4 on 10B parameters: lower forgets less"
    law = suggest(_inner(size), budget)
    if law.lr > _MAX_LR:
        return _MAX_LR, f"the {STEP_LAW} extrapolates to {law.lr:.2g}; 6e-3 is what the quickstart was measured with"
    return float(f"{law.lr:.2g}"), STEP_LAW + (", outside of what it was fitted on" if law.is_extrapolated else "")


def choose_execution(recipe: Recipe, target: Target, size: ModelSize) -> tuple[dict[str, Any], Target, str]:
    """Return `zero_stage` and recomputation, the target with as many nodes as it takes, and why.

    Raises UserError when the model state does not fit.
    """
    num_nodes = recipe.cluster.num_nodes
    while True:
        for stage in (1, 2, 3):
            state, room = _state(recipe, stage, num_nodes, size.total)
            if room is None or state.device_bytes <= _STATE_SHARE * room:
                is_large = size.total >= _RECOMPUTED_FROM and resolve_device(recipe, machine_of(recipe)) == "cuda"
                more = {"activation_checkpointing": "full"} if is_large else {}
                why = f"model state {format_bytes(state.device_bytes)} of {format_bytes(room)}" if room else ""
                chosen = target if num_nodes == recipe.cluster.num_nodes else target.with_nodes(num_nodes)
                return {"zero_stage": stage, **more}, chosen, why
        if not target.may_grow or num_nodes * 2 > _MAX_NODES:
            break
        num_nodes *= 2
    assert room is not None
    raise UserError(
        f"the model has {format_count(size.total)} parameters: while it trains, its state takes "
        f"{format_bytes(state.device_bytes)} of each process at ZeRO stage 3, and there are {format_bytes(room)}; "
        "name a larger --cluster, such as h100x8 or h100x8_multinode (recipes/_clusters)"
    )


def _state(recipe: Recipe, stage: int, num_nodes: int, num_parameters: int) -> tuple[ModelState, int | None]:
    execution = recipe.execution.model_copy(update={"zero_stage": stage})
    cluster = recipe.cluster.model_copy(update={"num_nodes": num_nodes})
    recipe = recipe.model_copy(update={"execution": execution, "cluster": cluster})
    machine = machine_of(recipe)
    plan = build_plan(recipe, machine)
    state = estimate_model_state(execution, plan.ds_config, num_parameters, plan.world_size, plan.precision)
    return state, memory_bytes(recipe, machine, plan.processes_per_node)


def _inner(size: ModelSize) -> int:
    """Parameters of the layers that a token passes through, as the law counts."""
    return size.total - size.idle - size.embedding - size.head


def _round(count: float) -> int:
    """To two significant digits."""
    return int(float(f"{count:.1e}"))
