"""Which checkpoints a run has, and whether they are whole. Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbolm.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer.json"
_NAME = re.compile(r"^step-(\d{8})$")


def checkpoint_name(step: int) -> str:
    """The folder name of a checkpoint taken after `step` optimizer steps."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint that was renamed into place, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    return sorted(found)


def find_newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes full verification, and why each newer one was rejected."""
    rejected: list[str] = []
    for _, path in reversed(list_checkpoints(folder)):
        problems = verify_checkpoint(path)
        if not problems:
            return path, rejected
        rejected.append(f"{path}: {problems[0]}")
    return None, rejected


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises UserError when it is missing or unreadable."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{checkpoint}: no {MANIFEST}; not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / MANIFEST}: cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{checkpoint / MANIFEST}: not a checkpoint manifest of format {FORMAT_VERSION}")
    return manifest


def verify_checkpoint(checkpoint: Path) -> list[str]:
    """Every difference between a checkpoint's files and its manifest, sizes and SHA-256."""
    try:
        files = read_manifest(checkpoint)["files"]
    except (UserError, KeyError, TypeError) as error:
        return [str(error)]
    problems = []
    for name, expected in sorted(files.items()):
        path = checkpoint / name
        if Path(name).name != name or path.is_symlink():
            problems.append(f"{name}: not a plain file of the checkpoint")
        elif not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{name}: {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif describe_file(path)["sha256"] != expected["sha256"]:
            problems.append(f"{name}: content changed (SHA-256 differs)")
    return problems


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a manifest records them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def commit(temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest and rename the folder into place; everything else in it must be synced already."""
    write_json(temporary / MANIFEST, {"format_version": FORMAT_VERSION, **manifest})
    sync_folder(temporary)
    if final.exists():  # the same step, saved again after a resume from before it
        superseded = final.with_name(f".old-{final.name}")
        shutil.rmtree(superseded, ignore_errors=True)
        final.rename(superseded)
        temporary.rename(final)
        shutil.rmtree(superseded, ignore_errors=True)
    else:
        temporary.rename(final)
    sync_folder(final.parent)


def remove_old(folder: Path, keep_last: int) -> None:
    """Keep the newest `keep_last` checkpoints and clear what interrupted saves left behind."""
    for _, path in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(path, ignore_errors=True)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON and force it to disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Force a file's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file  # opening a folder for reading and syncing it makes the names in it durable
