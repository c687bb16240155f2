"""Which CPUs each rank of a node runs on: near its GPU, and no core twice. Torch-free.

Unbound, a rank and its threads wander to the other socket, away from its memory and its GPU. Only CPUs that the process
was given are used, so Slurm's control group and a user's taskset hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

CpuSet = frozenset[int]


def bind_to_gpu(local_rank: int, num_ranks: int, root: Path = Path("/")) -> CpuSet:
    """Bind this process, and the threads that it starts from now on, to its CPUs; returns them."""
    allowed = frozenset(os.sched_getaffinity(0))
    own = rank_cpus(max(num_ranks, local_rank + 1), allowed, gpu_cpus(root), cores_of(root))[local_rank]
    try:
        os.sched_setaffinity(0, own)
    except OSError:  # some sandboxes forbid it: slower, but right
        return allowed
    return own


def rank_cpus(num_ranks: int, allowed: CpuSet, near_gpus: Sequence[CpuSet], core_of: dict[int, int]) -> list[CpuSet]:
    """The CPUs of each of a node's ranks. Ranks whose GPUs have the same CPUs nearby share these evenly.

    `near_gpus` are the CPUs near each rank's GPU; without one for each, or where they are not all `allowed`, all ranks
    share evenly what is allowed. `core_of` maps a CPU to its core: two threads of one core go to one rank. With fewer
    CPUs than ranks nobody is bound.
    """
    if len(allowed) < num_ranks:
        return [allowed] * num_ranks
    near = [cpus & allowed for cpus in near_gpus[:num_ranks]]
    if len(near) < num_ranks or any(len(cpus) < near.count(cpus) for cpus in near) or _overlap(near):
        near = [allowed] * num_ranks
    shares = []
    for rank, cpus in enumerate(near):
        ordered = sorted(cpus, key=lambda cpu: (core_of.get(cpu, cpu), cpu))
        peers, index = near.count(cpus), near[:rank].count(cpus)
        first, end = (len(ordered) * part // peers for part in (index, index + 1))
        shares.append(frozenset(ordered[first:end]))
    return shares


def gpu_cpus(root: Path = Path("/")) -> list[CpuSet]:
    """The CPUs near each GPU that this process may use, in CUDA's order; none where that cannot be known.

    CUDA numbers equal GPUs by their PCI address. UUIDs in CUDA_VISIBLE_DEVICES are not resolved.
    """
    addresses = sorted(path.name.lower() for path in (root / "proc/driver/nvidia/gpus").glob("*"))
    near = [parse_cpus(_read(root / "sys/bus/pci/devices" / address / "local_cpulist")) for address in addresses]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        numbers = [int(entry) if entry.strip().isdigit() else len(near) for entry in visible.split(",")]
        near = [near[number] for number in numbers] if all(number < len(near) for number in numbers) else []
    return near if all(near) else []


def parse_cpus(text: str) -> CpuSet:
    """The CPUs of a kernel's list, such as 0-3,8."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    return frozenset(cpu for first, last in ranges for cpu in range(int(first), int(last or first) + 1))


def _overlap(near: Sequence[CpuSet]) -> bool:
    """Whether two different sets have CPUs in common: a share of each could then be the same core."""
    different = set(near)
    return sum(map(len, different)) > len(frozenset().union(*different))


def cores_of(root: Path) -> dict[int, int]:
    """The first thread of each CPU's core."""
    cores: dict[int, int] = {}
    for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list"):
        cores |= dict.fromkeys(siblings := parse_cpus(_read(path)), min(siblings, default=0))
    return cores


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
