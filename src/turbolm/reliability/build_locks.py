"""Remove the locks that killed builds of C++ extensions leave behind; later starts would wait forever. Torch-free.

torch builds an extension under a file `lock` in its folder (torch/utils/file_baton.py): the builder creates it, keeps
it open and removes it; all others wait until it is gone. A killed builder removes nothing, and the file names nobody.
But a live builder has it open, and the kernel knows which processes of this host do.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from turbolm.reliability.processes import holders
from turbolm.units import format_duration

_LOCK = "lock"
_RELEASE_SEC = 1.0  # a builder closes the file just before it removes it
_SILENT_SEC = 900.0  # longer than one file takes to compile; for builders that cannot be seen from here
_LOOK_SEC = 5.0
_LOCAL = ("ext2/ext3", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlayfs")


def extensions_root(environment: Mapping[str, str]) -> Path:
    """Where torch builds extensions."""
    if "TORCH_EXTENSIONS_DIR" in environment:
        return Path(environment["TORCH_EXTENSIONS_DIR"])
    cache = environment.get("XDG_CACHE_HOME") or os.path.expanduser(
        "~/.cache"
    )  # where there is no home, torch uses ./~
    return Path(cache) / "torch_extensions"


def clear_stale_locks(root: Path, say: Callable[[str], None], ended: threading.Event | None = None) -> None:
    """Remove the locks whose builders are gone; `say` hears of each, and of each that a start waits for.

    On a file system that other hosts share, or in another user's folder, a builder may be out of sight. A thread
    watches such a lock and removes it when nothing beside it has changed for a quarter of an hour by this process's own
    clock, or ends when `ended` is set.
    """
    unsure = []
    for lock in [*root.glob(f"*/{_LOCK}"), *root.glob(f"*/*/{_LOCK}")]:
        try:
            found = lock.stat()
            builders = holders(lock)
            if not builders:
                time.sleep(_RELEASE_SEC)
                if not os.path.samestat(found, lock.stat()) or holders(lock):
                    continue  # released, and perhaps taken by another builder, meanwhile
            if builders:
                pids = ", ".join(map(str, sorted(builders)))
                say(f"process {pids} builds {lock.parent} just now; what needs it waits")
            elif _is_shared(lock) or found.st_uid != os.geteuid():
                unsure.append(lock)
                say(
                    f"{lock} says that {lock.parent.name} is being built, maybe on another host; what needs it waits. "
                    f"If nobody builds it, remove that file; this start does so after {format_duration(_SILENT_SEC)} "
                    "without a change there"
                )
            else:
                lock.unlink()
                say(f"removed {lock}: the process that was building there has ended without it")
        except OSError:
            continue  # gone meanwhile, or not ours to look at
    if unsure:
        arguments = (unsure, say, ended or threading.Event())
        threading.Thread(target=_watch, args=arguments, name="turbolm-build-locks", daemon=True).start()


def _watch(locks: Sequence[Path], say: Callable[[str], None], ended: threading.Event) -> None:
    """Remove those of the locks beside which nothing changes."""
    states = {lock: (_state(lock.parent), time.monotonic()) for lock in locks}
    while states and not ended.wait(_LOOK_SEC):
        for lock, (before, since) in list(states.items()):
            state = _state(lock.parent)
            if not lock.exists():
                del states[lock]
            elif state != before:
                states[lock] = (state, time.monotonic())
            elif time.monotonic() - since > _SILENT_SEC:
                lock.unlink(missing_ok=True)
                del states[lock]
                say(f"removed {lock}: nothing has changed there for {format_duration(_SILENT_SEC)}")


def _state(folder: Path) -> list[tuple[str, int, int, int]]:
    """What changes in a folder while something is built there."""
    entries = []
    with suppress(OSError):
        for path in folder.iterdir():
            status = path.stat()
            entries.append((path.name, status.st_ino, status.st_size, status.st_mtime_ns))
    return sorted(entries)


def _is_shared(path: Path) -> bool:
    """Whether other hosts may see the path too: whether its file system is none that is known to be local."""
    done = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False)
    return done.stdout.strip() not in _LOCAL
