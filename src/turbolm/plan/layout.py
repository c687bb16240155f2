"""How ZeRO lays out parameters: groups of the optimizer, flat tensors, and their parts on each rank. Torch-free."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from turbolm.plan.profile import Tensor
from turbolm.recipe.optimizers import Optimizer
from turbolm.recipe.schema import Recipe

ALIGNMENT = 2  # elements of each rank's part of a flat group at stages 1 and 2: nccl_start_alignment_factor
FLATTENED_ELEMENTS = 500_000_000  # MEMORY_OPT_ALLREDUCE_SIZE: stage 0, and stage 1 in bf16
_DECAYED = ("matrix", "expert", "head")
_MULTIPLIERS = {"embedding": "embeddings", "head": "head", "matrix": "matrices", "expert": "matrices"}


def optimizer_groups(tensors: Sequence[Tensor], recipe: Recipe) -> list[list[Tensor]]:
    """Return the parameter groups of `optim.groups.build_param_groups`."""
    groups: dict[tuple[bool, bool, float, str], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        kind = _MULTIPLIERS.get(tensor.kind, "vectors")
        lr_kind = kind if kind in recipe.schedule.own_decays else ""
        lr_scale = getattr(recipe.optimizer.lr_scales, kind)
        key = not is_assembled(tensor, recipe.optimizer), tensor.kind not in _DECAYED, lr_scale, lr_kind
        groups[key].append(tensor)
    return [groups[key] for key in sorted(groups)]


def is_assembled(tensor: Tensor, optimizer: Optimizer) -> bool:
    """Return whether the optimizer needs the whole matrix (`optim.exchange`)."""
    return _MULTIPLIERS.get(tensor.kind, "vectors") in optimizer.assembled and len(tensor.shape) > 1


def sub_groups(group: Sequence[Tensor], world_size: int, limit: int) -> list[list[Tensor]]:
    """Cut a group of stage 3 where the elements on a rank reach `sub_group_size`; each is one flat tensor there."""
    found: list[list[Tensor]] = [[]]
    held = 0
    for tensor in group:
        if held >= limit:
            found.append([])
            held = 0
        found[-1].append(tensor)
        held += -(-tensor.num_parameters // world_size)
    return found


def numels(tensors: Iterable[Tensor]) -> list[int]:
    """Return the elements of each tensor."""
    return [tensor.num_parameters for tensor in tensors]


def padded(elements: int, multiple: int) -> int:
    """Return the next multiple."""
    return -(-elements // multiple) * multiple


def until_above(sizes: Iterable[int], limit: int) -> Iterator[int]:
    """Add up sizes, and cut where the sum exceeds `limit`."""
    total = 0
    for size in sizes:
        total += size
        if total > limit:
            yield total
            total = 0
    if total:
        yield total


def parts_by_rank(flat: Sequence[Tensor], zero_stage: int, world_size: int) -> Iterator[dict[int, int]]:
    """Return how many elements of each tensor of a flat one are on each rank that has any."""
    if zero_stage == 3:
        for tensor in flat:
            numel = tensor.num_parameters
            part = -(-numel // world_size)
            yield {rank: min(part, numel - rank * part) for rank in range(-(-numel // part))}
        return
    part = padded(sum(numels(flat)), ALIGNMENT * world_size) // world_size
    start = 0
    for tensor in flat:
        end = start + tensor.num_parameters
        ranks = range(start // part, (end - 1) // part + 1)
        yield {rank: min(end, (rank + 1) * part) - max(start, rank * part) for rank in ranks}
        start = end


def matrix_moves(flat: Sequence[Tensor], zero_stage: int, world_size: int) -> list[tuple[int, dict[int, int]]]:
    """Return of each matrix of a flat tensor its owner, and the elements of it on each rank that has any."""
    holders = {
        tensor.name: parts for tensor, parts in zip(flat, parts_by_rank(flat, zero_stage, world_size), strict=True)
    }
    owners = matrix_owners({tensor.name: tensor.shape for tensor in flat}, holders)
    return [(owners[name], parts) for name, parts in holders.items()]


def matrix_owners(shapes: Mapping[str, Sequence[int]], holders: Mapping[str, Mapping[int, int]]) -> dict[str, int]:
    """Return the rank that orthogonalizes each matrix under Muon; every rank computes the same.

    `holders` has the elements of each matrix on each rank. A matrix goes to a rank that has at least half as much of it
    as the one with most, and of these to the one with the least work so far.
    """
    owners: dict[str, int] = {}
    load: dict[int, float] = defaultdict(float)
    for name, parts in holders.items():
        most = max(parts.values())
        owner = min((rank for rank, numel in parts.items() if 2 * numel >= most), key=lambda rank: load[rank])
        owners[name] = owner
        load[owner] += math.prod(shapes[name]) * min(shapes[name][-2:])  # the cost of a Newton-Schulz iteration
    return owners
