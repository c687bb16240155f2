"""Build the DeepSpeed configuration of a run: a base of ds_configs/ with every `auto` filled in. Torch-free.

ds_configs/README.md explains each key and its value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from turbolm.errors import UserError
from turbolm.plan.batch import BatchPlan
from turbolm.recipe.schema import Execution, Recipe
from turbolm.recipe.sequence_parallel import DEEPSPEED_ULYSSES
from turbolm.shipped import read_shipped, shipped

# Bytes of one message on the wire. DeepSpeed's own default, 5e8 elements, would be 2 GB of gradients in fp32.
_BUCKET_BYTES = {"cuda": 200_000_000, "cpu": 100_000_000}
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def resolve_ds_config(recipe: Recipe, batch: BatchPlan, device: str, precision: str) -> dict[str, Any]:
    """Return the complete configuration for `device` (cpu or cuda) and `precision` (fp32, bf16 or fp16)."""
    execution = recipe.execution
    base = _base_name(recipe)
    config = _load_base(base)
    _refuse_other_ulysses(config, base)
    # DeepSpeed is not told of groups that share sequences: to it every process has a micro-batch of its own.
    num_sequences = batch.micro_batch_bins * batch.gradient_accumulation_steps * batch.world_size
    config |= {
        "train_micro_batch_size_per_gpu": batch.micro_batch_bins,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "train_batch_size": num_sequences,
        "gradient_clipping": recipe.train.max_grad_norm or 0.0,
        "communication_data_type": (reduced_in := reduce_precision(execution, precision)),
    }
    config["bf16"]["enabled"] = precision == "bf16"
    config["fp16"]["enabled"] = precision == "fp16"
    zero = config["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        if key in zero:
            bucket, sent_in = execution.communication_bucket, reduced_in if key == "reduce_bucket_size" else precision
            zero[key] = _BUCKET_BYTES[device] // ELEMENT_BYTES[sent_in] if bucket == "auto" else bucket
    if "overlap_comm" in zero:
        overlap = execution.overlap_communication
        # A CPU has no stream to overlap on, and a single process nothing to reduce: a bucket would only synchronize.
        pays = device == "cuda" and batch.world_size > 1
        zero["overlap_comm"] = pays if overlap == "auto" else overlap
    host = {"device": "cpu", "pin_memory": device == "cuda"}
    for key, asked in (
        ("offload_optimizer", execution.offload_optimizer),
        ("offload_param", execution.offload_parameters),
    ):
        zero.pop(key, None)
        if asked:
            zero[key] = dict(host)
    if base == "zeropp":
        _check_zeropp(recipe, batch, device)
        zero["zero_hpz_partition_size"] = execution.hierarchical_partition or 1
        zero["zero_quantized_weights"] = execution.quantized_weights
        zero["zero_quantized_gradients"] = execution.quantized_gradients
    left = _paths_of_auto(config)
    assert not left, f"unresolved in ds_configs/{base}.json: {', '.join(left)}"
    return config


def reduce_precision(execution: Execution, precision: str) -> str:
    """Return the type in which gradients of `precision` are summed over the processes. Raises UserError.

    qgZ's kernels take half precision only, and reduce their groups in their own format.
    """
    asked = execution.reduce_precision
    if asked == "bf16" and precision == "fp16":
        raise UserError(
            "execution.reduce_precision: bf16 would round the fp16 gradients of train.precision; set fp32 or auto"
        )
    if precision == "fp32":
        return "fp32"  # fp32 gradients are never rounded
    if asked == "auto":
        return precision if execution.quantized_gradients else "fp32"
    return asked


def untested_note(execution: Execution) -> str | None:
    """Return the warning about options that no test has trained with, or None.

    DeepSpeed quantizes only with CUDA kernels, so the tests, which run on CPUs, never train with them.
    """
    asked = [name for name in ("quantized_weights", "quantized_gradients") if getattr(execution, name)]
    if not asked:
        return None
    return f"{' and '.join(f'execution.{name}' for name in asked)}: not tested; compare the loss with a run without"


def _base_name(recipe: Recipe) -> str:
    """Return the name of the base; `recipe.checks` ensures that the options fit the stage."""
    execution = recipe.execution
    stage = execution.zero_stage
    quantized = execution.quantized_weights or execution.quantized_gradients
    if execution.hierarchical_partition or quantized:
        return "zeropp"
    return (
        "zero3_offload"
        if stage == 3 and (execution.offload_optimizer or execution.offload_parameters)
        else f"zero{stage}"
    )


def _check_zeropp(recipe: Recipe, batch: BatchPlan, device: str) -> None:
    execution = recipe.execution
    if device == "cpu" and (execution.quantized_weights or execution.quantized_gradients):
        raise UserError(
            "execution.quantized_weights and execution.quantized_gradients need CUDA: their kernels are GPU code"
        )
    group = execution.hierarchical_partition
    if group and batch.world_size % group:
        raise UserError(f"execution.hierarchical_partition: must divide the {batch.world_size} processes, got {group}")


def _refuse_other_ulysses(config: Mapping[str, Any], base: str) -> None:
    for key in ("sequence_parallel_size", "sequence_parallel"):
        if key in config:
            raise UserError(f"{shipped('ds_configs', f'{base}.json')}: {key}: {DEEPSPEED_ULYSSES}")


def _load_base(name: str) -> dict[str, Any]:
    """Read a base of ds_configs/ by name."""
    try:
        base: dict[str, Any] = json.loads(read_shipped("ds_configs", f"{name}.json"))
    except json.JSONDecodeError as error:
        raise UserError(f"{shipped('ds_configs', f'{name}.json')}:{error.lineno}: {error.msg}") from None
    return base


def _paths_of_auto(value: object, path: str = "") -> list[str]:
    """Yield the keys of unresolved `auto` values: Accelerate would fill them in without the plan knowing."""
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in _paths_of_auto(item, f"{path}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [found for index, item in enumerate(value) for found in _paths_of_auto(item, f"{path}[{index}]")]
    return [path] if value == "auto" else []
