"""Detect this machine's hardware, and resolve a recipe's `auto` values on it. Torch-free.

Planning for another machine (submitting from a login node) passes a `Machine` that describes that one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from turbolm.errors import UserError
from turbolm.recipe.gpus import BF16_CAPABILITY, FP8_CAPABILITY, GPUS
from turbolm.recipe.kernels import kernel_problems
from turbolm.recipe.optimizers import OPTIMIZERS
from turbolm.recipe.schema import Recipe

Device = str  # "cpu" or "cuda"
Precision = str  # "fp32", "bf16" or "fp16"

_NVIDIA_SMI_TIMEOUT_SEC = 30  # the first call on an idle machine loads the driver
_FP16_CAPABILITY = (7, 0)  # DeepSpeed refuses fp16 below Volta
_CPUS_PER_PROCESS = 8  # of a common GPU node; a rank, its prefetch and checkpoint threads, and NCCL's need about 4
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, aarch64


@dataclass(frozen=True)
class Machine:
    """The part of one node that this process may use."""

    num_gpus: int
    gpu_name: str | None
    gpu_compute_capability: tuple[int, int] | None  # None without a GPU, or if the driver does not report it
    num_cpus: int
    cpu_has_bf16: bool
    memory_bytes: int


def detect_machine(root: Path = Path("/")) -> Machine:
    """Detect this machine; /proc, /sys and /dev are read below `root`."""
    names_and_capabilities, num_gpus = _visible_gpus(root)
    name, capability = names_and_capabilities[0] if names_and_capabilities else (None, None)
    return Machine(
        num_gpus=num_gpus,
        gpu_name=name,
        gpu_compute_capability=capability,
        num_cpus=_usable_cpus(root),
        cpu_has_bf16=bool(_BF16_CPU_FLAGS & _cpu_flags(_read(root / "proc/cpuinfo"))),
        memory_bytes=_memory_bytes(root),
    )


def described_machine(recipe: Recipe) -> Machine | None:
    """Return one node of the cluster that the recipe describes, or None if it does not describe one.

    The recipe does not describe the CPU: `num_cpus` is what Slurm is asked for, else one per process.
    """
    cluster = recipe.cluster
    if cluster.gpu is None or cluster.gpus_per_node is None or cluster.device == "cpu":
        return None
    gpu = GPUS[cluster.gpu]
    asked = cluster.slurm.cpus_per_task if cluster.slurm else None
    return Machine(
        num_gpus=cluster.gpus_per_node,
        gpu_name=f"NVIDIA {gpu.driver_name}",
        gpu_compute_capability=gpu.compute_capability,
        num_cpus=asked or cluster.gpus_per_node,
        cpu_has_bf16=False,
        memory_bytes=0,
    )


def cpu_request_note(recipe: Recipe) -> str | None:
    """Return the warning about a Slurm job whose ranks would share one core, or None."""
    cluster, slurm = recipe.cluster, recipe.cluster.slurm
    on_gpus = cluster.gpus_per_node if cluster.device != "cpu" else None
    num_processes = on_gpus if cluster.processes_per_node == "auto" else cluster.processes_per_node
    if slurm is None or slurm.exclusive or not num_processes or (slurm.cpus_per_task or 1) >= num_processes:
        return None
    asked = f"is {slurm.cpus_per_task}" if slurm.cpus_per_task else "is not set, and Slurm then gives a task one CPU"
    return (
        f"cluster.slurm.cpus_per_task {asked} (unless the cluster says otherwise, as with DefCpuPerGPU): the "
        f"{num_processes} processes of a node would share it; set it to what the node has for them, such as "
        f"{_CPUS_PER_PROCESS * num_processes}, or cluster.slurm.exclusive: true"
    )


def missing_package(recipe: Recipe) -> str | None:
    """Return the message for a package that the recipe needs and that is not installed, or None."""
    name, cure = recipe.optimizer.name, "turbolm[optimizers]"
    needed = [(OPTIMIZERS[name].package, f"optimizer.name {name}", cure)]
    if recipe.train.fp8 != "off":
        needed.append(("torchao", f"train.fp8 {recipe.train.fp8}", cure))
    if recipe.execution.loss == "liger":
        needed.append(("liger_kernel", "execution.loss liger", "turbolm[liger]"))
    if recipe.execution.attention == "flash":
        needed.append(("flash_attn", "execution.attention flash", "flash-attn"))
    needed += [(tracker, f"logging.trackers {tracker}", tracker) for tracker in recipe.logging.trackers]
    for package, what, cure in needed:
        if package is not None and importlib.util.find_spec(package) is None:
            return f"{what} needs the package {package}; install it with: pip install '{cure}'"
    return None


def check_machine(recipe: Recipe, machine: Machine) -> None:
    """Raise UserError if this node's GPUs are not those that the recipe describes, or a package is missing."""
    missing = missing_package(recipe)
    if missing is not None:
        raise UserError(missing)
    cluster = recipe.cluster
    if cluster.gpu is None or cluster.device == "cpu":
        return
    if machine.num_gpus != cluster.gpus_per_node:
        raise UserError(
            f"cluster.gpus_per_node is {cluster.gpus_per_node}, but {machine.num_gpus} GPUs are visible on this node; "
            f"set cluster.gpus_per_node={machine.num_gpus or 'null cluster.gpu=null'}, or run where the recipe says"
        )
    name = machine.gpu_name  # unknown to old drivers
    if name and not GPUS[cluster.gpu].matches(name):
        raise UserError(f"cluster.gpu is {cluster.gpu}, but this node has {name}; set cluster.gpu to what is here")


def resolve_device(recipe: Recipe, machine: Machine) -> Device:
    """Return `cuda` if there is a GPU, unless the recipe says otherwise."""
    wanted = recipe.cluster.device
    if wanted == "cuda" and machine.num_gpus == 0:
        raise UserError("cluster.device is cuda, but no GPU is visible here; set cluster.device=cpu or auto")
    if wanted == "auto":
        return "cuda" if machine.num_gpus else "cpu"
    return wanted


def resolve_processes_per_node(recipe: Recipe, machine: Machine, device: Device) -> int:
    """Return one process per GPU; without a GPU two, to use the distributed code path, or one on a single core."""
    wanted = recipe.cluster.processes_per_node
    if device == "cuda":
        if wanted == "auto":
            return machine.num_gpus
        if wanted > machine.num_gpus:
            raise UserError(
                f"cluster.processes_per_node is {wanted}, but only {machine.num_gpus} GPUs are visible here; "
                "each process needs its own"
            )
        return wanted
    if wanted == "auto":
        return min(2, machine.num_cpus)
    return wanted


def resolve_precision(recipe: Recipe, machine: Machine, device: Device) -> Precision:
    """Return bf16 if the hardware supports it, else fp32, unless the recipe says otherwise."""
    wanted = recipe.train.precision
    if wanted == "auto":  # stage 0 trains in fp32
        return "bf16" if recipe.execution.zero_stage > 0 and _computes_in_bf16(machine, device) else "fp32"
    if wanted == "fp32":
        return wanted
    if wanted == "fp16" and device == "cpu":
        raise UserError("train.precision=fp16 needs a GPU; set bf16 or fp32")
    needed = BF16_CAPABILITY if wanted == "bf16" else _FP16_CAPABILITY
    capability = machine.gpu_compute_capability
    if device == "cuda" and capability is not None and capability < needed:
        raise UserError(
            f"train.precision={wanted} needs a GPU of compute capability {needed[0]}.{needed[1]}, "
            f"but {machine.gpu_name} has {capability[0]}.{capability[1]}"
        )
    return wanted


def check_fp8(recipe: Recipe, machine: Machine, device: Device, precision: Precision) -> None:
    """Raise UserError if `train.fp8` cannot work."""
    fp8, capability = recipe.train.fp8, machine.gpu_compute_capability
    if fp8 == "off":
        return
    if device == "cpu":
        raise UserError(f"train.fp8={fp8} needs a GPU, and this run is on the CPU; set train.fp8=off")
    if precision != "bf16":
        raise UserError(f"train.fp8={fp8} needs bf16, and this run is in {precision}; set train.fp8=off")
    if capability is not None and capability < FP8_CAPABILITY:
        raise UserError(
            f"train.fp8={fp8} needs a GPU of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} (Hopper) or "
            f"later, but {machine.gpu_name} has {capability[0]}.{capability[1]}; set train.fp8=off, which leaves bf16"
        )


def check_kernels(recipe: Recipe, machine: Machine, device: Device, precision: Precision) -> None:
    """Raises UserError, a line for each key of the execution plan whose kernel does not work here."""
    found = kernel_problems(
        recipe.execution.attention,
        recipe.execution.loss,
        device=device,
        precision=precision,
        gpu=machine.gpu_name,
        capability=machine.gpu_compute_capability,
    )
    if problems := [f"{key}: {problem}" for key, problem in found]:
        raise UserError("\n".join(problems))


def _computes_in_bf16(machine: Machine, device: Device) -> bool:
    if device == "cpu":
        return machine.cpu_has_bf16
    return machine.gpu_compute_capability is not None and machine.gpu_compute_capability >= BF16_CAPABILITY


# --------------------------------------------------------------------------------------------------------------- GPUs


def _visible_gpus(root: Path) -> tuple[list[tuple[str, tuple[int, int] | None]], int]:
    """Return (name, compute capability) of each visible GPU as far as known, and the number of visible GPUs."""
    rows = _query_gpus()
    num_present = len(rows) or _list_gpus() or len(_device_files(root))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or num_present == 0:
        return rows, num_present
    indexes: list[int] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.startswith(("GPU-", "MIG-")):
            indexes.append(0)  # a UUID; which row it is does not matter on a node with one kind of GPU
        elif entry.isdigit() and int(entry) < num_present:
            indexes.append(int(entry))
        else:
            break  # CUDA ignores everything after the first entry that names no device, such as -1
    return [rows[index] for index in indexes if index < len(rows)], len(indexes)


def _query_gpus() -> list[tuple[str, tuple[int, int] | None]]:
    rows = []
    for line in nvidia_smi("--query-gpu=name,compute_cap", "--format=csv,noheader").splitlines():
        name, _, capability = line.rpartition(",")
        match = re.fullmatch(r"\s*(\d+)\.(\d+)\s*", capability)
        if name:
            rows.append((name.strip(), (int(match[1]), int(match[2])) if match else None))
    return rows


def _list_gpus() -> int:
    """Count the GPUs that `nvidia-smi -L` lists: drivers before 510 do not report the compute capability."""
    return sum(line.startswith("GPU ") for line in nvidia_smi("-L").splitlines())


def nvidia_smi(*arguments: str) -> str:
    """Return the output of nvidia-smi, or "" if it is missing, hangs or fails."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_SEC, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _device_files(root: Path) -> list[Path]:
    return [path for path in root.glob("dev/nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]


# ----------------------------------------------------------------------------------------------------- CPUs and memory


def _usable_cpus(root: Path) -> int:
    """Return the cores of this process's affinity mask, within the CPU quota of its control groups."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    usable = float(affinity)
    for folder in _cgroup_folders(root):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            usable = min(usable, int(quota) / int(period))
    return max(1, int(usable))


def _memory_bytes(root: Path) -> int:
    """Return the memory of the machine, within the limits of this process's control groups."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    limits = [int(match[1]) * 1024] if match else []
    for folder in _cgroup_folders(root):
        limit = _read(folder / "memory.max").strip()
        if limit.isdigit():
            limits.append(int(limit))
    return min(limits, default=0)


def _cgroup_folders(root: Path) -> list[Path]:
    """Yield this process's version-2 control group and its parents: the limit of any of them applies."""
    match = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE)
    top = root / "sys/fs/cgroup"
    own = Path(match[1]) if match else Path()
    if ".." in own.parts:  # as seen from a container's namespace
        own = Path()
    return [top / own, *(top / above for above in own.parents)]


def _cpu_flags(cpuinfo: str) -> set[str]:
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return set(match[1].split()) if match else set()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
