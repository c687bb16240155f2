"""Tensors in a file of the safetensors format, written from memory in one pass and hashed on the way."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from turbolm.files import write_all
from turbolm.reliability import heartbeat

_CHUNK_BYTES = 16 * 2**20
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write a new file and force it to disk; returns its size and SHA-256 as a manifest records them.

    The hash is that of the tensors in memory, so that disk errors are found. Raises OSError, and RuntimeError for a
    type that the format does not have.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so each is aligned in the file
    digest = hashlib.sha256()
    position = 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chain([_header(ordered, metadata)], _chunks(tensor for _, tensor in ordered)):
            write_all(file, chunk)
            # Start writeback while it is hashed; otherwise most is left for the fsync.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, position, len(chunk), os.POSIX_FADV_DONTNEED)
            digest.update(chunk)
            position += len(chunk)
            heartbeat.note()
        os.fsync(file)
    finally:
        os.close(file)
    return {"bytes": position, "sha256": digest.hexdigest()}


def _header(tensors: list[tuple[str, torch.Tensor]], metadata: Mapping[str, str]) -> memoryview:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in tensors:
        if tensor.dtype not in _NAMES:
            raise RuntimeError(f"{name} is of type {tensor.dtype}, which safetensors files do not have")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _chunks(tensors: Iterator[torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of the tensors in order; small ones are joined, large ones are cut and not copied."""
    small = bytearray()
    for tensor in tensors:
        content = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        if len(small) + len(content) <= _CHUNK_BYTES:
            small += content
            continue
        if small:
            yield memoryview(small)
            small = bytearray()
        for start in range(0, len(content), _CHUNK_BYTES):
            yield content[start : start + _CHUNK_BYTES]
    if small:
        yield memoryview(small)
