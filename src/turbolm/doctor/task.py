"""What one node is asked to examine, as its launcher says it. Torch-free."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

PREFLIGHT_ROUNDS = 8  # each node meets that many others: at 64 nodes all 63 rounds would take longer than a minute


@dataclass(frozen=True)
class Task:
    """This node's place among `hosts`, and what is measured.

    `address` is this node's, `head` that of the first node, where all meet at `port`. `num_ranks`: of this node, one a
    GPU. `max_rounds`: of the links between nodes, None for all. A node that has not come after `meet_sec`, or has not
    reported `measure_sec` later, is named as silent.
    """

    node: int
    hosts: tuple[str, ...]
    head: str
    address: str
    port: int
    num_ranks: int
    device: str  # "cpu" or "cuda"
    folders: dict[str, str] = field(default_factory=dict)
    max_rounds: int | None = None
    meet_sec: float = 60
    measure_sec: float = 180

    def dump(self) -> str:
        """As JSON, for a command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> Task:
        """The inverse of `dump`."""
        values = json.loads(text)
        return Task(**{**values, "hosts": tuple(values["hosts"])})
