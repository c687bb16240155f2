"""What the environment may decide: the list of variables that a launcher's children and sbatch do not get. Torch-free.

turbolm starts the world of ranks itself, as the recipe says. What another launcher or scheduler exported (torchrun,
Kubeflow, MPI, an outer srun) describes another world, and Accelerate's settings would change what is trained. Such
variables are dropped, and one line names them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path

# The world of ranks: torch.distributed, torchrun (PET_*: defaults of its options), MPI and PMI launchers, DeepSpeed.
_WORLD = re.compile(
    r"MASTER_(ADDR|PORT)|(LOCAL_|GROUP_|ROLE_|NODE_|CROSS_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|CROSS_SIZE|ROLE_NAME|"
    r"NNODES|NPROC|NPROC_PER_NODE|NCCL_COMM_ID|FORK_LAUNCHED|DS_ACCELERATOR|DLTS_\w+|"
    r"(PET|TORCHELASTIC|OMPI|PMI|PMIX|MV2_COMM_WORLD|MPI_LOCALNRANKS|MPI_LOCALRANKID)(_\w+)?"
)
# Accelerate's settings, by which it would choose precision, torch.compile, FSDP and so on.
_SETTINGS = re.compile(r"(ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_\w+")
_KEPT_SETTINGS = {"ACCELERATE_LOG_LEVEL"}
# What Slurm says of the job as a whole stays (the run lock reads some of it); of a step and its tasks it does not.
_SLURM_JOB = re.compile(r"SLURM_(JOB_\w+|JOBID|ARRAY_\w+|SUBMIT_\w+|CONF\w*|CLUSTER\w*|RESTART_COUNT|TMPDIR)")
# What says how sbatch itself works, on whichever machine it is called.
_SLURM_CLIENT = re.compile(r"SLURM_(CONF|CONF_SERVER|CLUSTERS|TIME_FORMAT|BITSTR_LEN|DEBUG_FLAGS|JWT|SACK_\w+)")
# A user's defaults of where to submit, by the directive that a recipe may set instead. All other variables of sbatch
# would overrule the job's script.
_SUBMIT_DEFAULTS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_CONSTRAINT": "constraint",
}


def children_environment(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The environment without what would change the world of ranks or the training, and the names that were dropped."""
    dropped = [name for name in environment if _is_foreign(name)]
    return {name: value for name, value in environment.items() if name not in dropped}, sorted(dropped)


def use_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Let torch's CUDA allocator grow its segments, so that lengths that change do not fragment the memory.

    Before torch is imported: it reads this once. What the user has set, by either name, stays. Where the platform lacks
    it, torch warns and does without.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in environment:
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def use_flight_recorder(environment: MutableMapping[str, str], attempt_folder: Path | None) -> None:
    """Let torch record the last collective operations of every process group, and write them where they time out.

    NCCL's are then in `<attempt_folder>/nccl_trace.rank<k>`, for `torchfrtrace --prefix nccl_trace.rank FOLDER`. Names
    as torch 2.11 to 2.13 read them (FlightRecorder.hpp, ProcessGroupNCCL.hpp), older ones of the same thing second;
    what the user has set, by either name, stays.
    """
    wanted = [
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
        (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
    ]
    if attempt_folder is not None:
        prefix = str(attempt_folder.absolute() / "nccl_trace.rank")
        wanted.append((("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), prefix))
    for names, value in wanted:
        if not any(name in environment for name in names):
            environment[names[0]] = value


def sbatch_environment(environment: Mapping[str, str], directives: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The environment that sbatch and the job get, as on a login node, and the names that were dropped.

    `directives` are the options that the job's script sets; a variable would overrule them.
    """
    in_job = "SLURM_JOB_ID" in environment

    def stays(name: str) -> bool:
        if name.startswith("SLURM_"):
            return _SLURM_CLIENT.fullmatch(name) is not None
        if name.startswith("SBATCH_"):
            return not in_job and name in _SUBMIT_DEFAULTS and _SUBMIT_DEFAULTS[name] not in directives
        return not _is_foreign(name)

    dropped = [name for name in environment if not stays(name)]
    return {name: value for name, value in environment.items() if name not in dropped}, sorted(dropped)


def drop_foreign(environment: MutableMapping[str, str] = os.environ, *, in_own_step: bool = False) -> None:
    """Drop what `children_environment` drops from this process's environment, and say so in one line.

    `in_own_step`: srun started this process for this very world, so what Slurm and PMI say is expected and not named.
    """
    _, dropped = children_environment(environment)
    for name in dropped:
        del environment[name]
    tell_dropped([n for n in dropped if not in_own_step or not n.startswith(("SLURM_", "PMI_", "PMIX_"))])


def drop_accelerate_settings(environment: MutableMapping[str, str] = os.environ) -> None:
    """Drop what would choose precision, torch.compile, FSDP and so on in a rank that something else started."""
    for name in [name for name in environment if _is_setting(name)]:
        del environment[name]


def cpu_environment() -> dict[str, str]:
    """What keeps a run on the CPU off the GPUs of its machine; it must be set before torch and DeepSpeed are imported.

    Without it Accelerate takes the GPU, every rank leaves a CUDA context there, and DeepSpeed plans for CUDA.
    """
    return {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}


def tell_dropped(names: Collection[str]) -> None:
    """One line on standard error that names the variables; nothing where there are none."""
    if names:
        print(f"turbolm: not passed on, since the recipe decides: {', '.join(names)}", file=sys.stderr, flush=True)


def _is_foreign(name: str) -> bool:
    if name.startswith("SLURM_"):
        return _SLURM_JOB.fullmatch(name) is None
    return _is_setting(name) or _WORLD.fullmatch(name) is not None or name.startswith("SBATCH_")


def _is_setting(name: str) -> bool:
    return _SETTINGS.fullmatch(name) is not None and name not in _KEPT_SETTINGS
