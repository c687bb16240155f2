"""Compare what each rank resolved by itself, before it decides about process groups and weights.

A launcher of ours gives all ranks one precision. Ranks that were started by hand each ask nvidia-smi, which may time
out in one: that rank alone would train in fp32, or wait on the CPU for ranks that wait on their GPUs.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import rendezvous

from turbolm.errors import UserError

_calls = itertools.count()  # a process that trains several runs has one store for all of them


def check_same_plan(device: str, precision: str, timeout_sec: float) -> None:
    """Raise UserError on every rank if one differs in its device or precision. Collective, before any process group."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    timeout = timedelta(seconds=timeout_sec)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    key = f"turbolm/plan{next(_calls)}"
    store.set(f"{key}/{rank}", f"{device}, {precision}|{socket.gethostname()}")
    if rank == 0:
        found = [store.get(f"{key}/{other}").decode().rsplit("|", 1) for other in range(world_size)]
        store.set(f"{key}/verdict", difference([one for one, _ in found], [host for _, host in found]) or "same")
    verdict = store.get(f"{key}/verdict").decode()
    if verdict != "same":
        raise UserError(verdict)


def difference(plans: Sequence[str], hosts: Sequence[str]) -> str | None:
    """Return the line that names the first rank whose plan is not that of most, or None."""
    usual = Counter(plans).most_common(1)[0][0]
    for rank, (plan, host) in enumerate(zip(plans, hosts, strict=True)):
        if plan != usual:
            return (
                f"train.precision, cluster.device: rank {rank} on {host} would train on {plan}, most ranks on {usual}; "
                "nvidia-smi may have failed there. Set both keys in the recipe instead of auto"
            )
    return None
