"""Find where an adapted recipe will run: this machine, or a cluster that a file in recipes/_clusters describes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.errors import UserError
from turbolm.plan.machine import Machine, described_machine, detect_machine
from turbolm.recipe.gpus import GPUS, find_gpu
from turbolm.recipe.load import load_piece
from turbolm.recipe.schema import Recipe
from turbolm.shipped import shipped


@dataclass(frozen=True)
class Target:
    """The `cluster` section of the recipe, in words and as values."""

    words: str
    cluster: dict[str, Any]

    @property
    def may_grow(self) -> bool:
        """Whether it stands for as many nodes as a job asks for."""
        return "slurm" in self.cluster

    @property
    def device(self) -> str:
        """cpu or cuda."""
        wanted = self.cluster.get("device", "auto")
        if wanted == "auto":
            return "cuda" if self.cluster.get("gpu") or detect_machine().num_gpus else "cpu"
        return str(wanted)

    def with_nodes(self, num_nodes: int) -> Target:
        """The same kind of nodes, another number."""
        return Target(self.words, {**self.cluster, "num_nodes": num_nodes})


def find_target(name: str | None) -> Target:
    """Return the cluster of that name, or this machine. Raises UserError.

    A name is that of a file in recipes/_clusters, the path of such a file, or a GPU with how many: 8xH100-80GB.
    """
    if name is None:
        return Target("this machine, whatever it has", {})
    folder = shipped("recipes", "_clusters")
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    gpu = re.fullmatch(r"(?:(\d+)x)?(.+)", name)
    if name in known or name.endswith((".yaml", ".yml")):
        path = folder / f"{name}.yaml" if name in known else Path(name)
        cluster = load_piece(path).get("cluster")
        if not isinstance(cluster, dict):
            raise UserError(f"--cluster: {path} has no `cluster` section")
        return Target(f"the cluster {name}", cluster)
    if gpu and gpu[2] in GPUS and int(gpu[1] or 1) > 0:
        count = int(gpu[1] or 1)
        values = {"num_nodes": 1, "gpus_per_node": count, "gpu": gpu[2], "device": "cuda"}
        return Target(f"one node of {count} {gpu[2]}", values)
    raise UserError(
        f"--cluster: {name!r} is none of {', '.join(known)} (recipes/_clusters), no path of a .yaml file like those, "
        f"and no GPU with its number, such as 8x{next(iter(GPUS))} ({', '.join(GPUS)})"
    )


def machine_of(recipe: Recipe) -> Machine:
    """Return one node of what the recipe describes, or this machine."""
    return described_machine(recipe) or detect_machine()


def memory_bytes(recipe: Recipe, machine: Machine, num_processes: int) -> int | None:
    """Return the memory for one process: its GPU's, or its share of this machine's. None for an unknown GPU."""
    if recipe.cluster.gpu is not None:
        return GPUS[recipe.cluster.gpu].memory_bytes
    if machine.num_gpus == 0 or recipe.cluster.device == "cpu":
        return machine.memory_bytes // num_processes
    gpu = find_gpu(machine.gpu_name)
    return None if gpu is None else gpu.memory_bytes
