"""Which checkpoints a run has, and how one is put in place. Torch-free."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbolm.errors import UserError
from turbolm.files import load_json, sync_folder, write_json

FORMAT_VERSION = 3
_READABLE = (2, 3)  # format 2 had a dictionary for each fragment in the index files
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer.json"
BUFFERS = "buffers.safetensors"
_NAME = re.compile(r"step-(\d{8,})")
_TENSORS = re.compile(r"fragments-(\d{5,})(?:\.\d+)?\.safetensors")
_TEMPORARY, _DISCARDED = ".tmp-", ".old-"
HELD = ".mirror-"  # of the links to what is copied to the mirror


def checkpoint_name(step: int) -> str:
    """The folder name of a checkpoint taken after `step` optimizer steps."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that the folder name of a checkpoint says."""
    return int(checkpoint.name.removeprefix("step-"))


def temporary_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is complete."""
    return folder / f"{_TEMPORARY}{checkpoint_name(step)}"


def index_file(rank: int) -> str:
    """The JSON file of a rank."""
    return f"fragments-{rank:05d}.json"


def tensor_file(rank: int, part: int) -> str:
    """A safetensors file of a rank."""
    return f"fragments-{rank:05d}{f'.{part}' if part else ''}.safetensors"


def rank_of_tensor_file(name: str) -> int | None:
    """Whose fragments a file holds; None for another kind of file."""
    match = _TENSORS.fullmatch(name)
    return int(match[1]) if match else None


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint that was renamed into place, by step."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises UserError when it is missing or not one."""
    try:
        manifest = load_json(checkpoint / MANIFEST)
    except FileNotFoundError:
        raise UserError(f"{checkpoint}: no {MANIFEST}; not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / MANIFEST}: cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format_version") not in _READABLE:
        formats = " or ".join(map(str, _READABLE))
        raise UserError(f"{checkpoint / MANIFEST}: not a checkpoint manifest of format {formats}")
    if not _is_complete(manifest):
        raise UserError(f"{checkpoint / MANIFEST}: lacks a value or has one of another type")
    return manifest


def commit(temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest and rename the folder into place; everything else in it must be on disk already."""
    write_json(temporary / MANIFEST, {"format_version": FORMAT_VERSION, **manifest}, durable=True)
    sync_folder(temporary)
    if os.path.lexists(final):  # found invalid by a resume that fell back to an older one
        discard(final)
    os.rename(temporary, final)
    sync_folder(final.parent)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint. It loses its name first, so that a half-removed one is never taken for one."""
    unnamed = checkpoint.with_name(_DISCARDED + checkpoint.name)
    remove_folder(unnamed)
    os.rename(checkpoint, unnamed)
    remove_folder(unnamed)


def clear_leftovers(folder: Path, *, is_mirrored: bool = False) -> None:
    """Remove what interrupted saves left behind; a copy to a mirror goes on. Nobody else may be saving there."""
    for prefix in (_TEMPORARY, _DISCARDED, *(() if is_mirrored else (HELD,))):
        for leftover in folder.glob(f"{prefix}*"):
            remove_folder(leftover)


def remove_folder(path: Path) -> None:
    """Remove a folder, or the link in its place: never what the link leads to. What cannot be removed stays."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)  # it follows no link inside either


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    kinds = {"step": int, "tokens_seen": int, "contract": str, "world_size": int, "parameters": dict, "files": dict}
    if not all(isinstance(manifest.get(key), kind) for key, kind in kinds.items()):
        return False
    described = all(
        isinstance(file, dict) and isinstance(file.get("bytes"), int) and isinstance(file.get("sha256"), str)
        for file in manifest["files"].values()
    )
    shaped = all(
        isinstance(shape, list) and all(isinstance(size, int) for size in shape)
        for shape in manifest["parameters"].values()
    )
    return described and shaped and manifest["world_size"] > 0
