"""Facts of this node that need no GPU: disks, limits, /dev/shm, versions. Torch-free."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbolm.errors import explain_os_error
from turbolm.files import write_all

_SHM = Path("/dev/shm")
_INFINIBAND = Path("/sys/class/infiniband")
_BLOCK = 4 * 2**20  # bytes written at once
_MAX_BYTES, _MAX_SEC = 64 * 2**20, 1.0  # written to try a disk: the first of both ends it
_PACKAGES = ("turbolm", "torch", "deepspeed", "accelerate", "transformers")


def read_limits() -> dict[str, Any]:
    """Open files and locked memory (bytes), hard limits; None: unlimited. Whether the node has InfiniBand."""
    return {
        "open_files": _limit(resource.RLIMIT_NOFILE),
        "locked_bytes": _limit(resource.RLIMIT_MEMLOCK),
        "infiniband": _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()),
    }


def read_shm() -> dict[str, Any]:
    """Size and room of /dev/shm in bytes."""
    try:
        found = os.statvfs(_SHM)
    except OSError:
        return {"total_bytes": 0, "free_bytes": 0}
    return {"total_bytes": found.f_blocks * found.f_frsize, "free_bytes": found.f_bavail * found.f_frsize}


def read_versions() -> dict[str, str]:
    """Versions of Python, the kernel and the packages that every node must share."""
    versions = {"python": platform.python_version(), "kernel": platform.release()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def read_disks(folders: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Each folder's disk: room, and the rate at which this node writes to it. What fails is its `error`."""
    return {name: _read_disk(Path(folder)) for name, folder in folders.items()}


def _read_disk(folder: Path) -> dict[str, Any]:
    disk: dict[str, Any] = {"path": str(folder), "write_bytes_per_sec": None, "error": None}
    try:
        here = next(path for path in (folder, *folder.parents) if path.exists())  # a run's folder may not be made yet
        found = os.statvfs(here)
        disk |= {
            "total_bytes": found.f_blocks * found.f_frsize,
            "free_bytes": found.f_bavail * found.f_frsize,
            "free_files": found.f_favail if found.f_files else None,  # btrfs and others count none
        }
        disk["write_bytes_per_sec"] = _write_rate(here)
    except OSError as error:
        disk["error"] = explain_os_error(error)
    return disk


def _write_rate(folder: Path) -> float:
    """Bytes per second written and forced to disk. Raises OSError, and leaves no file behind."""
    path = folder / f".turbolm-doctor-{platform.node()}-{os.getpid()}"
    block, written, begun = os.urandom(_BLOCK), 0, time.monotonic()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        while written < _MAX_BYTES and time.monotonic() - begun < _MAX_SEC:
            write_all(file, block)
            written += _BLOCK
        os.fsync(file)
    finally:
        os.close(file)
        path.unlink(missing_ok=True)
    return written / (time.monotonic() - begun)


def _limit(name: int) -> int | None:
    hard = resource.getrlimit(name)[1]
    return None if hard == resource.RLIM_INFINITY else hard
