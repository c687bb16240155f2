"""The DeepSpeed engine behind Accelerate, and the few things a training step asks of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from torch import nn
from torch.distributed import distributed_c10d as c10d

from turbolm.plan.rates import Rates

_ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def build_accelerator(ds_config: dict[str, Any], *, device: str, precision: str, timeout_sec: int) -> Accelerator:
    """The process group and Accelerate's view of it, from one resolved DeepSpeed configuration.

    On a CPU the back end must be named: left to itself Accelerate takes every process for a world of its own.
    """
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    os.environ.setdefault("DS_ACCELERATOR", device)
    backend = "gloo" if device == "cpu" else "nccl"
    # A C++ extension for inference that DeepSpeed would compile (40 s) at the first start on a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # What the launcher or an accelerate YAML says of precision and DeepSpeed is overruled by the recipe.
    os.environ["ACCELERATE_MIXED_PRECISION"] = _ACCELERATE_PRECISION[precision]
    # DeepSpeed and Accelerate make further groups without naming a time-out: torch's default of 30 minutes would hold.
    timeout = timedelta(seconds=timeout_sec)
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    plugin = DeepSpeedPlugin(hf_ds_config=ds_config, zero3_init_flag=False)
    return Accelerator(
        deepspeed_plugin=plugin,
        mixed_precision=_ACCELERATE_PRECISION[precision],
        gradient_accumulation_steps=ds_config["gradient_accumulation_steps"],
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timeout)],
    )


def clip_by_value(optimizer: torch.optim.Optimizer, max_grad_value: float) -> None:
    """Clamp every gradient element to ±`max_grad_value` just before the update.

    DeepSpeed clips by norm only. When its inner optimizer steps, gradients are averaged, unscaled and laid out as the
    partitions this rank owns, at every ZeRO stage; clamping is element-wise, so clamping the partitions is the same.
    """

    def clamp(stepped: torch.optim.Optimizer, *_: object) -> None:
        for group in stepped.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-max_grad_value, max_grad_value)

    optimizer.register_step_pre_hook(clamp)


def backward_and_step(
    engine: Any,
    loss: torch.Tensor,
    *,
    is_boundary: bool,
    refuses_whole: Callable[[torch.Tensor], bool] = lambda norm: False,
) -> torch.Tensor | float | None:
    """Backward of one micro-batch; at the boundary also clip and update. Returns the gradient norm before clipping.

    What `accelerator.backward` does, taken apart because ZeRO-0 in fp32 keeps no norm: it is computed between the two
    calls there, and `refuses_whole` may say that it must not be applied. None within an accumulation; infinite when
    DeepSpeed skipped the update.
    """
    engine.set_gradient_accumulation_boundary(is_boundary=is_boundary)
    engine.backward(loss, scale_wrt_gas=False)
    if not is_boundary:
        return None
    norm: Any = None
    if engine.zero_optimization_stage() == 0:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if refuses_whole(norm):
            engine.zero_grad()
            engine.set_gradient_accumulation_boundary(is_boundary=False)  # it counts the micro-batch, and no more
    engine.step()
    if engine.zero_optimization_stage() in (1, 2) and engine.optimizer.overflow:
        _forget_offloaded_gradients(engine.optimizer)
    return engine.get_global_grad_norm() if norm is None else norm


def _forget_offloaded_gradients(zero: Any) -> None:
    """After a skipped update: DeepSpeed (0.19.8) clears what it sums gradients in, but not where the optimizer is
    offloaded and they are summed in fp32. The next step would add to what was not finite, and all after it."""
    if getattr(zero, "cpu_offload", False):
        for sums in (zero.averaged_gradients, zero.all_grad_tensors):
            for group in sums:
                sums[group] = None


def set_learning_rate(engine: Any, lr: float) -> None:
    """Write the rate of this step into every parameter group, times the group's own `lr_scale`."""
    for group in engine.optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        if torch.is_tensor(group["lr"]):  # torchao's, which compiles its update
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def set_rates(engine: Any, rates: Rates) -> None:
    """Write the rates of this step into every parameter group."""
    set_learning_rate(engine, rates.lr)
    if rates.weight_decay_factor is not None:
        set_weight_decay(engine, rates.weight_decay_factor)
    if rates.momentum is not None:
        set_momentum(engine, rates.momentum)


def set_weight_decay(engine: Any, factor: float) -> None:
    """Write the weight decay of this step: `factor` times that of the recipe."""
    for group in engine.optimizer.param_groups:
        group["weight_decay"] = factor * group["base_weight_decay"]


def set_momentum(engine: Any, momentum: float) -> None:
    """Write the momentum of this step; where no group has one, into the first of its `betas`."""
    groups = engine.optimizer.param_groups
    with_momentum = [group for group in groups if "momentum" in group]
    for group in with_momentum:
        group["momentum"] = momentum
    for group in [] if with_momentum else groups:
        group["betas"] = (momentum, *group["betas"][1:])


def control_group() -> dist.ProcessGroup | None:
    """A gloo group for small host-side agreements, so that they never wait for the GPU's stream."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
