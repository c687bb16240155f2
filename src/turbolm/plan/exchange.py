"""What processes that share sequences send each other in a step (`execution.sequence_parallel`). Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from turbolm.plan.batch import BatchPlan
from turbolm.plan.deepspeed import ELEMENT_BYTES
from turbolm.plan.parameters import attention_shape
from turbolm.plan.plan import Plan
from turbolm.units import format_bytes


def exchange_bytes(config: Mapping[str, Any], batch: BatchPlan, *, precision: str, recomputation: str | int) -> int:
    """Return the bytes that a process sends to the others of its group in one step; 0 for a type without a formula.

    Each layer sends queries, keys, values and the output once forward and once backward, and once more where it is
    recomputed; one part of each stays at home. Keys and values are sent for as many heads as the group shares.
    """
    size = batch.sequence_parallel
    try:
        shape = attention_shape(config)
    except ValueError:  # sizes without a formula, such as one per layer
        shape = None
    if shape is None or size == 1:
        return 0
    num_layers, heads, key_heads, head_dim = shape
    recomputed = 0 if recomputation == "none" else num_layers
    if isinstance(recomputation, int):
        recomputed = -(-num_layers // recomputation)
    per_token = 2 * (heads + math.lcm(key_heads, size)) * head_dim * ELEMENT_BYTES[precision]
    tokens = batch.process_tokens * batch.gradient_accumulation_steps
    return (2 * num_layers + recomputed) * per_token * tokens * (size - 1) // size


def exchange_note(plan: Plan, config: Mapping[str, Any] | None) -> str | None:
    """Return the line of `turbolm plan` about the exchange, or None without groups."""
    size, per_node = plan.batch.sequence_parallel, plan.processes_per_node
    if size == 1:
        return None
    recomputation = plan.recipe.execution.activation_checkpointing
    sent = exchange_bytes(config or {}, plan.batch, precision=plan.precision, recomputation=recomputation)
    amount = f"{format_bytes(sent)} a step" if sent else "its part of queries, keys, values and outputs"
    where = ""
    if per_node % size:
        where = f", and groups reach over nodes of {per_node}: a size that divides it stays within"
    return (
        f"execution.sequence_parallel: each process sends {amount} to the others of its group, which the times and the "
        f"traffic shown do not count{where}"
    )
