"""Models whose parameters ZeRO-3 partitions while they are built.

DeepSpeed is imported where it is used: examining a model must not take seconds longer for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def building(ds_config: dict[str, Any] | None) -> AbstractContextManager[Any]:
    """Within it each process keeps only its part of every new parameter; None: parameters stay whole."""
    if ds_config is None:
        return nullcontext()
    import deepspeed
    from deepspeed.utils import groups

    # DeepSpeed makes the process group of hpZ at the first model of a process and refuses to make it again; random
    # restarts build more models.
    is_hierarchical = ds_config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
    existing = groups._get_zero_param_intra_parallel_group() if is_hierarchical else None
    return deepspeed.zero.Init(config_dict_or_path=ds_config, zero_param_parallel_group=existing)


@contextmanager
def gathered(parameters: Sequence[nn.Parameter], changed_by: int | None = None) -> Iterator[bool]:
    """Within it partitioned parameters are whole. Collective where there are any.

    Yields whether what this rank writes to them is kept: of partitioned ones that of rank `changed_by` alone.
    """
    if not hasattr(parameters[0], "ds_id"):
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=changed_by):
        yield dist.get_rank() == changed_by


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, of which ZeRO-3 may hold a part here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gather_whole(model: nn.Module, kinds: list[type[nn.Module]]) -> None:
    """Have ZeRO-3 gather the weights of modules of these classes at once, before their forward pass."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, kinds)
