"""What processes that share sequences (`execution.sequence_parallel`) send each other, and keep for it. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from turbolm.plan.batch import BatchPlan
from turbolm.plan.parameters import attention_shape
from turbolm.plan.plan import Plan
from turbolm.plan.profile import Heads, Kernel, ModelProfile, Recomputation
from turbolm.recipe.model_config import heads_of
from turbolm.recipe.sequence_parallel import KERNELS, KEY, SHOWN

COPIES = 2
"""Of each tensor that is exchanged: parts side by side before, tokens or heads in order after."""


def read_heads(config: Mapping[str, Any], profile: ModelProfile) -> Heads | None:
    """Return the heads of a model's attention; None where its configuration and its profile do not agree on them."""
    try:
        shape = attention_shape(config)
    except ValueError:  # sizes without a formula, such as one per layer
        return None
    if shape is not None:
        found = Heads(*shape)
    else:
        heads, keys = heads_of(config.get), config.get("num_key_value_heads")
        if heads is None or not isinstance(keys, int) or not keys:
            return None
        found = Heads(profile.num_layers, heads[0], keys, heads[1])
    # A layer's FLOPs for a pair of tokens: 2 for each element of a query and its key, 2 for each of a value.
    pair = 4 * found.queries * found.size
    is_so = found.layers == profile.num_layers and all(kind.attention_flops_per_pair == pair for kind in profile.layers)
    return found if is_so else None


def group_sizes(plan: Plan, config: Mapping[str, Any], profile: ModelProfile) -> list[int]:
    """Return the sizes of groups that are worth a try: those that divide a node's processes, heads and sequences.

    Where a model may turn out not to be shareable there is only the recipe's own.
    """
    now, heads, recipe = plan.batch.sequence_parallel, profile.heads, plan.recipe
    rope = str(config.get("rope_parameters") or config.get("rope_scaling") or "")
    follows_length = recipe.model.rope_factors == "by_length" and ("longrope" in rope or "dynamic" in rope)
    is_known = config.get("model_type") in SHOWN and recipe.execution.attention in KERNELS
    if heads is None or follows_length or not is_known:
        return [now]
    shared = math.gcd(plan.processes_per_node, heads.queries, *plan.curriculum.seq_lens)
    return sorted({now, *(size for size in range(1, shared + 1) if shared % size == 0)})


def shared_keys(heads: Heads, size: int) -> int:
    """Return the heads of keys, and of values, that a group of `size` shares: repeated as little as that takes."""
    return math.lcm(heads.keys, size)


def exchanges(heads: Heads, batch: BatchPlan, recomputation: str | int) -> Iterator[tuple[int, int]]:
    """Yield (elements of a process's tensor, how many in a step) of the all-to-alls inside a group.

    Each layer exchanges queries, keys, values and the output, forward and backward, and again where it is recomputed.
    """
    again = 0 if recomputation == "none" else heads.layers
    if isinstance(recomputation, int):
        again = -(-heads.layers // recomputation)
    calls = 2 * (2 * heads.layers + again) * batch.gradient_accumulation_steps
    for number in (heads.queries, shared_keys(heads, batch.sequence_parallel)):
        yield number * heads.size * batch.process_tokens, calls


def kept_elements(heads: Heads, size: int, kernel: Kernel, recomputation: Recomputation) -> int:
    """Return the elements that a layer of a process in a group of `size` keeps for each of its tokens on top of what
    falls with the group: until its backward pass has made them again, if it recomputes them.

    The output of attention is there on both sides of the exchange. Keys and values are repeated for the group, where
    the kernel (sdpa) does not repeat them for every query anyway. `selective` keeps values on both sides too.
    """
    keys = shared_keys(heads, size)
    repeated = 2 * (keys - heads.keys) if kernel == "flash" else 0
    values = heads.keys if recomputation == "selective" else 0
    return (heads.queries + repeated + values) * heads.size


def exchange_note(plan: Plan, profile: ModelProfile | None) -> str | None:
    """Return what `turbolm plan` has to add on the exchange, or None."""
    size, per_node = plan.batch.sequence_parallel, plan.processes_per_node
    if size == 1:
        return None
    said = []
    if profile is None or profile.heads is None:
        said.append("times, traffic and memory leave out its exchange: the model's heads are not known here")
    if per_node % size and size % per_node:
        said.append(f"groups lie across nodes of {per_node}: a size that divides it stays within")
    elif size > per_node:
        said.append(f"groups reach over nodes of {per_node}, whose network the exchange waits for")
    return f"{KEY}: {'; '.join(said)}" if said else None
