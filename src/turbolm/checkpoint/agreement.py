"""How ranks exchange values on the host: over a process group's collective operations, or by tagged messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from turbolm.checkpoint.ranks import Agree
from turbolm.reliability import heartbeat

_TAG = 7001  # of the checkpoint threads' messages; nothing else here sends any


class _Collective(Agree):
    """Over a host-side process group's collective operations."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, value: Any) -> list[Any] | None:
        gathered: list[Any] | None = [None] * self.num_ranks if self.rank == 0 else None
        with heartbeat.awaiting_others():
            dist.gather_object(value, gathered, group=self.group, group_dst=0)
        return gathered

    def scatter(self, values: Sequence[Any] | None) -> Any:
        own: list[Any] = [None]
        with heartbeat.awaiting_others():
            dist.scatter_object_list(own, None if values is None else list(values), group=self.group, group_src=0)
        return own[0]

    def __call__(self, value: Any) -> list[Any]:
        everything: list[Any] = [None] * self.num_ranks
        with heartbeat.awaiting_others():
            dist.all_gather_object(everything, value, group=self.group)
        return everything


class _Messages(Agree):
    """Over tagged messages to rank 0 and back, of values that JSON holds."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, value: Any) -> list[Any] | None:
        with heartbeat.awaiting_others():
            if self.rank > 0:
                _send(value, 0, self.group)
                return None
            return [value, *(_receive(other, self.group) for other in range(1, self.num_ranks))]

    def scatter(self, values: Sequence[Any] | None) -> Any:
        with heartbeat.awaiting_others():
            if values is None:
                return _receive(0, self.group)
            for other in range(1, self.num_ranks):
                _send(values[other], other, self.group)
        return values[0]


def gather_over(group: dist.ProcessGroup | None) -> Agree:
    """Exchange over a host-side process group, by default the one of all ranks."""
    return _Collective(group)


def gather_by_messages(group: dist.ProcessGroup | None) -> Agree:
    """Exchange for a thread beside the one that uses `group`'s collective operations.

    Tagged messages never mix with those, so the thread needs no group, and no files, of its own.
    """
    return _Messages(group)


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
