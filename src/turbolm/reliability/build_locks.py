"""Remove the locks that killed builds of C++ extensions leave behind; later starts would wait forever. Torch-free.

torch builds an extension under a file `lock` in its folder (torch/utils/file_baton.py): the builder creates it, keeps
it open and removes it; all others wait until it is gone. A killed builder removes nothing, and the file names nobody.
But a live builder has it open, and the kernel knows which processes of this host do.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from turbolm.reliability.processes import holders
from turbolm.units import format_duration

_LOCK = "lock"
_RELEASE_SEC = 1.0  # a builder closes the file just before it removes it
_SILENT_SEC = 900.0  # longer than one file takes to compile; for builders that cannot be seen from here
_LOCAL = ("ext2/ext3", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlayfs")


def extensions_root(environment: Mapping[str, str]) -> Path:
    """Where torch builds extensions."""
    if "TORCH_EXTENSIONS_DIR" in environment:
        return Path(environment["TORCH_EXTENSIONS_DIR"])
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def clear_stale_locks(root: Path) -> list[str]:
    """Remove the locks whose builders are gone; returns a message for each, and for each that a start waits for.

    On a file system that other hosts share, or in another user's folder, a builder may be out of sight: there a lock
    is left until nothing was written beside it for a quarter of an hour.
    """
    messages = []
    for lock in [*root.glob(f"*/{_LOCK}"), *root.glob(f"*/*/{_LOCK}")]:
        try:
            found = lock.stat()
            builders = holders(lock)
            if not builders:
                time.sleep(_RELEASE_SEC)
                if not os.path.samestat(found, lock.stat()) or holders(lock):
                    continue  # released, and perhaps taken by another builder, meanwhile
            silent_sec = time.time() - _last_write(lock.parent)
            if builders:
                pids = ", ".join(map(str, sorted(builders)))
                messages.append(f"process {pids} builds {lock.parent} just now; what needs it waits")
            elif (_is_shared(lock) or found.st_uid != os.geteuid()) and silent_sec < _SILENT_SEC:
                left = format_duration(_SILENT_SEC - silent_sec)
                messages.append(
                    f"{lock} says that {lock.parent.name} is being built, maybe on another host; what needs it waits. "
                    f"If nobody builds it, remove that file; a start does so {left} from now"
                )
            else:
                lock.unlink()
                messages.append(f"removed {lock}: the process that was building there has ended without it")
        except OSError:
            continue  # gone meanwhile, or not ours to look at
    return messages


def _last_write(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)


def _is_shared(path: Path) -> bool:
    """Whether other hosts may see the path too: whether its file system is none that is known to be local."""
    done = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False)
    return done.stdout.strip() not in _LOCAL
