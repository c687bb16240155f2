"""Partition a model's parameters (ZeRO-3) while it is built.

DeepSpeed is imported inside the functions: examining a model must not wait seconds for that import.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def building(ds_config: dict[str, Any] | None, whole: Collection[str] = ()) -> AbstractContextManager[Any]:
    """Inside this context each process keeps only its part of every new parameter, with no value yet.

    Parameters of the names in `whole` stay whole, and with None all do. Buffers are those of the other stages:
    `deepspeed.zero.Init` by itself would compute them in the type the model trains in, rotary frequencies too.
    """
    if ds_config is None:
        return nullcontext()
    import deepspeed
    from deepspeed.utils import groups

    class Init(deepspeed.zero.Init):
        """Without the broadcast of every whole parameter from rank 0: what it holds is replaced."""

        def _post_init_method(self, module: nn.Module) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                if name in whole or hasattr(parameter, "ds_id"):
                    continue
                dtype = self.dtype if parameter.is_floating_point() else parameter.dtype
                parameter.data = torch.empty_like(parameter.data, dtype=dtype, device=self.local_device)
                self._convert_to_deepspeed_param(parameter)
                parameter.partition()

    # DeepSpeed makes the process group of hpZ at the first model of a process and refuses to make it again;
    # `random_restarts` builds more models.
    is_hierarchical = ds_config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
    existing = groups._get_zero_param_intra_parallel_group() if is_hierarchical else None
    return Init(config_dict_or_path=ds_config, zero_param_parallel_group=existing, tensor_overrides=[])


def is_sharded(model: nn.Module) -> bool:
    """Return whether ZeRO-3 has partitioned the model's parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def sets_whole(parameter: nn.Parameter) -> bool:
    """Return whether `set_whole` needs the value from this process: of a partitioned parameter, only from rank 0."""
    return not hasattr(parameter, "ds_id") or dist.get_rank() == 0


@torch.no_grad()
def set_whole(parameter: nn.Parameter, value: torch.Tensor | None) -> None:
    """Set a parameter to `value`. Collective for a partitioned one: rank 0 has the value, the others get their part."""
    if not hasattr(parameter, "ds_id"):
        assert value is not None
        parameter.data.copy_(value)
        return
    part = torch.empty(parameter.partition_numel(), dtype=parameter.dtype, device=parameter.device)
    parts = None
    if value is not None:
        padded = part.new_zeros(part.numel() * dist.get_world_size())
        padded[: value.numel()].copy_(value.reshape(-1))
        parts = list(padded.split(part.numel()))
    dist.scatter(part, parts, src=0)
    parameter.ds_tensor.view(-1)[: part.numel()].copy_(part)
    parameter.ds_secondary_tensor = None  # hpZ's copy of what was there before


def own_range(parameter: nn.Parameter) -> tuple[int, int]:
    """Return (start, numel) of what this process holds of the flattened parameter."""
    if not hasattr(parameter, "ds_id"):
        return 0, parameter.numel()
    start = parameter.partition_numel() * dist.get_rank()
    return start, max(0, min(parameter.partition_numel(), parameter.ds_numel - start))  # the last parts are padded


@torch.no_grad()
def set_own_part(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Set the elements of `own_range`, from a tensor of one dimension."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.view(-1).copy_(values)
        return
    parameter.ds_tensor.view(-1)[: values.numel()].copy_(values)
    parameter.ds_secondary_tensor = None


def all_names(names: Sequence[str], model: nn.Module) -> list[str]:
    """Return the names that any process found, sorted. Collective for a partitioned model, else this process's."""
    found = [list(names)]
    if is_sharded(model):
        found = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, list(names))
    return sorted(set(sum(found, [])))


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gather partitioned parameters inside this context, to be read. Collective if there are any."""
    if not hasattr(parameters[0], "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the full parameter, even if ZeRO-3 holds only a part of it here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gather_whole(model: nn.Module, kinds: list[type[nn.Module]]) -> None:
    """Make ZeRO-3 gather all weights of modules of these classes before their forward pass."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, kinds)
