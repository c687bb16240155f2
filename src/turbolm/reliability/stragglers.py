"""Name the rank that all others wait for, once it has been slower for a while. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_FACTOR = 1.2  # of the median of the other ranks
_COST = 0.05  # of the time of a step: a slow rank that hardly costs anything is not reported
_REPORTS = 3  # in a row, to be told, and to be told that it is over


@dataclass(frozen=True)
class Slowest:
    """The slowest rank of a stretch of steps: its own work against the others' median, and what it cost of a step."""

    rank: int
    factor: float
    cost: float


def find_slowest(own_sec: Sequence[float], stretch_sec: float) -> Slowest:
    """The slowest of two or more ranks, from the seconds of their own work within `stretch_sec` of training."""
    rank = max(range(len(own_sec)), key=lambda index: own_sec[index])
    others = median([seconds for index, seconds in enumerate(own_sec) if index != rank])
    factor = own_sec[rank] / others if others > 0 else 1.0
    return Slowest(rank, factor, (own_sec[rank] - others) / stretch_sec)


class StragglerWatch:
    """Says once when a rank has become slower than the others, and once when it keeps up again."""

    def __init__(self, hosts: Sequence[str]):
        self._hosts = hosts  # by rank
        self._suspect: int | None = None
        self._times_in_a_row = 0
        self._told: int | None = None

    def observe(self, slowest: Slowest) -> str | None:
        """What to say after one more stretch of steps, if anything."""
        is_slow = slowest.factor > _FACTOR and slowest.cost > _COST
        suspect = slowest.rank if is_slow else None
        self._times_in_a_row = self._times_in_a_row + 1 if suspect == self._suspect else 1
        self._suspect = suspect
        if self._times_in_a_row < _REPORTS or suspect == self._told:
            return None
        before, self._told = self._told, suspect
        if suspect is None:
            return f"rank {before} on {self._hosts[before or 0]} keeps up with the others again"
        return (
            f"rank {suspect} on {self._hosts[suspect]} is slower than the others: its own work takes "
            f"{slowest.factor:.2f} times their median, and all wait for it for {slowest.cost:.0%} of a step"
        )
