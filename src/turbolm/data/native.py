"""`native.c`, compiled at its first use on a machine, and its callers.

NumPy would need several passes for these loops, and Python one step per slice: those are the reference in the tests.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from turbolm.errors import UserError

if TYPE_CHECKING:
    from turbolm.data.order.packing import Sequences

IntArray = np.ndarray  # int64 unless said otherwise
# Addresses of a shard's files in memory, 0 while they are not open: `struct shard` of native.c.
SHARD = np.dtype([("index", np.uint64), ("tokens", np.uint64), ("num_tokens", np.int64)])
_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-shared", "-fPIC")
_COMPILE_SEC = 60
_FILL = {"<u2": "turbolm_fill_u2", "<u4": "turbolm_fill_u4"}
_NUM_ARGUMENTS = {
    "turbolm_lengths": 4,
    "turbolm_fill_u2": 14,
    "turbolm_fill_u4": 14,
    "turbolm_best_fit": 8,
    "turbolm_argsort_random": 5,
    "turbolm_add_digests": 8,
    "turbolm_grow_digests": 4,
}


@functools.cache
def library() -> ctypes.CDLL:
    """Return the loaded library. Raises UserError without a C compiler."""
    assert sys.byteorder == "little"  # as the store's files are
    try:
        try:
            loaded = ctypes.CDLL(str(_compiled(_folder())))
        except (OSError, RuntimeError):  # no home, a read-only one or a corrupt file: compile for this process only
            with tempfile.TemporaryDirectory(prefix="turbolm-") as folder:
                loaded = ctypes.CDLL(str(_compiled(Path(folder))))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        raise UserError(
            f"The loops that read training data could not be compiled: {error} {said[-500:].decode(errors='replace')}\n"
            "Install a C compiler (gcc or clang), or set CC."
        ) from None
    for name, count in _NUM_ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.c_int64] * count, ctypes.c_int64
    return loaded


@dataclass(frozen=True)
class Shards:
    """The shards of a store, for the documents of one split; their files stay mapped while this object exists.

    `memory` is `SHARD` [num_shards]; `first_document`, int64 [num_shards + 1], and `first_row`, int64 [num_shards],
    give the documents of each shard and their rows in its index.
    """

    memory: np.ndarray
    files: list[np.ndarray]
    first_document: IntArray
    first_row: IntArray

    def as_struct(self) -> IntArray:
        """`struct shards` of native.c."""
        arrays = (self.memory, self.first_document, self.first_row)
        return np.array([*map(address, arrays), len(self.memory)])


def lengths(shards: Shards, documents: IntArray) -> IntArray:
    """Return the positions of these documents, whose shards are open: int64 [len(documents)]."""
    documents = np.ascontiguousarray(documents, np.int64)
    found = np.empty_like(documents)
    _call("turbolm_lengths", shards.as_struct(), len(documents), documents, found)
    return found


def fill(
    block: IntArray, shards: Shards, dtype: str, sequences: Sequences, indices: IntArray, ignored: int
) -> tuple[IntArray, int | None]:
    """Write inputs, positions and targets of the sequences `indices` to `block`, int64 [3, len(indices), seq_len].

    Index -1 gives padding only; its targets are `ignored`. Tokens are of the store's `dtype`. Releases the GIL. Returns
    the ends of the slices, and of the padding at the end of a sequence, when all sequences are put end to end; and the
    first slice that is outside its shard or does not fit into its sequence (then the rest is meaningless), or None.
    """
    columns = (indices, sequences.offsets, sequences.document, sequences.start, sequences.length)
    assert all(array.dtype == np.int64 and array.flags.c_contiguous for array in (block, *columns))
    assert block.shape == (3, len(indices), sequences.seq_len) and indices.max(initial=-1) < len(sequences)
    num_slices = int(np.diff(sequences.offsets)[indices[indices >= 0]].sum())
    addresses, ends = np.empty(num_slices, np.uint64), np.empty(num_slices + len(indices), np.int64)
    arguments = (shards.as_struct(), sequences.seq_len, len(indices), *columns, addresses, *block, ends, ignored)
    count = _call(_FILL[dtype], *arguments)
    return ends[: max(count, 0)], -1 - count if count < 0 else None


def best_fit(lengths: IntArray, counts: IntArray, seq_len: int) -> IntArray:
    """Return the actions of `packing._best_fit`, int64 [num_actions, 4], for `counts` slices of these lengths."""
    assert lengths.dtype == counts.dtype == np.int64 and len(lengths) == len(counts)
    assert all(array.flags.c_contiguous for array in (lengths, counts))
    most = int(counts.sum())  # far fewer are used, and the rest is not touched
    actions, runs = np.empty((most, 4), np.int64), np.empty((most, 4), np.int64)
    stacks, with_room = np.full(seq_len + 1, -1), np.zeros(seq_len // 64 + 1, np.uint64)
    count = _call("turbolm_best_fit", seq_len, len(lengths), lengths, counts, actions, runs, stacks, with_room)
    return actions[:count]


def argsort_random(numbers: np.ndarray) -> IntArray:
    """Return the stable argsort, int64, of random uint64."""
    numbers = np.ascontiguousarray(numbers, np.uint64)
    bits = min(max(len(numbers).bit_length(), 1), 16)  # as many counters as numbers, within a core's cache
    starts, order = np.zeros(2**bits + 1, np.int64), np.empty(len(numbers), np.int64)
    _call("turbolm_argsort_random", len(numbers), bits, numbers, starts, order)
    return order


def add_digests(
    tables: np.ndarray, num_slots: IntArray, num_used: IntArray, digests: np.ndarray, is_new: np.ndarray
) -> int:
    """Add digests, uint8 [count, at least 12], to tables by address, uint64; write to `is_new`, bool [count].

    Returns how many were added: fewer than `count` if the table of the next one is full.
    """
    assert digests.dtype == np.uint8 and digests.strides[1] == 1 and is_new.dtype == bool
    count, stride = len(digests), digests.strides[0]
    return _call("turbolm_add_digests", len(tables), tables, num_slots, num_used, count, stride, digests, is_new)


def grow_digests(table: np.ndarray, larger: np.ndarray, digest_bytes: int) -> None:
    """Copy the digests of a table, uint8, to a larger one that is empty."""
    _call("turbolm_grow_digests", len(table) // digest_bytes, table, len(larger) // digest_bytes, larger)


def address(array: np.ndarray) -> int:
    """Return the address of the array's first value."""
    return int(array.__array_interface__["data"][0])  # a third of the time that `array.ctypes.data` takes


def _call(name: str, *arguments: np.ndarray | int) -> int:
    """Pass an array as its address."""
    numbers = [argument if isinstance(argument, int) else address(argument) for argument in arguments]
    return int(getattr(library(), name)(*numbers))


def _folder() -> Path:
    """Return the cache folder: beside torch's compiled extensions, which the launcher separates by node."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(root) if root else Path.home() / ".cache" / "turbolm"


def _compiled(folder: Path) -> Path:
    """Return the library's file; compile it if there is none for this source and compiler yet."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    made_of = repr((compiler, _FLAGS, platform.machine(), platform.libc_ver())).encode() + _SOURCE.read_bytes()
    path = folder / f"turbolm-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".turbolm-") as unfinished:  # ranks may compile at once
            compiled = Path(unfinished) / path.name
            command = [*compiler, *_FLAGS, "-o", str(compiled), str(_SOURCE)]
            subprocess.run(command, capture_output=True, check=True, timeout=_COMPILE_SEC)
            with compiled.open("rb") as file:  # a truncated library (power cut) would crash its users
                os.fsync(file.fileno())
            compiled.replace(path)
    return path
