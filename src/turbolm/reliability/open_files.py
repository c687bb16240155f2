"""Open files: raise the limit at start, and refuse a world whose process groups do not fit in it. Torch-free."""

from __future__ import annotations

import os
import resource

from turbolm.errors import UserError

# A gloo group costs every rank a connection to each rank of the group, itself included, and a few files of its own
# (measured with torch 2.13 on 2 to 8 ranks).
_FILES_OF_A_GROUP = 3
_RESERVE = 96  # logs, checkpoints, shards, the rendezvous store: opened after the groups


def raise_open_files() -> None:
    """Raise this process's limit of open files to its hard limit; its children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def num_gloo_groups(device: str) -> int:
    """Return how many gloo groups of all ranks a rank makes, DeepSpeed's own included.

    Everywhere one for the host-side agreements (on a CPU the default group), whose tagged messages also serve the
    checkpoint threads; on a CPU DeepSpeed's copy of the default group as well.
    """
    return 2 if device == "cpu" else 1


def gloo_sharing(device: str, shared_by: int) -> int:
    """Return the ranks of the gloo group in which a rank shares its sequences; 0 without, or where NCCL serves it."""
    return shared_by if device == "cpu" and shared_by > 1 else 0


def files_needed(world_size: int, num_groups: int, num_sharing: int = 0) -> int:
    """Return how many files a rank opens besides those it starts with: for `num_groups` gloo groups of all ranks, and
    for one of `num_sharing`.

    Rank 0 may serve the rendezvous store, to which every rank is connected; all count it, to refuse together.
    """
    sharing = num_sharing + _FILES_OF_A_GROUP if num_sharing else 0
    return num_groups * (world_size + _FILES_OF_A_GROUP) + sharing + world_size + _RESERVE


def check_open_files(world_size: int, num_groups: int, num_sharing: int = 0) -> None:
    """Raise UserError where the gloo groups of `files_needed` need more open files than this process may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    need = len(os.listdir("/proc/self/fd")) + files_needed(world_size, num_groups, num_sharing)
    if limit != resource.RLIM_INFINITY and need > limit:
        raise UserError(
            f"a rank of {world_size} needs {need} open files, and the limit is {limit} (RLIMIT_NOFILE, hard); raise it "
            f"with `ulimit -Hn {need}`, LimitNOFILE of slurmd, or /etc/security/limits.conf"
        )
