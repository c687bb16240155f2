"""What torch's flight recorder knows of the collective operations of this process. Torch-free.

torch keeps the last 2,000 operations of every process group: NCCL's on a GPU, gloo's on a CPU (`environment` has the
variables). A thread of a rank that hangs can still read them, and they tell which operation the rank waits in, and
which rank has not entered it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # of torch._C._distributed_c10d; a CPU build lacks the first
_MAX_PENDING = 2


def recorded() -> list[dict[str, Any]]:
    """What this process's recorders hold, as `summarize` returns it; empty where torch has none or is not imported."""
    c10d = getattr(getattr(sys.modules.get("torch"), "_C", None), "_distributed_c10d", None)
    dumps = [getattr(c10d, name, None) for name in _DUMPS]
    return [group for dump in dumps if dump is not None for group in summarize(json.loads(dump()).get("entries", ()))]


def summarize(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The collective operations by process group: how many were `entered` and `finished`, and which are `pending`.

    Messages between two ranks are left out: their number differs from rank to rank.
    """
    groups: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry.get("is_p2p"):
            continue
        backend, _, operation = entry["profiling_name"].rpartition(":")
        name, description = entry["process_group"]
        name = f"{backend} group {description if description not in ('', 'undefined') else name}"
        group = groups.setdefault(name, {"group": name, "entered": 0, "finished": 0, "pending": []})
        number = entry["collective_seq_id"]
        group["entered"] = max(group["entered"], number)
        if entry["retired"] or entry["state"] == "completed":
            group["finished"] = max(group["finished"], number)
        elif len(group["pending"]) < _MAX_PENDING:
            sizes = ", ".join("x".join(map(str, size)) or "1" for size in entry["input_sizes"][:2])
            group["pending"].append(f"{operation} {number} ({sizes} {entry['input_dtypes'][0]}, {entry['state']})")
    return list(groups.values())


def in_words(groups: Iterable[dict[str, Any]]) -> str:
    """The pending operations, or that there are none; empty where nothing was recorded."""
    found = list(groups)
    pending = [f"{operation} of {group['group']}" for group in found for operation in group["pending"]]
    if pending:
        return "in " + ", ".join(pending)
    last = [f"{group['finished']} of {group['group']}" for group in found]
    return f"in no collective operation; the last was {', '.join(last)}" if last else ""
