"""Divide this machine among jobs that run side by side: cores, or GPUs with the cores near them. Torch-free."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from turbolm.errors import UserError
from turbolm.plan.affinity import CpuSet, cores_of, gpu_cpus, rank_cpus
from turbolm.plan.machine import Machine, resolve_device
from turbolm.recipe.schema import Recipe


@dataclass(frozen=True)
class Share:
    """What one job may use; `gpus` as CUDA_VISIBLE_DEVICES names them, none for jobs on the CPU."""

    cpus: CpuSet
    gpus: tuple[str, ...] = ()


def share_machine(
    recipe: Recipe, machine: Machine, num_jobs: int, root: Path = Path("/")
) -> tuple[Machine, list[Share]]:
    """The machine as each of `num_jobs` jobs of a recipe sees it, and the share of each.

    All jobs get as many cores and GPUs as the others; what is left over stays idle. Raises UserError where the machine
    is too small.
    """
    if num_jobs == 1:
        return machine, [Share(frozenset(os.sched_getaffinity(0)))]
    on_gpus = resolve_device(recipe, machine) == "cuda"
    wanted, available = recipe.cluster.processes_per_node, machine.num_gpus if on_gpus else machine.num_cpus
    each = available // num_jobs if wanted == "auto" else wanted
    if each * num_jobs > available or not each:
        each, what = max(1, each), "GPUs" if on_gpus else "cores"
        raise UserError(
            f"--jobs {num_jobs}: {num_jobs} runs of {each} processes (cluster.processes_per_node={wanted}) need "
            f"{num_jobs * each} {what}, and {available} are here; use --jobs {max(1, available // each)} at most, or "
            "fewer processes"
        )
    num_cpus = max(1, machine.num_cpus // num_jobs)
    allowed, cores = frozenset(os.sched_getaffinity(0)), cores_of(root)
    part = replace(machine, num_cpus=num_cpus, memory_bytes=machine.memory_bytes // num_jobs)
    if not on_gpus:
        shares = rank_cpus(num_jobs, allowed, (), cores)
        return part, [Share(_first(cpus, num_cpus, cores)) for cpus in shares]
    near = rank_cpus(each * num_jobs, allowed, gpu_cpus(root), cores)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(available)] if visible is None else visible.replace(" ", "").split(",")
    groups = [range(first, first + each) for first in range(0, each * num_jobs, each)]
    return replace(part, num_gpus=each), [
        Share(frozenset().union(*(near[index] for index in group)), tuple(names[index] for index in group))
        for group in groups
    ]


def _first(cpus: CpuSet, count: int, core_of: dict[int, int]) -> CpuSet:
    """The first `count` CPUs, core by core: the control group may allow fewer than the affinity mask has."""
    return frozenset(sorted(cpus, key=lambda cpu: (core_of.get(cpu, cpu), cpu))[:count])
