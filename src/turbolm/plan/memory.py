"""Estimate the model state of each process: weights, gradients, optimizer state, fp32 master copy. Torch-free.

Mixed precision with Adam takes 2 + 2 bytes per parameter for half-precision weights and gradients and 4 + 4 + 4 for the
master weights and two moments; ZeRO divides the optimizer state (stage 1), the gradients (2) and the weights (3) by the
number of processes (arXiv 1910.02054, section 3 and figure 1). The differences here are those of DeepSpeed 0.19 with
this repository's ds_configs: gradients accumulate in fp32 and take 4 bytes; at stage 3 the fp32 weights are the master
copy, while stages 1 and 2 keep a second one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from turbolm.recipe.optimizers import OPTIMIZERS
from turbolm.recipe.schema import Execution

_FP32_BYTES, _HALF_BYTES = 4, 2


@dataclass(frozen=True)
class ModelState:
    """Bytes on one process during training, without activations."""

    weights: int
    gradients: int
    master: int  # fp32 copy of the weights
    optimizer: int  # the moments
    gathered: int  # stage 3: weights of other processes while they are needed, at most
    buckets: int  # communication buffers
    host_bytes: int  # in host memory instead, because of offloading

    @property
    def device_bytes(self) -> int:
        """Return the bytes on the GPU (or of the process, on a CPU)."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host_bytes")


def estimate_model_state(
    execution: Execution,
    ds_config: Mapping[str, Any],
    num_parameters: int,
    world_size: int,
    precision: str,
    optimizer_name: str = "adamw",
) -> ModelState:
    """Estimate the model state of one of `world_size` processes, assuming that parameters divide evenly."""
    stage, offloads = execution.zero_stage, execution.offload_optimizer
    weight_bytes = _FP32_BYTES if precision == "fp32" else _HALF_BYTES
    share = -(-num_parameters // world_size) if stage else num_parameters
    weights = weight_bytes * (share if stage == 3 else num_parameters)
    shadows_weights = stage in (1, 2) or (stage == 3 and (precision != "fp32" or offloads))
    master = _FP32_BYTES * share if shadows_weights else 0
    optimizer = round(OPTIMIZERS[optimizer_name].state_bytes * share)
    gradients = _gradient_bytes(stage, num_parameters, share, precision)
    host_bytes = 0
    if offloads:
        host_bytes += master + optimizer + _FP32_BYTES * share  # plus the gradients that the update reads
        master = optimizer = 0
        gradients = 0 if stage > 1 else gradients
    if execution.offload_parameters:
        host_bytes, weights = host_bytes + weights, 0
    if execution.hierarchical_partition:
        weights += -(-weight_bytes * num_parameters // execution.hierarchical_partition)
    zero = ds_config["zero_optimization"]
    live = min(num_parameters, zero.get("stage3_max_live_parameters", 0))
    bucket_elements = sum(zero.get(key) or 0 for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size"))
    return ModelState(
        weights=weights,
        gradients=gradients,
        master=master,
        optimizer=optimizer,
        gathered=weight_bytes * live if stage == 3 and world_size > 1 else 0,
        buckets=weight_bytes * min(bucket_elements, num_parameters) * (2 if zero.get("overlap_comm") else 1),
        host_bytes=host_bytes,
    )


def _gradient_bytes(stage: int, num_parameters: int, share: int, precision: str) -> int:
    """Return the bytes of gradients at the end of a backward pass, when they are largest.

    Stage 1 keeps full gradients: those of the pass in the weights' precision, added to full ones in fp32. From stage 2
    on they are sent to their owner during the pass.
    """
    if stage > 1:
        return _FP32_BYTES * share
    return num_parameters * (_FP32_BYTES if precision == "fp32" else _FP32_BYTES + _HALF_BYTES)
