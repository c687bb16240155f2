"""Estimate the model state of each process: weights, gradients, optimizer state, fp32 master copy. Torch-free.

Mixed precision with Adam takes 2 + 2 bytes per parameter for half-precision weights and gradients and 4 + 4 + 4 for the
master weights and two moments; ZeRO divides the optimizer state (stage 1), the gradients (2) and the weights (3) by the
number of processes (arXiv 1910.02054, section 3 and figure 1). The differences here are those of DeepSpeed 0.19 with
this repository's ds_configs: gradients accumulate in fp32 and take 4 bytes, and in fp32, too, stages 1 to 3 keep a
second copy of the weights. `plan/zero_memory.py` counts more closely where a model's tensors are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from turbolm.recipe.schema import Execution, Recipe
from turbolm.recipe.slurm_values import memory_bytes
from turbolm.units import format_bytes

_FP32_BYTES, _HALF_BYTES = 4, 2
_GPU_PROCESS_BYTES = 6 * 2**30  # torch, CUDA's and NCCL's host side, batches read ahead: stated, not measured
_STAGE_1_BUCKET_ELEMENTS = 500_000_000


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
    kept_bytes: float = 8,
    owner_bytes: float = 0,
) -> ModelState:
    """Estimate the model state of one of `world_size` processes, assuming that parameters divide evenly.

    `kept_bytes` is what is kept of each parameter beside weights and gradients (`Recipe.kept_bytes`), `owner_bytes`
    what of it is not offloaded (`Optimizer.owner_bytes`).
    """
    stage, offloads = execution.zero_stage, execution.offload_optimizer
    weight_bytes = _FP32_BYTES if precision == "fp32" else _HALF_BYTES
    share = -(-num_parameters // world_size) if stage else num_parameters
    weights = weight_bytes * (share if stage == 3 else num_parameters)
    master = _FP32_BYTES * share if stage else 0
    optimizer, on_gpu = round(kept_bytes * share), round(owner_bytes * share)
    gradients = _gradient_bytes(stage, num_parameters, share, precision)
    host_bytes = 0
    if offloads:
        host_bytes += master + optimizer - on_gpu + _FP32_BYTES * share  # plus the gradients that the update reads
        host_bytes += (_FP32_BYTES if stage == 3 else weight_bytes) * share  # and all gradients, or the new weights
        master, optimizer = 0, on_gpu
        if stage == 3 or (stage == 2 and precision == "fp32"):  # in half precision the reduced ones stay on the GPU
            gradients = 0
    if execution.offload_parameters:
        host_bytes, weights = host_bytes + weights, 0
    if execution.hierarchical_partition:
        weights += -(-weight_bytes * num_parameters // execution.hierarchical_partition)
    zero = ds_config["zero_optimization"]
    live = min(num_parameters, zero.get("stage3_max_live_parameters", 0))
    return ModelState(
        weights=weights,
        gradients=gradients,
        master=master,
        optimizer=optimizer,
        gathered=weight_bytes * live if stage == 3 and world_size > 1 else 0,
        buckets=_bucket_bytes(ds_config, execution, num_parameters, weight_bytes),
        host_bytes=host_bytes,
    )


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one node's memory while GPUs train, without what the kernel caches of files."""

    offloaded: int  # state of the optimizer and weights, before pinned parts are rounded up to powers of two
    activations: int  # what each layer begins from, with activation_checkpointing: offloaded
    checkpoint_copy: int  # what is written while training goes on
    processes: int

    @property
    def total_bytes(self) -> int:
        """Return the bytes of the node."""
        return self.offloaded + self.activations + self.checkpoint_copy + self.processes


def estimate_host_memory(
    recipe: Recipe, host_bytes: int, num_parameters: int, world_size: int, here: int, activations: int = 0
) -> HostMemory:
    """Estimate what the `here` processes of one node take of its memory, on GPUs.

    `host_bytes` and `activations` are what each process offloads.
    """
    share = -(-num_parameters // world_size)  # at stage 0, too, each writes a part
    saved = round((_FP32_BYTES + recipe.kept_bytes) * share)
    copied = here * saved if recipe.checkpoint.asynchronous else 0
    return HostMemory(here * host_bytes, here * activations, copied, here * _GPU_PROCESS_BYTES)


def host_memory_note(recipe: Recipe, host: HostMemory) -> str | None:
    """Return the warning about a `cluster.slurm.mem` that is too small, or missing on shared nodes, or None."""
    slurm = recipe.cluster.slurm
    if slurm is None:
        return None
    need = f"a node needs about {format_bytes(host.total_bytes)} of host memory"
    advice = f"{-(-host.total_bytes // 2**30)}G, or 0 for all of the node's"
    if slurm.mem is None and not slurm.exclusive:
        return f"cluster.slurm.mem: {need}, and Slurm gives what the cluster's default is; set {advice}"
    asked = memory_bytes(slurm.mem) if slurm.mem is not None else 0
    if 0 < asked < host.total_bytes:
        return f"cluster.slurm.mem: {need}, and {slurm.mem} is asked for; set {advice}"
    return None


def _gradient_bytes(stage: int, num_parameters: int, share: int, precision: str) -> int:
    """Return the bytes of gradients at the end of a backward pass, when they are largest.

    Stage 1 keeps full gradients: those of the pass in the weights' precision, added to full ones in fp32. From stage 2
    on they are sent to their owner during the pass.
    """
    if stage > 1:
        return _FP32_BYTES * share
    return num_parameters * (_FP32_BYTES if precision == "fp32" else _FP32_BYTES + _HALF_BYTES)


def _bucket_bytes(ds_config: Mapping[str, Any], execution: Execution, num_parameters: int, weight_bytes: int) -> int:
    """Return the bytes of communication buffers at the largest moment of a reduction, as DeepSpeed 0.19.8 makes them.

    Stage 1 in bf16 flattens its fp32 gradients 5e8 elements at a time (MEMORY_OPT_ALLREDUCE_SIZE). Elsewhere gradients
    are gathered in a buffer in the weights' precision, two of them with overlap at stages 1 and 2. A reduction at
    stages 1 and 2 flattens a bucket once more and converts it to the type that is sent; stage 3 converts and flattens.
    """
    zero, stage = ds_config["zero_optimization"], execution.zero_stage
    if stage == 0:
        return 0
    sent_bytes = _FP32_BYTES if ds_config.get("communication_data_type") == "fp32" else _HALF_BYTES
    converted = sent_bytes if sent_bytes != weight_bytes else 0
    if stage == 1 and ds_config.get("bf16", {}).get("enabled") and not execution.offload_optimizer:
        converted = _HALF_BYTES if sent_bytes == _HALF_BYTES else 0
        return min(_STAGE_1_BUCKET_ELEMENTS, num_parameters) * (_FP32_BYTES + converted)
    reduced = min(zero.get("reduce_bucket_size", 0), num_parameters)
    if stage == 3:
        prefetched = min(zero.get("stage3_prefetch_bucket_size", 0), num_parameters)
        return reduced * (weight_bytes + converted + sent_bytes) + prefetched * weight_bytes
    buffers = 2 if zero.get("overlap_comm") else 1
    return reduced * ((buffers + 1) * weight_bytes + converted)
