"""Which elements of which parameter this rank owns, at any ZeRO stage.

Stages 1 and 2 flatten the parameters of a group and give each rank one contiguous partition of the fp32 copy; a
parameter may straddle two ranks. Stage 3 gives each rank an equal part of every parameter, padded at the end. Stage 0
keeps everything everywhere. All three come out as a list of `Fragment`s, so that saving and loading know no stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name`, as this rank's optimizer holds them.

    `flat` is the fp32 tensor that the optimizer steps on (and the key of its state); the fragment is
    flat.view(-1)[offset : offset + numel].
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: torch.Tensor
    offset: int

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """This fragment's elements of `flat` or of a state tensor of the same shape, 1-D, sharing memory."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def own_fragments(engine: Any) -> list[Fragment]:
    """Every fragment that this rank's optimizer updates."""
    stage = engine.zero_optimization_stage()
    finder = {0: _whole_parameters, 1: _partition_fragments, 2: _partition_fragments, 3: _shard_fragments}[stage]
    return list(finder(engine))


def is_written_here(engine: Any, index: int) -> bool:
    """Whether this rank writes its `index`-th fragment: all of them, except at stage 0 where the ranks take turns."""
    return engine.zero_optimization_stage() > 0 or index % dist.get_world_size() == dist.get_rank()


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's ZeRO wrapper (at stage 0 there is none)."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def flats_of_group(engine: Any, group: int) -> list[torch.Tensor]:
    """The tensors that the optimizer steps on in one of its parameter groups."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return list(zero.param_groups[group]["params"])
    if stage in (1, 2):
        return [_groups_and_flats(zero)[1][group]]
    sub_groups = [sub for sub, owner in enumerate(zero.fp32_partitioned_groups_flat) if owner is not None]
    return [zero.fp32_partitioned_groups_flat[sub] for sub in sub_groups if zero.sub_group_to_group_id[sub] == group]


@torch.no_grad()
def publish_weights(engine: Any) -> None:
    """Copy the fp32 weights in the optimizer to the parameters that the model computes with. Collective."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        zero.empty_partition_cache()  # whole parameters that a forward pass left gathered would stay as they were
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        zero.invalidate_secondary_tensor()  # hpZ's second copy, which the next forward pass would gather instead
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The whole shape of every parameter by name; tied parameters appear once."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}


def _whole_parameters(engine: Any) -> Iterator[Fragment]:
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield Fragment(name, tuple(parameter.shape), 0, parameter.numel(), parameter, 0)


def _partition_fragments(engine: Any) -> Iterator[Fragment]:
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for group, flat in zip(*_groups_and_flats(engine.optimizer), strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                address = mapping.get_hp_fragment_address()
                start = mapping.lp_fragment_address.start
                shape = tuple(parameter.shape)
                yield Fragment(names[id(parameter)], shape, start, address.numel, flat, address.start)


def _groups_and_flats(zero: Any) -> tuple[list[list[nn.Parameter]], list[torch.Tensor]]:
    """The parameters of each group and this rank's fp32 partition of them; bf16 on stage 1 has a class of its own."""
    if hasattr(zero, "bf16_groups"):
        return zero.bf16_groups, zero.fp32_groups_flat_partition
    return zero.bit16_groups, zero.single_partition_of_fp32_groups


def _shard_fragments(engine: Any) -> Iterator[Fragment]:
    zero = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        sub_group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        start = zero._get_param_partition_rank(parameter) * parameter.partition_numel()
        shape = tuple(parameter.ds_shape)
        numel = min(parameter.partition_numel(), math.prod(shape) - start)  # the last ranks' parts are padded
        if numel > 0:
            yield Fragment(name, shape, start, numel, zero.fp32_partitioned_groups_flat[sub_group], offset)


def stepped_partitions(engine: Any) -> list[torch.Tensor]:
    """The flat partitions that this rank's optimizer steps, in the order all ranks step them; none at stage 0."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return []
    flats = _groups_and_flats(zero)[1] if stage in (1, 2) else zero.fp32_partitioned_groups_flat
    return [flat for flat in flats if flat is not None]
