"""Which elements of which parameter this rank owns, at any ZeRO stage.

Stages 1 and 2 flatten the parameters of a group and give each rank one contiguous partition of the fp32 copy; a
parameter may straddle two ranks. Stage 3 gives each rank an equal part of every parameter, padded at the end. Stage 0
keeps everything on every rank. All stages are described as `Fragment`s, so saving and loading are the same at every
stage.

`zero` is DeepSpeed's optimizer: of stage 3, of stages 1 and 2, of stage 1 in bf16 (a class of its own), or at stage 0
the torch optimizer itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name`, as this rank's optimizer holds them.

    `flat` is the fp32 tensor that the optimizer steps (and the key of its state); the fragment is
    flat.view(-1)[offset : offset + numel].
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: torch.Tensor
    offset: int

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a 1-D view of this fragment's elements in `flat` or in a state tensor of the same shape."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def own_fragments(stage: int, module: nn.Module, zero: Any) -> Iterator[Fragment]:
    """Return every fragment that this rank's optimizer updates."""
    find = {0: _whole_parameters, 1: _partition_fragments, 2: _partition_fragments, 3: _shard_fragments}[stage]
    return find(module, zero)


def flats_of_groups(stage: int, zero: Any) -> list[list[torch.Tensor]]:
    """Return the tensors that this rank's optimizer steps, by parameter group, in the order that all ranks use."""
    if stage == 0:
        return [list(group["params"]) for group in zero.param_groups]
    if stage in (1, 2):
        return [[flat] for flat in _groups_and_flats(zero)[1]]
    groups: list[list[torch.Tensor]] = [[] for _ in zero.optimizer.param_groups]
    for sub_group, flat in enumerate(zero.fp32_partitioned_groups_flat):
        if flat is not None:
            groups[zero.sub_group_to_group_id[sub_group]].append(flat)
    return groups


@torch.no_grad()
def publish_weights(stage: int, zero: Any) -> None:
    """Copy the optimizer's fp32 weights to the parameters that the model computes with. Collective."""
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        zero.empty_partition_cache()  # a forward pass may have left parameters gathered, with their old values
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        zero.invalidate_secondary_tensor()  # hpZ's second copy, which the next forward pass would gather instead
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def own_part(parameter: torch.Tensor, fragment: Fragment) -> torch.Tensor:
    """Return a 1-D view of the fragment's elements in `parameter`, which is full or partitioned in the same way."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.view(-1)[: fragment.numel]
    return parameter.view(-1)[fragment.start : fragment.start + fragment.numel]


def _whole_parameters(module: nn.Module, _: Any) -> Iterator[Fragment]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield Fragment(name, tuple(parameter.shape), 0, parameter.numel(), parameter, 0)


def _partition_fragments(module: nn.Module, zero: Any) -> Iterator[Fragment]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group, flat in zip(*_groups_and_flats(zero), strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                address = mapping.get_hp_fragment_address()
                start = mapping.lp_fragment_address.start
                shape = tuple(parameter.shape)
                yield Fragment(names[id(parameter)], shape, start, address.numel, flat, address.start)


def _groups_and_flats(zero: Any) -> tuple[list[list[nn.Parameter]], list[torch.Tensor]]:
    """Yield the parameters of each group and this rank's fp32 partition of them."""
    if hasattr(zero, "bf16_groups"):
        return zero.bf16_groups, zero.fp32_groups_flat_partition
    return zero.bit16_groups, zero.single_partition_of_fp32_groups


def _shard_fragments(module: nn.Module, zero: Any) -> Iterator[Fragment]:
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        sub_group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        start = zero._get_param_partition_rank(parameter) * parameter.partition_numel()
        shape = tuple(parameter.ds_shape)
        numel = min(parameter.partition_numel(), math.prod(shape) - start)  # the last ranks' parts are padded
        if numel > 0:
            yield Fragment(name, shape, start, numel, zero.fp32_partitioned_groups_flat[sub_group], offset)
