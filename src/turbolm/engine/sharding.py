"""Partition a model's parameters (ZeRO-3) while it is built.

DeepSpeed is imported inside the functions: examining a model must not wait seconds for that import.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def building(ds_config: dict[str, Any] | None) -> AbstractContextManager[Any]:
    """Inside this context each process keeps only its part of every new parameter. With None, parameters stay whole."""
    if ds_config is None:
        return nullcontext()
    import deepspeed
    from deepspeed.utils import groups

    # DeepSpeed makes the process group of hpZ at the first model of a process and refuses to make it again;
    # `random_restarts` builds more models.
    is_hierarchical = ds_config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
    existing = groups._get_zero_param_intra_parallel_group() if is_hierarchical else None
    return deepspeed.zero.Init(config_dict_or_path=ds_config, zero_param_parallel_group=existing)


@contextmanager
def gathered(parameters: Sequence[nn.Parameter], changed_by: int | None = None) -> Iterator[bool]:
    """Gather partitioned parameters inside this context. Collective if there are any.

    Yields whether this rank's writes are kept: for partitioned parameters, only those of rank `changed_by` are.
    """
    if not hasattr(parameters[0], "ds_id"):
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=changed_by):
        yield dist.get_rank() == changed_by


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the full parameter, even if ZeRO-3 holds only a part of it here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gather_whole(model: nn.Module, kinds: list[type[nn.Module]]) -> None:
    """Make ZeRO-3 gather all weights of modules of these classes before their forward pass."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, kinds)
