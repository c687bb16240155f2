"""What all ranks do together on the host: what fails on one of them fails on all, so that none waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from turbolm.errors import UserError
from turbolm.reliability import heartbeat

Agree = Callable[[Any], list[Any]]


def gather_over(group: dist.ProcessGroup | None) -> Agree:
    """What every rank gave, by rank, over a host-side process group."""

    def agree(value: Any) -> list[Any]:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        with heartbeat.awaiting_others():
            dist.all_gather_object(gathered, value, group=group)
        return gathered

    return agree


def in_step(agree: Agree, action: Callable[[], Any] | None, error: type[Exception] = RuntimeError) -> list[Any]:
    """Do this rank's part and wait for the others'; returns what each gave, by rank.

    Raises `error` on all ranks with what any failed with.
    """
    result, failure = None, None
    try:
        result = action() if action else None
    except UserError as reason:
        failure = str(reason)
    except Exception as reason:  # whatever it was, the other ranks must not wait for this one
        failure = f"{type(reason).__name__}: {reason}"
    outcomes = agree((failure, result))
    failures = told_of([failure for failure, _ in outcomes])
    if failures:
        raise error(failures)
    return [result for _, result in outcomes]


def told_of(by_rank: list[str | None]) -> str:
    """What any rank failed with; the same text for ranks with the same reason is said once."""
    ranks: dict[str, list[str]] = {}
    for rank, failure in enumerate(by_rank):
        if failure:
            ranks.setdefault(failure, []).append(str(rank))
    return "; ".join(f"rank {', '.join(numbers)}: {failure}" for failure, numbers in ranks.items())
