"""What all ranks do together on the host: what fails on one of them fails on all, so that none waits for ever."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from turbolm.errors import UserError
from turbolm.reliability import heartbeat

Agree = Callable[[Any], list[Any]]
_TAG = 7001  # of the checkpoint threads' messages; nothing else here sends any


def gather_over(group: dist.ProcessGroup | None) -> Agree:
    """What every rank gave, by rank, over a host-side process group."""

    def agree(value: Any) -> list[Any]:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        with heartbeat.awaiting_others():
            dist.all_gather_object(gathered, value, group=group)
        return gathered

    return agree


def gather_by_messages(group: dist.ProcessGroup | None) -> Agree:
    """What every rank gave, by rank, for a thread beside the one that uses `group`'s collective operations.

    Tagged messages to rank 0 and back never mix with those, so the thread needs no group, and no files, of its own.
    """

    def agree(value: Any) -> list[Any]:
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        with heartbeat.awaiting_others():
            if rank > 0:
                _send(value, 0, group)
                return list(_receive(0, group))
            gathered = [value, *(_receive(other, group) for other in range(1, num_ranks))]
            for other in range(1, num_ranks):
                _send(gathered, other, group)
        return gathered

    return agree


def _send(value: Any, to: int, group: dist.ProcessGroup | None) -> None:
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    dist.send(torch.tensor([len(content)]), to, group, _TAG)
    dist.send(content, to, group, _TAG)


def _receive(sender: int, group: dist.ProcessGroup | None) -> Any:
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, sender, group, _TAG)
    content = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(content, sender, group, _TAG)
    return json.loads(content.numpy().tobytes())


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
