"""Say who is late while the nodes and ranks of a job gather: rarely, and in a bounded line. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

HOSTS = "TURBOLM_HOSTS"  # in the ranks' environment: the job's hosts by node number, with commas
_FIRST_NOTICE_SEC, _MAX_NOTICE_SEC = 30.0, 600.0
_MAX_NAMED = 8


@dataclass
class Notices:
    """When to say who is late: after 30 s, and then at intervals that double up to 10 minutes."""

    clock: Callable[[], float] = time.monotonic
    num_told: int = 0
    _begun: float = field(init=False)
    next_sec: float = field(init=False, default_factory=lambda: _FIRST_NOTICE_SEC)  # since the begin

    def __post_init__(self) -> None:
        self._begun = self.clock()

    @property
    def waited_sec(self) -> float:
        return self.clock() - self._begun

    def is_due(self) -> bool:
        """Return whether to say it now; the answer is yes once for each notice."""
        if self.waited_sec < self.next_sec:
            return False
        self.next_sec += min(_FIRST_NOTICE_SEC * 2 ** (self.num_told + 1), _MAX_NOTICE_SEC)
        self.num_told += 1
        return True


def name_some(names: Sequence[str]) -> str:
    """Return `a, b, c`; of many names the first and how many more there are."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def name_ranks(ranks: Collection[int], ranks_per_node: int = 0, hosts: Mapping[int, str] | None = None) -> str:
    """Return `ranks 8-15 (node03), 64`: runs of neighbors on one node, with the node's host where `hosts` knows it.

    `ranks_per_node` is 0 where it is not known.
    """
    runs: list[tuple[int, int, int]] = []  # of one node
    for node, of_node in groupby(sorted(ranks), key=lambda rank: rank // ranks_per_node if ranks_per_node else 0):
        for rank in of_node:
            if runs and runs[-1][0] == node and runs[-1][2] == rank - 1:
                runs[-1] = (node, runs[-1][1], rank)
            else:
                runs.append((node, rank, rank))
    known = (hosts or {}) if ranks_per_node else {}
    shown = runs[:_MAX_NAMED]
    words = [
        (f"{first}" if first == last else f"{first}-{last}") + (f" ({known[node]})" if node in known else "")
        for node, first, last in shown
    ]
    more = len(ranks) - sum(last - first + 1 for _, first, last in shown)
    text = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(words)
    return text + (f" and {more} more" if more else "")
