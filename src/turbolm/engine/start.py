"""Start the process group and Accelerate from one resolved DeepSpeed configuration."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d as c10d
from transformers import PreTrainedModel

from turbolm.engine.engine import Engine
from turbolm.engine.sharding import is_sharded
from turbolm.environment import drop_accelerate_settings
from turbolm.errors import UserError
from turbolm.recipe.sequence_parallel import DEEPSPEED_ULYSSES

_ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def build_accelerator(ds_config: dict[str, Any], *, device: str, precision: str, timeout_sec: int) -> Accelerator:
    """Start the process group and Accelerate. Collective.

    On a CPU the backend must be named: without it, Accelerate treats every process as a world of its own.
    """
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    chosen = get_accelerator().device_name()  # when DeepSpeed was imported
    if chosen != device:
        raise UserError(
            f"cluster.device: DeepSpeed was imported for {chosen}, and this run is on {device}; "
            f"set DS_ACCELERATOR={device} in the environment before Python starts"
        )
    backend = "gloo" if device == "cpu" else "nccl"
    # A C++ extension for inference that DeepSpeed would compile (40 s) at the first start on a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ.get("PARALLELISM_CONFIG_SP_SIZE", "1") != "1":
        raise UserError(f"parallelism_config.sp_size of the accelerate configuration: {DEEPSPEED_ULYSSES}")
    drop_accelerate_settings()
    # The recipe overrides what the launcher or an accelerate YAML says about precision and DeepSpeed.
    if device == "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["ACCELERATE_MIXED_PRECISION"] = _ACCELERATE_PRECISION[precision]
    # DeepSpeed and Accelerate create more groups without a timeout; torch's default of 30 minutes would apply to them.
    timeout = timedelta(seconds=timeout_sec)
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    plugin = DeepSpeedPlugin(hf_ds_config=ds_config, zero3_init_flag=False)
    return Accelerator(
        deepspeed_plugin=plugin,
        mixed_precision=_ACCELERATE_PRECISION[precision],
        gradient_accumulation_steps=ds_config["gradient_accumulation_steps"],
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timeout)],
    )


def wrap(accelerator: Accelerator, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Engine:
    """Return the engine that trains `model` with `optimizer`. Collective."""
    if is_sharded(model):  # DeepSpeed moves nothing of a model that is built in parts
        for buffer in model.buffers():
            buffer.data = buffer.data.to(accelerator.device)
    return Engine(accelerator.prepare(model, optimizer)[0])


def control_group() -> dist.ProcessGroup | None:
    """Return a gloo group for small host-side agreements, so that they never wait for the GPU's stream."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
