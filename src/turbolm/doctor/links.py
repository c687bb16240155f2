"""Rates of the links between ranks, in each direction, and how far their clocks are apart (torch.distributed).

All pairs of a round measure at the same time and share no rank, so n ranks need n - 1 rounds and not n (n - 1) / 2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

_FIRST = 2**20  # bytes: a link of 10 Mbit/s takes 0.8 s for them
_SLOW_SEC = 0.3  # a link that takes longer for the first bytes is measured by them alone
_AIM_SEC = 0.2  # the second message is as large as fits in that
_MAX = 2**28  # bytes of it
_PINGS = 5


def rounds(num: int) -> list[list[tuple[int, int]]]:
    """Every pair of `num` players once, in as few rounds as there can be (the circle method)."""
    players: list[int | None] = [*range(num), *([None] if num % 2 else [])]
    plan: list[list[tuple[int, int]]] = []
    for _ in range(len(players) - 1 if num > 1 else 0):
        pairs = zip(players[: len(players) // 2], reversed(players[len(players) // 2 :]), strict=True)
        plan.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        players[1:] = [players[-1], *players[1:-1]]
    return plan


def measure_links(
    ranks: Sequence[int], device: torch.device, say: Callable[[str], None], max_rounds: int | None = None
) -> dict[int, float]:
    """Bytes per second from this rank to each of the other `ranks`, as far as their rounds are measured."""
    me, rates, plan = dist.get_rank(), {}, rounds(len(ranks))[:max_rounds]
    for number, pairs in enumerate(plan):
        say(f"round {number + 1} of {len(plan)}")
        for a, b in ((ranks[a], ranks[b]) for a, b in pairs):
            if me not in (a, b):
                continue
            for source, target in ((a, b), (b, a)):
                if me == source:
                    rates[target] = _send_rate(target, device)
                else:
                    _receive(source, device)
    return rates


def clock_offset(ranks: Sequence[int]) -> float | None:
    """Seconds that this rank's clock is ahead of the first rank's; known to half the time of the quickest round trip.

    Cristian's algorithm. None for a rank that is not among `ranks`.
    """
    me, head = dist.get_rank(), ranks[0]
    if me == head:
        for rank in ranks[1:]:
            for _ in range(_PINGS):
                ask = torch.empty(1, dtype=torch.float64)
                dist.recv(ask, rank)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), rank)
        return 0.0
    if me not in ranks:
        return None

    def head_clock() -> float:
        answer = torch.empty(1, dtype=torch.float64)
        dist.send(answer, head)
        dist.recv(answer, head)
        return float(answer)

    return best_offset(head_clock, time.time)


def best_offset(other_clock: Callable[[], float], own_clock: Callable[[], float]) -> float:
    """How far `own_clock` is ahead of the clock that takes a while to ask, from the quickest of a few questions."""
    found = []
    for _ in range(_PINGS):
        asked = own_clock()
        other = other_clock()
        answered = own_clock()
        found.append((answered - asked, (asked + answered) / 2 - other))
    return min(found)[1]


def _send_rate(peer: int, device: torch.device) -> float:
    _timed_send(peer, 2**16, device)  # opens the connection
    seconds = _timed_send(peer, _FIRST, device)
    size = 0 if seconds > _SLOW_SEC else max(_FIRST, min(int(_FIRST / seconds * _AIM_SEC), _MAX))
    dist.send(torch.tensor([size]), peer)
    return _FIRST / seconds if not size else size / _timed_send(peer, size, device)


def _receive(peer: int, device: torch.device) -> None:
    for size in (2**16, _FIRST):
        _receive_message(peer, size, device)
    size = torch.empty(1, dtype=torch.int64)
    dist.recv(size, peer)
    if int(size):
        _receive_message(peer, int(size), device)


def _timed_send(peer: int, size: int, device: torch.device) -> float:
    """Seconds until the peer has it all: it says so over gloo."""
    data, ready = torch.zeros(size, dtype=torch.uint8, device=device), torch.empty(1)
    dist.recv(ready, peer)  # it has the room to receive
    begun = time.perf_counter()
    _transfer(dist.isend, data, peer)
    dist.recv(ready, peer)
    return time.perf_counter() - begun


def _receive_message(peer: int, size: int, device: torch.device) -> None:
    data = torch.empty(size, dtype=torch.uint8, device=device)
    dist.send(torch.zeros(1), peer)
    _transfer(dist.irecv, data, peer)
    dist.send(torch.zeros(1), peer)


def _transfer(operation: Callable[..., object], data: torch.Tensor, peer: int) -> None:
    """One message; batched, for which NCCL uses the group's communicator instead of making one for each pair."""
    for work in dist.batch_isend_irecv([dist.P2POp(operation, data, peer)]):
        work.wait()
    if data.is_cuda:
        torch.cuda.synchronize(data.device)
