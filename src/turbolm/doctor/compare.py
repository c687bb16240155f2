"""Findings from what the nodes measured: which one stands out, and what to do. Torch-free, and pure.

A value stands out when it is below `SLOW` of the median of all, and further from it than 5 robust standard deviations
(1.4826 MAD), so that a cluster whose values scatter is not blamed. `fail` ends a preflight, `warn` does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from turbolm.doctor.task import Task
from turbolm.recipe.gpus import peak_flops
from turbolm.reliability.open_files import files_needed, num_gloo_groups
from turbolm.units import format_bytes

VERSION = 1  # of the report
SLOW = {"cuda": 0.85, "cpu": 0.5}  # of the median: matrix products, memory; GPUs of one kind differ by a few percent
SLOW_LINK = 0.33  # of the median of the nodes' best links, and of the opposite direction
PEAK_SHARE = 0.5  # of the data sheet; a healthy GPU reaches 0.6 to 0.8 in a large bf16 product
MIN_FREE_BYTES = 2**30
SLOW_DISK = 0.2  # of the median
MAX_SKEW_SEC = 2.0
MIN_SHM_BYTES = 2**30
MIN_LOCKED_BYTES = 2**30
_SAME = ("turbolm", "torch", "cuda", "nccl", "deepspeed")  # versions that must agree; of others it is worth a warning

_LOAD = (("sm_mhz", "MHz"), ("sm_max_mhz", "MHz at most"), ("temperature_c", "°C"))


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `severity` is fail or warn; `gpu` is None where it concerns the node."""

    severity: str
    check: str
    host: str
    gpu: int | None
    message: str
    advice: str


def make_report(
    task: Task, sizes: Mapping[int, int], facts: Sequence[Mapping[str, Any]], stages: Mapping[str, str]
) -> dict[str, Any]:
    """The report, whose keys are stable. `stages`: what ranks that reported nothing were at."""
    nodes = []
    for number, host in enumerate(task.hosts):
        ranks = [fact for fact in facts if fact["node"] == number]
        first = next((fact for fact in ranks if fact["local"] == 0), {})
        about = {key: first.get(key) for key in ("versions", "limits", "shm", "disks", "gpus", "clock_offset_sec")}
        keys = ("local", "device", "matmul_flops", "memory_bytes_per_sec", "error")
        measured = [{key: rank.get(key) for key in keys} for rank in ranks]
        nodes.append(
            {"host": host, "num_ranks": sizes.get(number), "answered": bool(ranks), **about, "ranks": measured}
        )
    links = [
        {
            "from": task.hosts[fact["node"]],
            "from_rank": fact["local"],
            "to": task.hosts[int(to.partition(".")[0])],
            "to_rank": int(to.partition(".")[2]),
            "bytes_per_sec": rate,
        }
        for fact in facts
        for to, rate in fact["sent"].items()
    ]
    silent = _silent(task, sizes, facts, stages)
    here = [node for node in nodes if node["answered"]]
    findings = [*silent, *_devices(here, task), *_links(links), *_disks(here), *_system(here, task), *_versions(here)]
    return {
        "version": VERSION,
        "ok": not any(one.severity == "fail" for one in findings),
        "silent": sorted({one.host for one in silent}),
        "nodes": nodes,
        "links": links,
        "findings": [asdict(one) for one in findings],
    }


def describe_rate(key: str, rate: float) -> str:
    """A device's rate with its unit."""
    unit = "FLOP/s" if key == "matmul_flops" else "B/s"
    return f"{rate / 1e12:.3g} T{unit}" if rate >= 1e12 else f"{rate / 1e9:.3g} G{unit}"


def outliers(values: Mapping[Any, float], factor: float) -> list[Any]:
    """The keys whose value stands out by being small."""
    if len(values) < 2:
        return []
    middle = median(values.values())
    spread = 1.4826 * median(abs(value - middle) for value in values.values())
    if len(values) == 2:  # the median lies between both: compare with the larger
        middle, spread = max(values.values()), 0.0
    return [key for key, value in values.items() if value < factor * middle and middle - value > 5 * spread]


def _silent(task: Task, sizes: Mapping[int, int], facts: Any, stages: Mapping[str, str]) -> list[Finding]:
    found, told = [], {(fact["node"], fact["local"]) for fact in facts}
    advice = "look whether the node is up (`sinfo -N`, its console), and exclude it (cluster.slurm.exclude)"
    num = min(sizes.values(), default=0)
    for node, host in enumerate(task.hosts):
        if node not in sizes:
            found.append(Finding("fail", "answer", host, None, f"did not answer within {task.meet_sec:.0f} s", advice))
        elif missing := [local for local in range(num) if (node, local) not in told]:
            at = stages.get(f"{node}.{missing[0]}", "start")
            message = f"went silent at: {at} (nothing within {task.measure_sec:.0f} s)"
            found.append(Finding("fail", "answer", host, None, message, advice))
        elif sizes[node] < max(sizes.values()):
            message = f"has {sizes[node]} GPUs or processes where others have {max(sizes.values())}"
            found.append(
                Finding("fail", "count", host, None, message, "look for a GPU that is lost: nvidia-smi, dmesg")
            )
    return found


def _devices(nodes: Sequence[Mapping[str, Any]], task: Task) -> list[Finding]:
    found = [one for node in nodes for one in _gpu_states(node)]
    for key, what in (("matmul_flops", "matrix products"), ("memory_bytes_per_sec", "memory")):
        ranks = {(node["host"], one["local"]): one for node in nodes for one in node["ranks"] if one[key]}
        on_cpu = any(one["device"] == "cpu" for one in ranks.values())
        rates = {place: one[key] for place, one in ranks.items()}
        for host, local in outliers(rates, SLOW["cpu" if on_cpu else "cuda"]):
            share = rates[host, local] / median(rates.values())
            message = f"{what}: {describe_rate(key, rates[host, local])}, {share:.0%} of the others' median"
            advice = (
                "look for other jobs, heat and a power limit there (nvidia-smi -q -d PERFORMANCE); exclude the node"
            )
            severity = "warn" if on_cpu else "fail"  # cores are shared with whatever else runs there
            found.append(Finding(severity, key, host, None if on_cpu else local, message, advice))
    for node in nodes:
        for rank in node["ranks"]:
            if rank["error"]:
                local = rank["local"] if rank["device"] == "cuda" else None
                advice = "look at dmesg there; a link that fails names both its ends"
                found.append(Finding("fail", "error", node["host"], local, rank["error"], advice))
        if task.device == "cuda" and any(rank["device"] == "cpu" for rank in node["ranks"]):
            advice = "install the CUDA build of torch (launch/setup.sh), or a driver that it works with"
            found.append(Finding("fail", "torch", node["host"], None, "torch sees no GPU here", advice))
    return found


def _gpu_states(node: Mapping[str, Any]) -> list[Finding]:
    found = []
    by_local = {rank["local"]: rank for rank in node["ranks"] if rank["device"] == "cuda"}
    for number, gpu in enumerate(node["gpus"] or ()):

        def add(severity: str, check: str, message: str, advice: str, index: int = number) -> None:
            found.append(Finding(severity, check, node["host"], index, message, advice))

        if gpu["throttled"]:
            state = [f"{gpu[key]:.0f} {unit}" for key, unit in _LOAD if gpu[key] is not None]
            message = f"throttled ({', '.join(gpu['throttled'])}): {', '.join(state)}"
            add("fail", "throttle", message, "check cooling and power supply of the node; exclude it until then")
        if gpu["ecc_uncorrected"]:
            message = f"{gpu['ecc_uncorrected']:.0f} uncorrected ECC errors since the driver was loaded"
            add("fail", "ecc", message, "drain the node and reset the GPU (nvidia-smi -r); replace it if they return")
        if gpu.get("rows_failed"):
            add("fail", "ecc", "a memory row could not be remapped", "have the GPU replaced")
        if gpu.get("rows_pending"):
            add("warn", "ecc", "a memory row waits to be remapped", "reset the GPU (nvidia-smi -r) when it is idle")
        rank = by_local.get(number)
        peak = peak_flops(gpu["name"], "bf16") or peak_flops(gpu["name"], "fp16")
        if rank and rank["matmul_flops"] and peak and rank["matmul_flops"] < PEAK_SHARE * peak:
            share = rank["matmul_flops"] / peak
            message = f"matrix products reach {share:.0%} of the data sheet's {peak / 1e12:.0f} TFLOP/s"
            add("warn", "data_sheet", message, "compare clocks and power limit with the data sheet (nvidia-smi -q)")
    return found


def _links(links: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Slow nodes by their best link in each direction, then single slow links between others."""
    between = [link for link in links if link["from"] != link["to"]]
    found, slow = [], set()
    advice = "check cable, port, speed and duplex of its network interface (ethtool, ibstat), or exclude the node"
    for end, word in (("from", "sends to"), ("to", "receives from")):
        best: dict[str, float] = {}
        for link in between:
            best[link[end]] = max(best.get(link[end], 0.0), link["bytes_per_sec"])
        for host in outliers(best, SLOW_LINK) if len(best) > 2 else ():
            slow.add(host)
            message = (
                f"{word} every other node at {_bits(best[host])} at most; the nodes' median is "
                f"{_bits(median(best.values()))}"
            )
            found.append(Finding("fail", "link", host, None, message, advice))
    for others in (between, [link for link in links if link["from"] == link["to"]]):
        rates = {
            index: link["bytes_per_sec"] for index, link in enumerate(others) if not {link["from"], link["to"]} & slow
        }
        for index in outliers(rates, SLOW_LINK):
            link = others[index]
            ends = f"{link['from']} rank {link['from_rank']} to {link['to']} rank {link['to_rank']}"
            message = (
                f"the link from {ends} carries {_bits(rates[index])}; the median is {_bits(median(rates.values()))}"
            )
            found.append(Finding("warn", "link", link["from"], None, message, advice))
    return found


def _disks(nodes: Sequence[Mapping[str, Any]]) -> list[Finding]:
    found = []
    for name in sorted({name for node in nodes for name in node["disks"] or ()}):
        disks = {node["host"]: node["disks"][name] for node in nodes if node["disks"]}
        rates = {host: disk["write_bytes_per_sec"] for host, disk in disks.items() if disk["write_bytes_per_sec"]}
        for host, disk in disks.items():
            where = f"{name} folder {disk['path']}"
            if disk["error"]:
                found.append(Finding("fail", "disk", host, None, f"{where}: {disk['error']}", "fix it on that node"))
            elif disk["free_bytes"] < MIN_FREE_BYTES or disk["free_files"] == 0:
                left = format_bytes(disk["free_bytes"]) if disk["free_files"] != 0 else "no file (inodes)"
                message = f"{where}: {left} left; at least {format_bytes(MIN_FREE_BYTES)} is needed"
                found.append(Finding("fail", "disk", host, None, message, "free some space, or choose another folder"))
        for host in outliers(rates, SLOW_DISK):
            message = (
                f"{name} folder {disks[host]['path']}: writes {format_bytes(rates[host])}/s, the median is "
                f"{format_bytes(median(rates.values()))}/s"
            )
            found.append(Finding("warn", "disk", host, None, message, "look for another writer, or a failing disk"))
    return found


def _system(nodes: Sequence[Mapping[str, Any]], task: Task) -> list[Finding]:
    found = []
    need = files_needed(len(task.hosts) * task.num_ranks, num_gloo_groups(task.device))
    for node in nodes:
        limits, shm, host = node["limits"], node["shm"], node["host"]
        if limits is None:
            continue
        if limits["open_files"] is not None and limits["open_files"] < need:
            message = f"at most {limits['open_files']} open files (hard limit); these ranks need about {need}"
            found.append(Finding("fail", "open_files", host, None, message, "raise nofile in limits.conf, or slurmd's"))
        if limits["infiniband"] and limits["locked_bytes"] is not None and limits["locked_bytes"] < MIN_LOCKED_BYTES:
            message = f"at most {format_bytes(limits['locked_bytes'])} of locked memory, which InfiniBand needs"
            found.append(Finding("warn", "locked_memory", host, None, message, "set memlock to unlimited for slurmd"))
        if shm["total_bytes"] < MIN_SHM_BYTES:
            message = f"/dev/shm holds {format_bytes(shm['total_bytes'])}; NCCL and the loader use it"
            found.append(Finding("warn", "shm", host, None, message, "start the container with a larger --shm-size"))
    offsets = {node["host"]: node["clock_offset_sec"] for node in nodes if node["clock_offset_sec"] is not None}
    middle = median(offsets.values()) if offsets else 0.0
    for host, offset in offsets.items():
        if abs(offset - middle) > MAX_SKEW_SEC:
            message = f"its clock is {offset - middle:+.1f} s off the others'"
            found.append(Finding("warn", "clock", host, None, message, "start chrony or ntpd there"))
    return found


def _versions(nodes: Sequence[Mapping[str, Any]]) -> list[Finding]:
    found = []
    by_host = {node["host"]: dict(node["versions"]) for node in nodes if node["versions"]}
    for node in nodes:
        if node["host"] in by_host and node["gpus"]:
            by_host[node["host"]]["driver"] = node["gpus"][0]["driver"]
    for name in sorted({name for versions in by_host.values() for name in versions}):
        counts = Counter(versions.get(name, "none") for versions in by_host.values())
        usual = counts.most_common(1)[0][0]
        for host, versions in by_host.items():
            if (here := versions.get(name, "none")) != usual:
                severity = "fail" if name in _SAME else "warn"
                message = f"{name} {here}; {counts[usual]} of {len(by_host)} nodes have {usual}"
                found.append(Finding(severity, "versions", host, None, message, "install the same on all nodes"))
    return found


def _bits(bytes_per_sec: float) -> str:
    bits = bytes_per_sec * 8
    return f"{bits / 1e9:.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mbit/s"
