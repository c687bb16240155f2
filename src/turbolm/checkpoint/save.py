"""Write a checkpoint: each rank writes its files, rank 0 writes the manifest and renames the folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from turbolm.checkpoint import manifest
from turbolm.checkpoint.retention import Retention, remove_old
from turbolm.checkpoint.snapshot import Snapshot, use_device
from turbolm.checkpoint.tensor_file import write_tensors
from turbolm.files import write_json
from turbolm.reliability import heartbeat

_PART_BYTES = 512 * 2**20  # of a safetensors file, so that several threads write and hash; a larger tensor stays whole
_MAX_THREADS = 4

Agree = Callable[[Any], list[Any]]


def write_checkpoint(
    folder: Path,
    snapshot: Snapshot | None,
    about: Mapping[str, Any],
    retention: Retention,
    *,
    agree: Agree,
    failure: str | None = None,
    before_commit: Callable[[], None] = lambda: None,
) -> Path:
    """Write every rank's snapshot as one checkpoint; returns where it is. Collective, through `agree` alone.

    `about` is what the manifest says beside the snapshot. A rank whose snapshot failed gives None and the reason.
    Rank 0 calls `before_commit` just before the checkpoint gets its name. If any rank fails, all raise RuntimeError,
    and nothing is left of it.
    """
    failures = _failures(agree(failure))
    if failures or snapshot is None:
        raise RuntimeError(failures)
    final = folder / manifest.checkpoint_name(snapshot.step)
    temporary = manifest.temporary_folder(folder, snapshot.step)
    is_first = snapshot.rank == 0
    try:
        _in_step(agree, (lambda: _open_folder(temporary)) if is_first else None)
        parts = _in_step(agree, lambda: write_rank_files(temporary, snapshot))
        files = {name: described for part in parts for name, described in part.items()}

        def commit() -> None:
            before_commit()
            manifest.commit(temporary, final, {**snapshot.about, **about, "files": dict(sorted(files.items()))})
            remove_old(folder, retention, snapshot.step)

        _in_step(agree, commit if is_first else None)
    except RuntimeError:
        if is_first:
            manifest.remove_folder(temporary)
        raise
    return final


def write_rank_files(folder: Path, snapshot: Snapshot) -> dict[str, Any]:
    """This rank's files; returns their descriptions for the manifest."""
    rank, metadata = snapshot.rank, {"step": str(snapshot.step), "rank": str(snapshot.rank)}
    files = {manifest.tensor_file(rank, part): tensors for part, tensors in enumerate(_parts(snapshot.tensors))}
    if snapshot.buffers:
        files[manifest.BUFFERS] = snapshot.buffers
    with ThreadPoolExecutor(_MAX_THREADS, initializer=use_device, initargs=(snapshot.device,)) as pool:
        written = pool.map(lambda item: write_tensors(folder / item[0], item[1], metadata), files.items())
        described = dict(zip(files, written, strict=True))
    texts = {manifest.index_file(rank): snapshot.index}
    if rank == 0:
        texts[manifest.TRAINER_STATE] = snapshot.trainer_state
    for name, value in texts.items():
        described[name] = write_json(folder / name, value, durable=True)
    return described


def gather_over(group: dist.ProcessGroup | None) -> Agree:
    """Gather what each rank passes, by rank, over a host-side process group."""

    def agree(value: Any) -> list[Any]:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        with heartbeat.awaiting_others():
            dist.all_gather_object(gathered, value, group=group)
        return gathered

    return agree


def _open_folder(temporary: Path) -> None:
    manifest.remove_folder(temporary)
    temporary.mkdir(parents=True)


def _in_step(agree: Agree, action: Callable[[], Any] | None) -> list[Any]:
    """Do this rank's part and wait for the others'; returns what each gave, or raises on all what any failed with."""
    result, failure = None, None
    try:
        result = action() if action else None
    except Exception as error:  # whatever it was, the other ranks must not wait for this one
        failure = f"{type(error).__name__}: {error}"
    outcomes = agree((failure, result))
    failures = _failures([failure for failure, _ in outcomes])
    if failures:
        raise RuntimeError(failures)
    return [result for _, result in outcomes]


def _failures(by_rank: list[str | None]) -> str:
    """What any rank failed with; ranks with the same reason share one text."""
    ranks: dict[str, list[str]] = {}
    for rank, failure in enumerate(by_rank):
        if failure:
            ranks.setdefault(failure, []).append(str(rank))
    return "; ".join(f"rank {', '.join(numbers)}: {failure}" for failure, numbers in ranks.items())


def _parts(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    parts: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > _PART_BYTES:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += size
    return parts
