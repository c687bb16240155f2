"""Write a checkpoint: each rank writes its files, rank 0 writes the manifest and renames the folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from turbolm.checkpoint import manifest
from turbolm.checkpoint.ranks import Agree, in_step, share_failure
from turbolm.checkpoint.retention import Retention, remove_old
from turbolm.checkpoint.snapshot import Snapshot
from turbolm.checkpoint.tensor_file import write_tensors
from turbolm.engine.device import use_device
from turbolm.files import write_atomic, write_json

_PART_BYTES = 512 * 2**20  # of a safetensors file, so that several threads write and hash; a larger tensor stays whole
_MAX_THREADS = 4


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

    `about` is what the manifest says beside the snapshot. A rank whose snapshot failed gives None and the reason. Rank
    0 calls `before_commit` just before the checkpoint gets its name. If any rank fails, all raise RuntimeError, and the
    partial checkpoint is removed.
    """
    failures = share_failure(agree, failure)
    if failures or snapshot is None:
        raise RuntimeError(failures)
    final = folder / manifest.checkpoint_name(snapshot.step)
    temporary = manifest.temporary_folder(folder, snapshot.step)
    is_first = snapshot.rank == 0
    try:
        in_step(agree, (lambda: _open_folder(temporary)) if is_first else None)
        parts = agree.gather(in_step(agree, lambda: write_rank_files(temporary, snapshot)))

        def commit() -> None:
            files = {name: described for part in parts or () for name, described in part.items()}
            before_commit()
            manifest.commit(temporary, final, {**snapshot.about, **about, "files": dict(sorted(files.items()))})
            remove_old(folder, retention, snapshot.step)

        in_step(agree, commit if is_first else None)
    except RuntimeError:
        if is_first:
            manifest.remove_folder(temporary)
        raise
    return final


def write_rank_files(folder: Path, snapshot: Snapshot) -> dict[str, Any]:
    """This rank's files; returns their descriptions for the manifest."""
    rank = snapshot.rank
    metadata = {name: str(snapshot.index[name]) for name in ("step", "rank", "world_size")}
    files = {manifest.tensor_file(rank, part): tensors for part, tensors in enumerate(_parts(snapshot.tensors))}
    if snapshot.buffers:
        files[manifest.BUFFERS] = snapshot.buffers
    with ThreadPoolExecutor(_MAX_THREADS, initializer=use_device, initargs=(snapshot.device,)) as pool:
        written = pool.map(lambda item: write_tensors(folder / item[0], item[1], metadata), files.items())
        described = dict(zip(files, written, strict=True))
    name = manifest.index_file(rank)
    text = json.dumps(snapshot.index, allow_nan=False, separators=(",", ":"))
    described[name] = write_atomic(folder / name, text + "\n", durable=True)
    if rank == 0:
        name = manifest.TRAINER_STATE
        described[name] = write_json(folder / name, snapshot.trainer_state, durable=True)
    return described


def _open_folder(temporary: Path) -> None:
    manifest.remove_folder(temporary)
    temporary.mkdir(parents=True)


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
