"""One rank of the examination. All ranks meet at a TCP store of rank 0, which needs no shared file system.

Keys: node/<n> what a node is; go who takes part; stage/<n>.<k> what a rank is at; facts/<n>.<k> what it found; report.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from turbolm.doctor.compare import make_report
from turbolm.doctor.gpus import read_gpus
from turbolm.doctor.host import read_disks, read_limits, read_shm, read_versions
from turbolm.doctor.links import clock_offset, measure_links
from turbolm.doctor.measure import matmul_flops, memory_rate
from turbolm.doctor.task import Task
from turbolm.redaction import redact

_POLL_SEC = 0.1
_GROUP_SEC = 30  # of one message between ranks; the rest of the time is for naming who did not answer
_LINGER_SEC = 10  # rank 0 keeps the store for the others' last question


def run_rank(task: Task, local: int) -> dict[str, Any] | None:
    """Examine as rank `local` of this node; returns the report on the first rank of each node. Raises RuntimeError."""
    is_head = task.node == 0 and local == 0
    patience = timedelta(seconds=task.meet_sec + task.measure_sec)
    store = dist.TCPStore(
        task.head, task.port, is_master=is_head, wait_for_workers=False, timeout=timedelta(seconds=task.meet_sec)
    )
    store.set_timeout(patience)
    if local == 0:
        store.set(f"node/{task.node}", json.dumps({"num_ranks": task.num_ranks}))
    if is_head:
        store.set("go", json.dumps(_gather_nodes(store, task)))
    go = json.loads(store.get("go"))
    takes_part = task.node in go["nodes"] and local < go["num_ranks"]
    if takes_part:
        store.set(f"facts/{task.node}.{local}", json.dumps(_examine(store, task, local, go)))
    if is_head:
        store.set("report", json.dumps(_conclude(store, task, go)))
    if local:
        return None
    report = json.loads(store.get("report"))
    store.set(f"done/{task.node}", "")
    if is_head:
        _wait(store, [f"done/{node}" for node in go["nodes"]], _LINGER_SEC)
    return report


def _gather_nodes(store: dist.TCPStore, task: Task) -> dict[str, Any]:
    """Who takes part: the nodes that came in time, with as many ranks each as the smallest has."""
    keys = [f"node/{node}" for node in range(len(task.hosts))]
    _wait(store, keys, task.meet_sec)
    sizes = {node: json.loads(store.get(key))["num_ranks"] for node, key in enumerate(keys) if store.check([key])}
    _tell(f"{len(sizes)} of {len(task.hosts)} nodes answer")
    return {"nodes": sorted(sizes), "num_ranks": min(sizes.values()), "sizes": sizes, "begun": time.time()}


def _examine(store: dist.TCPStore, task: Task, local: int, go: dict[str, Any]) -> dict[str, Any]:
    def at(stage: str) -> None:
        store.set(f"stage/{task.node}.{local}", stage)
        if task.node == 0 and local == 0:
            _tell(stage)

    cuda = task.device == "cuda" and torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    facts: dict[str, Any] = {"node": task.node, "local": local, "device": device.type, "error": None, "sent": {}}
    if local == 0:
        facts |= {"versions": _versions(), "limits": read_limits(), "shm": read_shm()}
    at("matrix products and memory")
    try:
        with ThreadPoolExecutor(1) as beside:  # nvidia-smi looks while the GPUs work
            gpus = beside.submit(read_gpus) if local == 0 else None
            torch.set_num_threads(1)
            facts |= {"matmul_flops": matmul_flops(device), "memory_bytes_per_sec": memory_rate(device)}
            facts["gpus"] = gpus.result() if gpus else []
        _measure_world(store, task, local, go, device, facts, at)
    except RuntimeError as error:  # of torch: this device, or a peer, does not work
        facts["error"] = redact(str(error).partition("\n")[0])[:300]
    if local == 0:
        at("disks")  # last: a file system that hangs must not keep the others from measuring
        facts["disks"] = read_disks(task.folders)
    at("done")
    return facts


def _measure_world(
    store: dist.TCPStore,
    task: Task,
    local: int,
    go: dict[str, Any],
    device: torch.device,
    facts: dict[str, Any],
    at: Callable[[str], None],
) -> None:
    """Links and clocks, into `facts`."""
    nodes, num = go["nodes"], go["num_ranks"]
    if len(nodes) * num == 1:
        return
    place = nodes.index(task.node)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("world", store),
        rank=place * num + local,
        world_size=len(nodes) * num,
        timeout=timedelta(seconds=_GROUP_SEC),
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.all_reduce(torch.zeros(1, device=device))  # makes NCCL's communicator, of all ranks
    at("clocks")
    facts["clock_offset_sec"] = clock_offset([index * num for index in range(len(nodes))])
    groups = {"links in the node": range(place * num, place * num + num), "links": range(local, len(nodes) * num, num)}
    for what, ranks in groups.items():
        limit = task.max_rounds if what == "links" else None
        rates = measure_links(ranks, device, partial(_say, at, what), limit)
        facts["sent"] |= {f"{nodes[rank // num]}.{rank % num}": rate for rank, rate in rates.items()}


def _say(at: Callable[[str], None], what: str, text: str) -> None:
    at(f"{what}, {text}")


def _versions() -> dict[str, str]:
    versions = read_versions() | {"cuda": str(torch.version.cuda or "none")}
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def _conclude(store: dist.TCPStore, task: Task, go: dict[str, Any]) -> dict[str, Any]:
    """The report, from all that arrives in time."""
    names = [f"{node}.{local}" for node in go["nodes"] for local in range(go["num_ranks"])]
    left_sec = max(1.0, go["begun"] + task.measure_sec - time.time())
    _wait(store, [f"facts/{name}" for name in names], left_sec)
    facts, stages = [], {}
    for name in names:
        if store.check([f"facts/{name}"]):
            facts.append(json.loads(store.get(f"facts/{name}")))
        elif store.check([f"stage/{name}"]):
            stages[name] = store.get(f"stage/{name}").decode()
    return make_report(task, {int(node): size for node, size in go["sizes"].items()}, facts, stages)


def _wait(store: dist.TCPStore, keys: list[str], limit_sec: float) -> None:
    """Wait until all keys are there, or for `limit_sec`."""
    deadline = time.monotonic() + limit_sec
    with suppress(RuntimeError):
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(_POLL_SEC)


def _tell(text: str) -> None:
    print(f"doctor: {text}", file=sys.stderr, flush=True)
