"""Process information from /proc (Linux only; elsewhere nothing is known). Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None when it does not run."""
    fields = _fields(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def living(started: Mapping[int, str | None]) -> list[int]:
    """Those of the processes that still run, by when each was started."""
    return [pid for pid, when in started.items() if when is not None and start_time(pid) == when]


def process_state(pid: int) -> str:
    """The letter that `ps` shows: R runs, S sleeps, D waits for a device, T is stopped; "" when it does not run."""
    fields = _fields(pid)
    return "" if fields is None else fields[0]


def parent_of(pid: int) -> int | None:
    """The process that started it, or that inherited it; None when it does not run."""
    fields = _fields(pid)
    return None if fields is None else int(fields[1])


def command_of(pid: int) -> list[str]:
    """The command line of a process; empty when it does not run."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []


def descendants(pids: set[int]) -> set[int]:
    """Children, grandchildren and so on of these processes that still run."""
    fields = {int(path.name): _fields(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    parents = {pid: int(found[1]) for pid, found in fields.items() if found is not None}
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in pids | found} - found - pids:
        found |= more
    return found


def holders(path: Path) -> set[int]:
    """The processes that have the file open, as far as this user may look."""
    try:
        wanted = path.stat()
    except OSError:
        return set()
    found = set()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.path.samestat(entry.stat(), wanted):
                found.add(int(entry.parts[2]))
        except OSError:
            continue
    return found


def _fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
