"""The ranks meet before any process group: who is late is told, and nobody trains otherwise than the others.

They meet in the rendezvous store, with a few requests of each rank whatever their number; only a rank that has to tell
who is missing, or who differs, asks for more.

A launcher of ours gives all ranks one precision. Ranks that were started by hand each ask nvidia-smi, which may time
out in one: that rank alone would train in fp32, or wait on the CPU for ranks that wait on their GPUs. And nodes with a
cache of their own each prepared or fetched their token store, at another time.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from turbolm.errors import UserError
from turbolm.reliability.late import HOSTS, Notices, name_ranks
from turbolm.reliability.outcome import LateRanksError

_calls = itertools.count()  # a process that trains several runs has one store for all of them
_POLL_SEC = 0.2
_LINGER_SEC = 5.0
_DATA = "; token store "
_GRACE_SEC = 30.0  # beyond the timeout, for the word of the rank that watches


def meet_ranks(device: str, precision: str, data: str, timeout_sec: float) -> dist.Store | None:
    """Wait for all ranks. Raises UserError on each if one differs in device, precision or the fingerprint of its token
    store, `data`; LateRanksError if one is missing after `timeout_sec`.

    The store that is returned on rank 0 must live until there is a process group: it may serve the other ranks.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size == 1:
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's own restarts may share a store
    store, key = _connect(rank, world_size, timeout_sec), f"turbolm/start{attempt}.{next(_calls)}"
    num_here = arrive(store, key, rank, f"{device}, {precision}{_DATA}{data}", socket.gethostname())
    if num_here == world_size:
        store.compare_set(f"{key}/verdict", "", _difference_in(store, key) or "same")
    elif num_here == 1:  # not rank 0: it may be the one that is late
        _watch(store, key, world_size, timeout_sec)
    store.wait([f"{key}/verdict"], timedelta(seconds=timeout_sec + _GRACE_SEC))
    verdict = store.get(f"{key}/verdict").decode()
    store.add(f"{key}/read", 1)
    if verdict == "same":
        return store if rank == 0 else None
    if rank == 0:  # the others read it here
        deadline = time.monotonic() + _LINGER_SEC
        while store.add(f"{key}/read", 0) < store.add(f"{key}/arrived", 0) and time.monotonic() < deadline:
            time.sleep(_POLL_SEC)
    if verdict.startswith("late: "):
        raise LateRanksError(verdict.removeprefix("late: "))
    raise UserError(verdict)


def arrive(store: dist.Store, key: str, rank: int, plan: str, host: str) -> int:
    """Leave what the others may need to know of this rank; returns how many ranks are here. Five requests at most."""
    store.set(f"{key}/here/{rank}", host)
    store.append(f"{key}/with/{plan}", f"{rank}|{host}\n")
    if store.add(f"{key}/num/{plan}", 1) == 1:
        store.append(f"{key}/plans", f"{plan}\n")
    return store.add(f"{key}/arrived", 1)


def _connect(rank: int, world_size: int, timeout_sec: float) -> dist.Store:
    """Return the store of torch's rendezvous, which torchrun's agent serves, or else rank 0.

    Not by `rendezvous`, where a rank 0 that serves waits for all others before it can say anything.
    """
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)

    def tell() -> None:
        print(f"turbolm: rank {rank} on {socket.gethostname()} waits for rank 0 at {address}:{port}", flush=True)

    timer = threading.Timer(Notices().next_sec, tell)
    timer.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        timeout, serves = timedelta(seconds=timeout_sec), rank == 0 and not is_served
        store = dist.TCPStore(address, port, world_size, serves, timeout, wait_for_workers=False, multi_tenant=True)
    finally:
        timer.cancel()
    return store


def _watch(store: dist.Store, key: str, world_size: int, timeout_sec: float) -> None:
    """Return once all ranks are there, or after the timeout with that verdict; say meanwhile who is missing."""
    notices, deadline = Notices(), time.monotonic() + timeout_sec
    late = ""
    while (num_here := store.add(f"{key}/arrived", 0)) < world_size:
        is_over = time.monotonic() > deadline
        if is_over or notices.is_due():
            late = name_missing(store, key, world_size)
            waited = f"{notices.waited_sec:.0f} s"
            text = f"{world_size - num_here} of {world_size} ranks have not arrived after {waited}: {late}"
            print(f"turbolm: {text}", flush=True)
        if is_over:
            store.compare_set(f"{key}/verdict", "", f"late: {text}")
            return
        time.sleep(_POLL_SEC)
    if late:
        waited = f"{notices.waited_sec:.0f} s"
        print(f"turbolm: all {world_size} ranks are there after {waited}; late were {late}", flush=True)


def name_missing(store: dist.Store, key: str, world_size: int) -> str:
    """Return the ranks that have not arrived, in words, with the hosts of the launcher or of neighbors that have."""
    missing = {rank for rank in range(world_size) if not store.check([f"{key}/here/{rank}"])}
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if not per_node:
        return name_ranks(missing)
    hosts = dict(enumerate(filter(None, os.environ.get(HOSTS, "").split(","))))
    for node in {rank // per_node for rank in missing} - set(hosts):
        here = [rank for rank in range(node * per_node, (node + 1) * per_node) if rank not in missing]
        if here:
            hosts[node] = store.get(f"{key}/here/{here[0]}").decode()
    return name_ranks(missing, per_node, hosts)


def _difference_in(store: dist.Store, key: str) -> str | None:
    plans = store.get(f"{key}/plans").decode().split("\n")[:-1]
    if len(plans) == 1:
        return None
    return difference({plan: store.get(f"{key}/with/{plan}").decode().split("\n")[:-1] for plan in plans})


def difference(ranks_by_plan: Mapping[str, list[str]]) -> str:
    """Return the line that names the first rank whose plan is not that of most; ranks are given as `RANK|HOST`."""
    usual = max(ranks_by_plan, key=lambda plan: len(ranks_by_plan[plan]))
    odd = [(int(one.partition("|")[0]), one, plan) for plan, all_of in ranks_by_plan.items() for one in all_of]
    rank, one, plan = min(entry for entry in odd if entry[2] != usual)
    who = f"rank {rank} on {one.partition('|')[2]}"
    (means, _, data), (usual_means, _, usual_data) = plan.partition(_DATA), usual.partition(_DATA)
    if means == usual_means:
        return (
            f"execution.cache_dir: {who} has token store {data[:16]}, most ranks have {usual_data[:16]}. Run `turbolm "
            "prepare RECIPE` on every node that has a cache of its own, with the same source files or execution.store"
        )
    return (
        f"train.precision, cluster.device: {who} would train on {means}, most ranks on {usual_means}; nvidia-smi may "
        "have failed there. Set both keys in the recipe instead of auto"
    )
