"""Read and write JSON atomically, hash files, and fsync. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def load_json(path: Path) -> Any:
    """The JSON value in a file. Raises OSError, or ValueError saying what is wrong with its content."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when the file is missing or corrupt."""
    try:
        value = load_json(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: object, *, durable: bool = False) -> dict[str, Any]:
    """Write JSON atomically; returns its size and SHA-256 as a manifest records them.

    `durable`: force it to disk before it gets its name, and refuse what strict JSON has no word for (NaN, objects);
    otherwise objects are written as their `str`.
    """
    options: dict[str, Any] = {"allow_nan": False} if durable else {"default": str}
    return write_atomic(path, json.dumps(value, indent=1, **options) + "\n", durable=durable)


def write_atomic(path: Path, content: str | bytes, *, durable: bool = False) -> dict[str, Any]:
    """Write a file through a temporary one: a reader sees the old file or the new one, never half of it.

    The file's name is durable only after `sync_folder`.
    """
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_bytes(temporary(path), content, durable=durable)
        os.replace(temporary(path), path)
    except OSError as error:
        with suppress(OSError):
            temporary(path).unlink(missing_ok=True)
        error.filename = str(path)  # a full disk names no file
        raise
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_bytes(path: Path, content: bytes, *, durable: bool) -> None:
    """Write a file; `durable`: and force it to disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_all(file, content)
        if durable:
            os.fsync(file)
    finally:
        os.close(file)


def temporary(path: Path) -> Path:
    """Where this process writes a file before it is renamed to `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_all(file: int, content: bytes | memoryview) -> None:
    """Write everything to a file descriptor: one call may write less than it is given."""
    left = memoryview(content)
    while left:
        left = left[os.write(file, left) :]


def sync(file: Any) -> None:
    """Force what was written to an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a JSON value, in hexadecimal; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
