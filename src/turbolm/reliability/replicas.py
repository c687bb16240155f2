"""Are the copies of the weights on all ranks the same? A flipped bit or a lost message makes them differ silently."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from turbolm.engine.engine import Engine
from turbolm.errors import RunError

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksums(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum, modulo 2^64, of each parameter's bits read as whole numbers: int64 [num_parameters], on the host.

    One flipped bit always changes it.
    """
    sums = [
        parameter.contiguous().view(_WORDS[parameter.element_size()]).sum(dtype=torch.int64)
        for parameter in parameters.values()
    ]
    return torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)


def check_replicas(engine: Engine, step: int, group: dist.ProcessGroup | None) -> None:
    """Raise RunError on every rank when the weights after `step` steps are not the same on all of them.

    Collective, on the host; one pass over the weights and one message of 16 bytes a parameter. At stage 3 each element
    of a large parameter is on one rank alone, so there is nothing to compare it with.
    """
    parameters = engine.replicated_parameters()
    own = checksums(parameters)
    if not len(own):
        return
    extremes = torch.stack([own, ~own])  # the largest complement is that of the smallest
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    different = (extremes[0] != ~extremes[1]).nonzero()[:, 0]
    if not len(different):
        return
    first = int(different[0])
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, int(own[first]), group=group)
    raise RunError(_message(list(parameters)[first], gathered, len(different), step))


def _message(name: str, by_rank: list[int], num_different: int, step: int) -> str:
    most, _ = Counter(by_rank).most_common(1)[0]
    odd = [str(rank) for rank, value in enumerate(by_rank) if value != most]
    common = [str(rank) for rank, value in enumerate(by_rank) if value == most]
    return (
        f"the copies of the weights differ after step {step}: {name} on rank {', '.join(odd)} is not what it is on "
        f"rank {', '.join(common)} ({num_different} parameters differ). Memory, a GPU or a link is at fault. No "
        "checkpoint was written from it; the same command resumes from the last one, best without that rank's machine"
    )
