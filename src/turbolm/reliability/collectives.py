"""What torch's flight recorder knows of the collective operations of this process. Torch-free.

torch keeps the last 2,000 operations of every process group: NCCL's on a GPU, gloo's on a CPU (`environment` has the
variables). A thread of a rank that hangs can still read them, and they tell which operation the rank waits in, and
which rank has not entered it.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # of torch._C._distributed_c10d; a CPU build lacks the first
_MAX_PENDING = 2
_COUNTED = re.compile(r"all_?reduce(?!_barrier)|reduce_scatter|all_?gather|all_?to_?all")
_ELEMENT_BYTES = {
    "Double": 8, "Long": 8, "Float": 4, "Int": 4, "BFloat16": 2, "Half": 2, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
}  # fmt: skip


def recorded() -> list[dict[str, Any]]:
    """What this process's recorders hold, as `summarize` returns it; empty where torch has none or is not imported."""
    return [group for entries in _entries() for group in summarize(entries)]


def _entries() -> list[list[dict[str, Any]]]:
    """The entries of each recorder of this process."""
    c10d = getattr(getattr(sys.modules.get("torch"), "_C", None), "_distributed_c10d", None)
    dumps = [getattr(c10d, name, None) for name in _DUMPS]
    return [list(json.loads(dump()).get("entries", ())) for dump in dumps if dump is not None]


def last_records() -> list[int]:
    """The number of the newest record of each recorder, for `bytes_since`; -1 where it has none."""
    return [max((entry["record_id"] for entry in entries), default=-1) for entries in _entries()]


def bytes_since(records: Sequence[int]) -> int | None:
    """The bytes of this rank's reductions, gathers and exchanges since `last_records` returned `records`.

    Of each the larger side: what is reduced or gathered in full. None where the recorders are off, have dropped some
    (they keep the last 2,000), or recorded a type whose size is not known here.
    """
    recorders = _entries()
    if not any(recorders):
        return None
    total = 0
    for last, entries in zip(records, recorders, strict=True):
        new = [entry for entry in entries if entry["record_id"] > last]
        if new and min(entry["record_id"] for entry in new) > last + 1:
            return None
        for entry in new:
            if entry["is_p2p"] or not _COUNTED.search(entry["profiling_name"]):
                continue
            sides = [_side_bytes(entry[f"{side}_sizes"], entry[f"{side}_dtypes"]) for side in ("input", "output")]
            if None in sides:
                return None
            total += max(side for side in sides if side is not None)
    return total


def _side_bytes(sizes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> int | None:
    """The bytes of tensors of these sizes; one type may stand for all."""
    if not set(dtypes) <= set(_ELEMENT_BYTES):
        return None
    types = dtypes if len(dtypes) == len(sizes) else [*dtypes[:1]] * len(sizes)
    return sum(math.prod(size) * _ELEMENT_BYTES[dtype] for size, dtype in zip(sizes, types, strict=False))


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
